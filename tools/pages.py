"""The two pages that are made of measurements: nbs/exactness.md and nbs/benchmarks.md.

    python tools/pages.py            both anew, from nbs/exactness.json and benchmarks/results/*.json
    python tools/pages.py LEDGER     first take over the figures of MINIGPT_LEDGER=LEDGER python -m pytest, if it passed

A test notes a figure of exactness with the fixture `ledger` (tests/conftest.py): a name, the measured value, the peer,
the bound. The benchmarks are measured by benchmarks/run_all.py; a ratio says how many times as fast minigpt is as the
peer, in the same run on the same machine.
"""
import itertools
import json
import platform
import re
import sys
from collections import namedtuple
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, RESULTS = ROOT / "nbs", ROOT / "benchmarks" / "results"
FIGURES = NBS / "exactness.json"


def table(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def figure(x) -> str:
    """A number as the pages show it; whole ones as they are."""
    if not isinstance(x, float) or x == int(x):
        return f"{int(x):,}" if isinstance(x, (int, float)) else str(x)
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def plain(text: str) -> str:
    """Text whose signs mean nothing to Markdown."""
    return re.sub(r"([\\|*_\[\]<>$`])", r"\\\1", text)


# What is promised -> the tests that prove it (file::function, a regular expression), and its notebook.
PROMISES = json.loads((ROOT / "tests" / "promises.json").read_text(encoding="utf-8"))


def ledger_tests() -> set[str]:
    """Every test that takes the fixture `ledger`, as file::function."""
    return {f"{path.name}::{name}" for path in (ROOT / "tests").glob("test_*.py")
            for name in re.findall(r"def (test_\w+)\([^)]*\bledger\b", path.read_text(encoding="utf-8"))}


def at_least(row: dict) -> bool:
    """Whether the bound is a lower one: the test has passed, so a figure over its bound was meant to be."""
    return row["value"] > row["bound"]


def read_ledger(path: Path) -> list[dict]:
    """The figures of a ledger: for each name and peer the worst, with its test."""
    worst: dict[tuple, tuple] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["test"] = Path(row["test"].partition("[")[0]).as_posix().removeprefix("tests/")
        badness = -row["value"] if at_least(row) else row["value"]
        key = row["name"], row["peer"]
        if key not in worst or badness > worst[key][0]:
            worst[key] = badness, row
    return [row for _, row in worst.values()]


def take_over(ledger: Path) -> None:
    """Put a ledger's figures in the place of those that the same tests had noted; those of tests that are gone go."""
    fresh, known = read_ledger(ledger), json.loads(FIGURES.read_text(encoding="utf-8"))["rows"]
    gone = {row["test"] for row in fresh} | {row["test"] for row in known} - ledger_tests()
    rows = fresh + [row for row in known if row["test"] not in gone]
    rows.sort(key=lambda row: (row["test"], row["name"], row["peer"]))
    data = {"date": date.today().isoformat(), "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}", "rows": rows}
    FIGURES.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8", newline="\n")


def peer(row: dict) -> str:
    return plain(f"{row['peer']} {row['version']}".strip() or "a slow version of its own")


def proofs(rows: list[dict], tests: str) -> list[dict]:
    return [row for row in rows if re.search(tests, row["test"])]


def promise(text: str, tests: str, notebook: str, rows: list[dict]) -> list:
    """A row of the table of promises: with the worst figure under each bound, as rounding differs between dtypes."""
    found = proofs(rows, tests)
    worst = {bound: max(row["value"] for row in found if row["bound"] == bound)
             for bound in sorted({row["bound"] for row in found})}
    names = "".join(dict.fromkeys(f"<br>`{row['test'].rpartition('::')[2]}`" for row in found))
    peers = ", ".join(dict.fromkeys(map(peer, found)))
    return [f"{text} ([{notebook}]({notebook}.ipynb)){names}", peers, len(found),
            ", ".join(f"{figure(value)} (bound {figure(bound)})" for bound, value in worst.items())]


def exactness() -> str:
    data = json.loads(FIGURES.read_text(encoding="utf-8"))
    parts = [f"Measured on {data['date']} with Python {data['python']} on {data['system']}, on the CPU.",
             table(["promise", "compared with", "figures", "largest difference"],
                   [promise(text, *how, data["rows"]) for text, how in PROMISES.items()]), "## Every figure"]
    for file, found in itertools.groupby(data["rows"], lambda row: row["test"].partition("::")[0]):
        rows = [[f"{plain(row['name'])}<br>`{row['test'].partition('::')[2]}`", peer(row), figure(row["value"]),
                 "at least " * at_least(row) + figure(row["bound"])] for row in found]
        parts += [f"### {file}", table(["what is compared", "with", "measured", "bound"], rows)]
    return "\n\n".join(parts)


SPECS = json.loads((ROOT / "benchmarks" / "benchmarks.json").read_text(encoding="utf-8"))  # explained in run_all.py
OURS = ("minigpt", "pack", "ours", "SDPA")      # how the names of our own rows begin
Ratio = namedtuple("Ratio", "case ours theirs our_figure their_figure ratio low high")  # low, high: of the spread


def named(row: dict, columns: list[str]) -> str:
    return ", ".join(f"{c} {row[c]}" if isinstance(row[c], int) else str(row[c]) for c in columns)


def comparable(ours: str, theirs: str) -> bool:
    """Whether two rows of a group are a fair pair: not a sketch of the harness, and alike in what the name says (beams
    with beams, int8 with int8)."""
    alike = all((word in ours) == (word in theirs) for word in ("numpy", "4 beams", "int8", "LoRA"))
    named_so = ours.startswith(OURS) and not theirs.startswith(OURS)
    return named_so and alike and "sketch" not in theirs


def speeds(row: dict, metric: dict) -> tuple[float, float, float]:
    """The slowest, the middle and the fastest round, in a unit where more is faster."""
    middle = row[metric["column"]]
    low, high = (row.get(column) or middle for column in metric.get("spread", ("min", "max")))
    return (1 / high, 1 / middle, 1 / low) if metric.get("less") else (low, middle, high)


def ratios(bench: str, rows: list[dict]) -> list[Ratio]:
    """All fair pairs of a benchmark; none where its rows are shown as they are."""
    spec, found = SPECS[bench], []
    for row, metric, other in itertools.product(rows, spec.get("metrics", ()), rows):
        ours, theirs, case = named(row, spec["who"]), named(other, spec["who"]), named(row, spec["group"])
        figures = row.get(metric["column"]), other.get(metric["column"])
        if named(other, spec["group"]) == case and comparable(ours, theirs) and all(figures):
            a, b = speeds(row, metric), speeds(other, metric)
            found.append(Ratio(f"{case or '-'}: {metric['label']}", ours, theirs, *figures,
                               a[1] / b[1], a[0] / b[2], a[2] / b[0]))
    return found


def measured_on(kept: dict) -> str:
    """Date, machine and versions of a result, in one line."""
    m = kept["result"].get("machine", {})
    versions = [f"{k} {v}" for k, v in m.items() if k not in ("cpu", "cores", "kernel") and re.match(r"\d", str(v))]
    return ", ".join([kept["date"], kept["result"].get("gpu") or m.get("cpu", ""), *versions])


def bench_table(spec: dict, rows: list[dict], pairs: list[Ratio]) -> str:
    if not spec.get("who"):
        return table(spec["columns"], [[figure(row[c]) for c in spec["columns"]] for row in rows])
    return table(["case", "ours", "peer", "our figure", "the peer's", "ratio", "spread"], [
        [*r[:3], figure(r[3]), figure(r[4]), f"**{r.ratio:.2f}**", f"{r.low:.2f} to {r.high:.2f}"] for r in pairs])


def benchmarks(kept: dict[str, dict]) -> str:
    """The page; kept: the results by name."""
    pairs = {name: ratios(name, one["result"]["rows"]) for name, one in kept.items()}
    lost = [[SPECS[name]["title"], *r[:3], f"{r.ratio:.2f}"] for name in pairs for r in pairs[name] if r.ratio < 1]
    parts = [table(["what", "case", "minigpt", "peer", "ratio"], sorted(lost, key=lambda row: row[-1]))]
    for name, one in kept.items():
        spec = SPECS[name]
        parts += [f"## {spec['title']}", f"{spec['text']} Notebook [{spec['notebook']}]({spec['notebook']}.ipynb).",
                  bench_table(spec, one["result"]["rows"], pairs[name]), f"`{one['command']}`: {measured_on(one)}"]
    if missing := [spec["title"] for name, spec in SPECS.items() if name not in kept]:
        parts += ["## Not measured here", f"No results are kept for: {'; '.join(missing)}. "
                  "`python benchmarks/run_all.py --list` names the scripts and what they need."]
    return "\n\n".join(parts)


def pages() -> dict[Path, str]:
    """The pages: their texts down to the first heading are written by hand, the rest is made here."""
    kept = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in SPECS
            if (RESULTS / f"{name}.json").exists()}
    made = {NBS / "exactness.md": exactness(), NBS / "benchmarks.md": benchmarks(kept)}
    return {path: re.match(r"(?s).*?\n## .*?\n", path.read_text(encoding="utf-8"))[0] + f"\n{body}\n"
            for path, body in made.items()}


if __name__ == "__main__":
    for ledger in sys.argv[1:]:
        take_over(Path(ledger))
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8", newline="\n")
