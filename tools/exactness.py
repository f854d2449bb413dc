"""The exactness page: what the tests measured against peers and slow versions, as a table.

    python tools/exactness.py run          run the tests that note figures, then write nbs/exactness.json and .md
    python tools/exactness.py run FILE ...    only those of some test files, or FILE::TEST; the other figures stay
    python tools/exactness.py run new         only those that have no figures in the table yet
    python tools/exactness.py read FILE    the same from a file that MINIGPT_LEDGER=FILE python -m pytest has written
    python tools/exactness.py page         only write nbs/exactness.md from nbs/exactness.json

A test notes a figure with the fixture `ledger` (tests/conftest.py): a name, the measured value, the peer, the bound.
PROMISES lists what the course promises to prove; each must have figures (tests/test_site.py).
"""
from __future__ import annotations

import ast
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "nbs" / "exactness.json", ROOT / "nbs" / "exactness.md"

# What is promised -> the tests that prove it (file::function, a regular expression), and the chapter that it needs.
PROMISES = {
    "Our tokenizer's ids are tiktoken's and HF tokenizers'": (r"test_bpe.py::test_(ids_equal|a_whole_text)", "00_bpe"),
    "Our logits are those of transformers, for the shapes of all four GPT-2 sizes":
        (r"test_gpt2_parity.py::test_logits_equal_transformers", "03_gpt2"),
    "Manual attention is torch's SDPA": (r"test_attention.py::test_equals_sdpa", "02_attention"),
    "With the KV cache is as without": (r"test_gpt2_parity.py::test_cache_equals_no_cache", "03_gpt2"),
    "A batch of unequal prompts is as one by one": (r"::test_(unequal_prompts_equal|batch_equals)_one_by_one", "03_gpt2"),
    "A resumed run is the uninterrupted run, bit for bit":
        (r"test_training.py::test_resumed_is_uninterrupted_bit_for_bit", "04_training"),
    "Accumulated gradients are those of one big batch":
        (r"test_training.py::test_accumulated_gradients_are_one_big_batch", "04_training"),
    "Merged LoRA is unmerged LoRA": (r"test_lora.py::test_merge_and_unmerge", "08_lora"),
    "Our BLEU is sacrebleu's": (r"test_evaluation.py::test_bleu_and_chrf_equal_sacrebleu", "06_evaluation"),
    "Our adapters load in peft, and peft's in ours": (r"test_lora.py::test_(ours_in_peft|theirs_in_ours)", "08_lora"),
}
TITLES = {"attention": "02", "documents": "09", "gradio": "10", "bpe": "00", "data": "01", "gpt2": "03", "training": "04", "generation": "05",
          "evaluation": "06", "finetuning": "07", "lora": "08", "rag": "09", "chat": "10", "cli": "10", "ui": "10",
          "server": "11"}


def test_name(nodeid: str) -> str:
    """tests/test_x.py::test_y[a-b] -> test_x.py::test_y"""
    return Path(nodeid.partition("[")[0]).as_posix().removeprefix("tests/")


