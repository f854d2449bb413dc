"""The exercises of a notebook, to be run outside of it: the empty cell, its check, and the folded solution."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
sys.path.insert(0, str(ROOT / "tools"))
import notebooks as tool  # noqa: E402


def exercises(chapter: str) -> list[tuple[str, str, str, str]]:
    """(number, empty cell, check, solution) of each exercise of a notebook.

    chapter: "03" is nbs/03_*.ipynb; "deeper/hooks" is nbs/deeper/hooks.ipynb.
    """
    path, = NBS.glob(f"{chapter}_*.ipynb" if chapter.isdigit() else f"{chapter}.ipynb")
    return [(one.number, one.unsolved, one.checks, one.solution) for one in tool.exercises(tool.read(path))]


def said(code: str, check: str, space: dict, capsys) -> str:
    """What the check prints about a piece of code, without the exercise's name."""
    exec(compile(code + "\n" + check, "exercise", "exec"), space := dict(space))
    return capsys.readouterr().out.strip().partition(": ")[2]
