"""The course as a corpus: the texts of the notebooks, without code and outputs, in minigpt/assets/course/.

    python tools/course.py            write them
    python tools/course.py --check    are they in step with nbs/?

`minigpt ask` answers from them. They are notebooks themselves, one cell a line, so that the package reads them with
the same loader as any other notebook. index.ipynb is left out: it tells how to find the chapters, not what is in them.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, COURSE = ROOT / "nbs", ROOT / "minigpt" / "assets" / "course"


def prose(path: Path) -> str:
    """The markdown cells of a notebook, as a notebook with one cell a line."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    rows = [json.dumps({"cell_type": "markdown", "id": cell["id"], "metadata": {}, "source": "".join(cell["source"])},
                       ensure_ascii=False) for cell in cells if cell["cell_type"] == "markdown"]
    return '{"cells": [\n' + ",\n".join(rows) + '\n],\n"metadata": {}, "nbformat": 4, "nbformat_minor": 5}\n'


def wanted() -> dict[str, str]:
    """What the folder should hold: {name: text}."""
    return {path.name: prose(path) for path in sorted(NBS.glob("[0-9]*.ipynb"))}


def out_of_step() -> list[str]:
    """Names of files that differ from what the notebooks say, are missing or too many."""
    here = {path.name: path.read_text(encoding="utf-8") for path in COURSE.glob("*")}
    want = wanted()
    return sorted(name for name in want.keys() | here.keys() if want.get(name) != here.get(name))


def write() -> None:
    COURSE.mkdir(exist_ok=True)
    want = wanted()
    for path in COURSE.glob("*"):
        if path.name not in want:
            path.unlink()
    for name, text in want.items():
        (COURSE / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        print("\n".join(f"{name} differs from nbs/: python tools/course.py" for name in out_of_step()) or "in step")
        sys.exit(bool(out_of_step()))
    write()
