"""The exercises of a notebook, to be run outside of it: the empty cell, its check, and the folded solution."""
import json
import re
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"


def exercises(chapter: str) -> list[tuple[str, str, str, str]]:
    """(number, empty cell, check, solution) of each exercise of a notebook.

    chapter: "03" is nbs/03_*.ipynb; "deeper/hooks" is nbs/deeper/hooks.ipynb.
    """
    path, = NBS.glob(f"{chapter}_*.ipynb" if chapter.isdigit() else f"{chapter}.ipynb")
    texts = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    found = []
    for i, text in enumerate(texts):
        if number := re.match(rf"# exercise ({chapter.rpartition('/')[2]}\.\d)\n", text):
            solution = re.search(r"<details>.*?```python\n(.*?)```", texts[i + 2], re.S).group(1)
            found.append((number.group(1), text, texts[i + 1], solution))
    return found


def said(code: str, check: str, space: dict, capsys) -> str:
    """What the check prints about a piece of code, without the exercise's name."""
    exec(compile(code + "\n" + check, "exercise", "exec"), space := dict(space))
    return capsys.readouterr().out.strip().partition(": ")[2]
