"""What can be counted of how a notebook is written, against the limits of its kind (lesson, deeper, engine).

    python tools/style.py [NAME ...]       the table; a number outside of its limits has a star
"""
import ast
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from notebooks import (LIB, code_lines, exercises, kind_of, minutes, name_of, notebooks, prose_words, read,  # noqa: E402
                       source)

# Names in all __all__ together.
NAMES = 300
MANY = float("inf")
LESSON = {
    "cells": (0, 120),
    "code": (0, 450),           # lines of code, without blank ones and directives
    "minutes": (0, 60),         # of reading: words / 200 + code / 15
    "median": (0, 4),           # lines of a code cell
    "longest": (0, 25),         # lines of the longest cell that is not exported
    "words": (6, MANY),         # of prose for a line of code
    "pictures": (1, MANY),
    "exercises": (3, 5),        # or none at all
    "unbadged": (0, 0),         # exercises without "difficulty 2 of 5, 10 minutes" in the text before them
    "names": (0, 25),           # public ones of the module
    "module": (0, 300),         # lines of the module
    "wide": (0, 0),             # exported lines over 80 columns
}
LIMITS = {"index": {"wide": (0, 0)}, "lesson": LESSON, "deeper": LESSON, "engine": {"module": (0, 450), "wide": (0, 0)}}


def public_names(module: Path) -> list[str]:
    found = re.search(r"^__all__ = (\[.*?\])", module.read_text(encoding="utf-8"), re.M | re.S)
    return ast.literal_eval(found[1]) if found else []


def counts(nb: dict) -> dict[str, float]:
    """The numbers of a notebook, by the names of LESSON."""
    cells = nb["cells"]
    code = [source(cell) for cell in cells if cell["cell_type"] == "code" and code_lines(source(cell))]
    exported = [text for text in code if re.match(r"#\|\s*export", text)]
    lines = [len(code_lines(text)) for text in code]
    words = sum(prose_words(source(cell)) for cell in cells if cell["cell_type"] == "markdown")
    tasks = exercises(nb)
    named = re.search(r"(?m)^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, nb["cells"])))
    module = LIB / (named[1].replace(".", "/") + ".py") if named else None
    return {
        "cells": len(cells), "code": sum(lines), "minutes": minutes(nb),
        "median": statistics.median(lines or [0]), "words": round(words / max(1, sum(lines)), 1),
        "longest": max((len(code_lines(text)) for text in code if text not in exported), default=0),
        "pictures": sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", [])),
        "exercises": len(tasks),
        "unbadged": sum(not re.search(r"difficulty [1-5] of 5, \d+ minutes", task.text, re.I) for task in tasks),
        "names": len(public_names(module)) if module else 0,
        "module": len(module.read_text(encoding="utf-8").splitlines()) if module else 0,
        "wide": sum(len(line) > 80 for text in exported for line in text.splitlines())}


def outside(kind: str, found: dict[str, float]) -> list[str]:
    """The numbers that are outside of the limits of a kind."""
    return [name for name, (low, high) in LIMITS[kind].items()
            if not low <= found[name] <= high and (name, found[name]) != ("exercises", 0)]


def report(paths: list[Path]) -> str:
    """The table, and how many public names there are in all."""
    lines = [f"{'':24}" + "".join(f"{name:>10}" for name in LESSON)]
    for path in paths:
        found = counts(read(path))
        starred = [f"{found[name]:g}" + "*" * (name in outside(kind_of(path), found)) for name in LESSON]
        lines.append(f"{name_of(path):24}" + "".join(f"{number:>10}" for number in starred))
    return "\n".join([*lines, f"public names in all: {all_names()} ({NAMES} at most)"])


def all_names() -> int:
    return sum(len(public_names(path)) for path in LIB.rglob("*.py"))


if __name__ == "__main__":
    print(report(notebooks(sys.argv[1:])))