def read_ledger(path: Path) -> list[dict]:
    """The figures of a ledger: for each name and peer the worst, with its test."""
    worst: dict[tuple, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["test"] = test_name(row["test"])
        key = (row["name"], row["peer"])
        if key not in worst or badness(row) > badness(worst[key]):
            worst[key] = row
    return sorted(worst.values(), key=place)


def as_number(value) -> float:
    return value if isinstance(value, (int, float)) else math.nan


def at_least(row: dict) -> bool:
    """Whether the bound is a lower one: the test has passed, so a figure over its bound was meant to be."""
    return as_number(row["value"]) > as_number(row["bound"])


def badness(row: dict) -> float:
    return -as_number(row["value"]) if at_least(row) else as_number(row["value"])


def chapter_of(test: str) -> str:
    """The number of the chapter that a test belongs to, by the name of its file."""
    name = re.match(r"test_([a-z0-9]+)", test)[1]
    return TITLES.get(name, "99")


def ledger_tests() -> dict[str, str]:
    """Every test that takes the fixture `ledger`: file::function -> its node id."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and \
                    "ledger" in [a.arg for a in node.args.args]:
                found[f"{path.name}::{node.name}"] = f"tests/{path.name}::{node.name}"
    return found


def run(chosen: list[str]) -> list[dict]:
    """Run the tests that note figures, all or those chosen; all figures, the others as they were."""
    there = ledger_tests()
    known = json.loads(DATA.read_text(encoding="utf-8"))["rows"] if chosen else []
    if chosen == ["new"]:
        names = set(there) - {row["test"] for row in known}
    else:
        names = {name for name in there if not chosen or any(name.startswith(Path(c).name) for c in chosen)}
    wanted = [there[name] for name in sorted(names)]
    if not wanted:
        return [row for row in known if row["test"] in there]
    folder = Path(tempfile.mkdtemp())
    path, report = folder / "ledger.jsonl", folder / "report.xml"
    path.touch()
    subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *wanted], cwd=ROOT,
                   env=os.environ | {"MINIGPT_LEDGER": str(path)})
    failed = {f"{case.get('classname').rpartition('.')[2]}.py::{case.get('name').partition('[')[0]}"
              for case in ElementTree.parse(report).iter("testcase") if case.find("failure") is not None
              or case.find("error") is not None}
    if failed:
        print("left out, because they failed:", *sorted(failed))
    kept = [r for r in known if r["test"] in there and r["test"] not in names]
    return sorted(kept + [r for r in read_ledger(path) if r["test"] not in failed], key=place)


def place(row: dict) -> tuple:
    return chapter_of(row["test"]), row["test"], row["name"], row["peer"]


def save(rows: list[dict]) -> None:
    data = {"date": date.today().isoformat(), "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}", "rows": rows}
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8", newline="\n")


# ------------------------------------------------------------------ the page

def number(value) -> str:
    """A measured figure: whole numbers as they are, others to two digits."""
    if isinstance(value, float) and value != int(value):
        return f"{value:.2g}" if abs(value) < 1e-3 or abs(value) >= 1000 else f"{value:.3g}"
    return f"{int(value):,}" if isinstance(value, (int, float)) else str(value)


def peer(row: dict) -> str:
    return f"{row['peer']} {row['version']}".strip() or "a slow version of its own"


def cell(text: str) -> str:
    return re.sub(r"([\\|*_\[\]<>$`])", r"\\\1", text)


def table(rows: list[dict]) -> list[str]:
    lines = ["| what is compared | with | measured | bound |", "|---|---|---|---|"]
    for row in rows:
        file, _, function = row["test"].partition("::")
        lines.append(f"| {cell(row['name'])}<br>[`{function}`](https://github.com/minigpt/minigpt/blob/main/tests/{file}) | "
                     f"{cell(peer(row))} | {number(row['value'])} | {'at least ' * at_least(row)}{number(row['bound'])} |")
    return lines


def proofs(rows: list[dict], tests: str) -> list[dict]:
    return [row for row in rows if re.search(tests, row["test"])]


def worst_by_bound(rows: list[dict]) -> str:
    """The largest difference under each bound: rounding differs between float32 and 16 bits."""
    bounds = sorted({as_number(row["bound"]) for row in rows})
    worst = [max(as_number(row["value"]) for row in rows if as_number(row["bound"]) == bound) for bound in bounds]
    return ", ".join(f"{number(value)} (bound {number(bound)})" for value, bound in zip(worst, bounds))


def promises(rows: list[dict]) -> list[str]:
    """The table of what is promised, with the worst figure of each."""
    lines = ["| promise | compared with | figures | largest difference |", "|---|---|---|---|"]
    for promise, (tests, chapter) in PROMISES.items():
        found = proofs(rows, tests)
        if not found:
            continue
        peers = ", ".join(dict.fromkeys(cell(peer(row)) for row in found))
        tests = "".join(dict.fromkeys(f"<br>`{row['test'].rpartition('::')[2]}`" for row in found))
        lines.append(f"| {promise} ([{chapter[:2]}]({chapter}.ipynb)){tests} | {peers} | {len(found)} | "
                     f"{worst_by_bound(found)} |")
    return lines


def page() -> str:
    data = json.loads(DATA.read_text(encoding="utf-8"))
    rows = data["rows"]
    parts = ['---\ntitle: "Exactness"\ndescription: "What is equal to what, by how much, and how to check it"\n---',
             "Nothing in this course is asked to be believed. Where a chapter says that two things are equal, a test "
             "computes both and notes the largest difference that it found: with another library, or with a slow and "
             "obvious version of the same. The tables below are made from these notes "
             "(`python tools/exactness.py run`), and no figure is typed by hand.",
             f"Measured on {data['date']} with Python {data['python']} on {data['system']}, on the CPU. A difference of 0 "
             "means bit for bit or id for id; around 1e-6 is the rounding of float32. A bound is the most that the test allows, "
             "or, where it says so, the least.",
             "To repeat a figure: `python -m pytest -k` with the test that stands below its name, such as "
             "`python -m pytest -k test_equals_sdpa`.",
             "## What is promised", "\n".join(promises(rows)), "## Every figure"]
    for chapter in dict.fromkeys(chapter_of(row["test"]) for row in rows):
        of_chapter = [row for row in rows if chapter_of(row["test"]) == chapter]
        parts += [f"### Chapter {chapter}" if chapter != "99" else "### Others", "\n".join(table(of_chapter))]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    what = sys.argv[1:2]
    if what == ["run"]:
        save(run(sys.argv[2:]))
    elif what == ["read"] and len(sys.argv) == 3:
        save(read_ledger(Path(sys.argv[2])))
    elif what != ["page"]:
        print(__doc__)
        return 2
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    print(f"{len(json.loads(DATA.read_text(encoding='utf-8'))['rows'])} figures in {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
