"""What can be counted of how a chapter is written: prose and code, lengths of cells, proofs behind exports, pictures.

    python tools/style.py [NAME ...]       a table, and the cells that miss a target

`counts` gives the numbers of one notebook; tests/test_site.py holds every chapter to BOUNDS.
"""
from __future__ import annotations

import re
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import notebooks as tool  # noqa: E402

# name -> (lowest, highest) that a chapter may have; None: no bound on that side
BOUNDS = {
    "words_per_line": (3, None),        # words of prose for each line of code
    "median_lines": (None, 4),          # lines of a code cell
    "longest_open": (None, 20),         # lines of the longest cell that is not exported
    "wide_lines": (None, 0),            # exported lines over 80 columns
    "proved": (1.0, None),              # share of exported cells with an assert within two cells, or in the same
    "shown": (1.0, None),               # share of exported cells with an output within two cells
    "pictures": (1, None),
    "exercises": (3, 5),
    "recap": (5, 5),                    # points of the recap
}
TARGETS = {name: high if low is None else low for name, (low, high) in BOUNDS.items() if low != high}


@dataclass
class Counts:
    """The numbers of one chapter; `misses` names cells that miss a target, and how."""

    words_per_line: float
    median_lines: float
    longest_open: int
    wide_lines: int
    proved: float
    shown: float
    pictures: int
    exercises: int
    recap: int
    misses: list[str] = field(default_factory=list)


def prose_words(text: str) -> int:
    """Words of a Markdown cell, without code blocks, folded solutions and addresses."""
    text = re.sub(r"<details>.*?</details>|```.*?```|\]\([^)]*\)|<[^>]+>", " ", text, flags=re.S)
    return len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text))


def code_lines(text: str) -> list[str]:
    """The lines of a code cell that are neither blank nor a directive."""
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#|")]


def exported(cell: dict) -> bool:
    return cell["cell_type"] == "code" and tool.source(cell).startswith("#| exports")


def defines(cell: dict) -> bool:
    """Whether an exported cell defines something: imports and constants alone need no proof."""
    return exported(cell) and re.search(r"(?m)^(class|def|async def) ", tool.source(cell)) is not None


def recap_points(cells: list[dict]) -> int:
    """Points of the recap: list items between its heading and the next one."""
    for cell in cells:
        after = re.split(r"(?m)^##+ Recap\s*$", tool.source(cell))
        if cell["cell_type"] == "markdown" and len(after) == 2:
            return len(re.findall(r"(?m)^(?:[-*]|\d+\.) ", re.split(r"(?m)^##", after[1])[0]))
    return 0


def counts(nb: dict) -> Counts:
    cells = [c for c in nb["cells"] if "#| hide" not in tool.source(c)]
    code = [(i, c, code_lines(tool.source(c))) for i, c in enumerate(cells) if c["cell_type"] == "code"]
    code = [(i, c, lines) for i, c, lines in code if lines]
    lengths = [len(lines) for _, _, lines in code]
    words = sum(prose_words(tool.source(c)) for c in cells if c["cell_type"] == "markdown")
    misses, proved, shown, wide = [], [], [], 0
    for i, cell, lines in code:
        if exported(cell):
            over = [line for line in lines if len(line) > 80]
            wide += len(over)
            misses += [f"{cell['id']}: {len(over)} lines over 80 columns"] * bool(over)
        elif len(lines) > TARGETS["longest_open"]:
            misses.append(f"{cell['id']}: {len(lines)} lines")
        if defines(cell):
            # the cell itself, and the two code cells after the last export of this row
            last = i
            while last + 1 < len(cells) and (exported(cells[last + 1]) or cells[last + 1]["cell_type"] == "markdown"):
                last += 1
            near = [cell] + [c for c in cells[last + 1:] if c["cell_type"] == "code"][:2]
            has_assert = any(re.search(r"(?m)^\s*assert |assert_", tool.source(c)) for c in near)
            has_output = any(c.get("outputs") for c in near)
            proved.append(has_assert)
            shown.append(has_output)
            misses += [f"{cell['id']}: no assert within two cells"] * (not has_assert)
            misses += [f"{cell['id']}: no output within two cells"] * (not has_output)
    pictures = sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    open_cells = [len(lines) for _, c, lines in code if not exported(c)]
    return Counts(round(words / max(1, sum(lengths)), 2), statistics.median(lengths or [0]), max(open_cells, default=0), wide,
                  mean(proved), mean(shown), pictures,
                  len(tool.exercises(nb)), recap_points(cells), misses)


def mean(flags: list[bool]) -> float:
    return round(sum(flags) / len(flags), 3) if flags else 1.0


def outside(found: Counts) -> list[str]:
    """The bounds that a chapter's numbers break."""
    numbers = asdict(found)
    return [f"{name}={numbers[name]}, allowed {low} to {high}" for name, (low, high) in BOUNDS.items()
            if low is not None and numbers[name] < low or high is not None and numbers[name] > high]


def main() -> int:
    paths = [p for p in tool.notebooks(sys.argv[1:]) if p.stem != "index"]
    results = {p.stem: counts(tool.read(p)) for p in paths}
    names = list(BOUNDS)
    print(" " * 16 + "".join(f"{name:>15}" for name in names))
    for stem, found in results.items():
        print(f"{stem:16}" + "".join(f"{getattr(found, name):>15}" for name in names))
    print(f"{'target':16}" + "".join(f"{TARGETS.get(name, ''):>15}" for name in names))
    for stem, found in results.items():
        print(f"\n{stem}", *found.misses, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
