"""nbs/benchmarks.md from benchmarks/results/*.json: ratios against peers, with machine, versions, date and spread.

    python benchmarks/run_all.py [--only NAME ...]     measures (see there)
    python tools/benchmark_page.py                     writes the page

A ratio says how many times as fast minigpt is as the peer, in the same run on the same machine: over 1 it is faster,
under 1 slower. The spread is the widest that the rounds allow: slowest of ours with fastest of theirs, and the reverse.
"""
from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "nbs" / "benchmarks.md"


@dataclass(frozen=True)
class Metric:
    """A measured column, with the columns of its spread; lower: seconds, where less is better."""

    name: str
    value: str
    low: str = "min"
    high: str = "max"
    lower: bool = False


@dataclass(frozen=True)
class Spec:
    """How a benchmark's rows are compared: rows alike in `group` are, by what stands in `who`."""

    title: str
    text: str
    group: tuple[str, ...]
    who: tuple[str, ...]
    metrics: tuple[Metric, ...]
    chapter: str


SPEED = (Metric("tokens/s", "tok_s"),)
SPECS = {
    "bpe_train": Spec("Training a tokenizer", "The same documents, from text to a trained vocabulary.", ("text", "vocab"),
                      ("trainer",), (Metric("seconds", "s", lower=True),), "00_bpe"),
    "bpe_encode": Spec("Encoding text", "GPT-2's vocabulary, the same documents, caches warm; lists of ids, or arrays where "
                       "the name says numpy.", ("text", "threads"), ("encoder",), (Metric("MB/s", "warm_mb_s"),), "00_bpe"),
    "pack": Spec("Packing a data set", "From a text file to a token file, against the bare tokenizer on texts in memory; it "
                 "does more, so 1 cannot be reached.", ("processes",), ("what",), (Metric("seconds", "seconds", lower=True),),
                 "01_data"),
    "attention": Spec("Attention", "Forward and backward.", ("case",), ("engine",),
                      (Metric("milliseconds", "ms", lower=True),), "02_attention"),
    "train_step": Spec("A training step", "Forward, backward and AdamW on the CPU, the same batch and optimizer.",
                       ("config", "dtype", "pass"), ("model",), SPEED, "04_training"),
    "train_step_forward": Spec("A forward pass", "The forward pass and its loss alone.", ("config", "dtype", "pass"),
                               ("model",), SPEED, "03_gpt2"),
    "train_loop": Spec("The training loop", "`train` with data, log, clipping and checks, against the bare step on one batch: "
                       "what the loop itself costs.", ("config", "dtype"), (), (Metric("loop / bare step", "ratio"),),
                       "04_training"),
    "generate": Spec("Writing", "128 tokens after a prompt of 32, greedy, on the CPU.", ("config", "batch"), ("engine",),
                     SPEED, "05_generation"),
    "speculative": Spec("Speculative decoding", "The shipped model with drafts, against itself without one.",
                        ("draft", "guesses"), (), (Metric("times plain decoding", "vs_plain", "", ""),), "05_generation"),
    "lora_step": Spec("A LoRA step", "Rank 8 on all matrices of the blocks, against full fine-tuning and peft.",
                      ("config", "dtype"), ("engine", "method"), SPEED, "08_lora"),
    "retrieval": Spec("Keyword search", "BM25 over 10,000 passages; all engines get the same lists of words. The row minigpt "
                      "weighs words as rank_bm25 does and finds its best passage for every query; the other weighs them as bm25s does, "
                      "which is what an Index uses, and agrees with rank_bm25 in 92.5 % of the queries, as bm25s does.", (), ("engine",),
                      (Metric("indexing, seconds", "index_s", "index_min", "index_max", True),
                       Metric("a query, ms", "query_ms", "query_min", "query_max", True)), "09_rag"),
    "serve": Spec("Serving", "The server with several clients at once, against one client.", ("clients",), (),
                  (Metric("times the tokens of one client", "speedup", "", ""),), "11_server"),
    "gpu_train": Spec("Training on one graphics card", "GPT-2 small in bfloat16.", (), ("model",), SPEED, "04_training"),
}
SPECS |= {f"{name}_small": replace(SPECS[name], title=f"{SPECS[name].title}, GPT-2 small")
          for name in ("train_step", "generate", "lora_step")}


@dataclass(frozen=True)
class Ratio:
    """minigpt against a peer: how many times as fast, and the ends of the spread (None where none was measured)."""

    bench: str
    case: str
    metric: str
    ours: str
    theirs: str
    our_value: float
    their_value: float
    ratio: float
    low: float | None
    high: float | None


def named(row: dict, columns: tuple[str, ...]) -> str:
    return ", ".join(f"{c} {row[c]}" if isinstance(row[c], int) else str(row[c]) for c in columns)


def is_ours(name: str) -> bool:
    return name.startswith("minigpt") or name in ("pack", "ours", "SDPA")


def comparable(ours: str, theirs: str) -> bool:
    """Whether two rows of a group are a fair pair: not a sketch of the harness, and alike in what the name says (arrays
    with arrays, beams with beams, int8 with int8; the decoder on live weights is a step of the course, not a result)."""
    alike = all((word in ours) == (word in theirs) for word in ("numpy", "4 beams", "int8", "LoRA"))
    return alike and not is_ours(theirs) and "sketch" not in theirs and "live weights" not in ours


def ratio_of(bench: str, spec: Spec, metric: Metric, ours: dict, theirs: dict) -> Ratio:
    def ends(row: dict) -> tuple[float, float]:
        return row.get(metric.low) or row[metric.value], row.get(metric.high) or row[metric.value]
    a, b = ours[metric.value], theirs[metric.value]
    (a_low, a_high), (b_low, b_high) = ends(ours), ends(theirs)
    ratio, low, high = (b / a, b_low / a_high, b_high / a_low) if metric.lower else (a / b, a_low / b_high, a_high / b_low)
    return Ratio(bench, named(ours, spec.group), metric.name, named(ours, spec.who), named(theirs, spec.who), a, b,
                 ratio, low, high)


def ratios(bench: str, rows: list[dict]) -> list[Ratio]:
    """All fair pairs of a benchmark."""
    spec, found = SPECS[bench], []
    for row in rows:
        for metric in spec.metrics:
            if not spec.who:                       # the row is a ratio already
                if row.get("draft") == "none" or row.get("clients") == 1:
                    continue
                low, high = row.get(metric.low), row.get(metric.high)
                found.append(Ratio(bench, named(row, spec.group), metric.name, "minigpt", "", row[metric.value], 1.0,
                                   row[metric.value], low, high))
                continue
            ours = named(row, spec.who)
            if not is_ours(ours):
                continue
            for other in rows:
                same = all(other[c] == row[c] for c in spec.group)
                if same and comparable(ours, named(other, spec.who)) and other.get(metric.value) and row.get(metric.value):
                    found.append(ratio_of(bench, spec, metric, row, other))
    return found


def results(folder: Path = RESULTS) -> dict[str, dict]:
    """The kept results by name, in the order of SPECS."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}
    return {name: found[name] for name in SPECS if name in found}


# ------------------------------------------------------------------ the page

def figure(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def spread(r: Ratio) -> str:
    return "-" if r.low is None or r.high is None else f"{r.low:.2f} to {r.high:.2f}"


def bench_table(found: list[Ratio]) -> str:
    if all(not r.theirs for r in found):
        lines = ["| case | ratio | spread |", "|---|---|---|"]
        lines += [f"| {r.case} | **{r.ratio:.2f}** | {spread(r)} |" for r in found]
    else:
        lines = ["| case | ours | peer | our figure | the peer's | ratio | spread |", "|---|---|---|---|---|---|---|"]
        lines += [f"| {r.case or '-'}: {r.metric} | {r.ours} | {r.theirs} | {figure(r.our_value)} | {figure(r.their_value)} | "
                  f"**{r.ratio:.2f}** | {spread(r)} |" for r in found]
    return "\n".join(lines)


def versions(machine: dict) -> str:
    """Versions of what was measured, in one line."""
    known = {k: v for k, v in machine.items() if re.match(r"\d", str(v)) and k not in
             ("cores", "threads", "load1", "kernel", "python")}
    return ", ".join(f"{k} {v}" for k, v in known.items())


def machine_line(kept: dict) -> str:
    m, result = kept["result"].get("machine", {}), kept["result"]
    parts = [kept["date"], result.get("gpu") or m.get("cpu", ""), f"{m['threads']} thread{'s' * (m['threads'] != 1)}" if "threads" in m else "",
             f"load before {m['load1']}" if m.get("load1") is not None else "", f"Python {m.get('python', '')}".strip()]
    return ", ".join(p for p in parts if p)


def page(kept: dict[str, dict]) -> str:
    parts = ['---\ntitle: "Benchmarks"\ndescription: "How fast it is, against whom, and where it loses"\n---',
             "Every script in `benchmarks/` runs the same work through minigpt and its peers, in turns, in one run on one "
             "machine. Only the **ratio** carries over to other machines: how many times as fast minigpt is as the peer, "
             "over 1 faster, under 1 slower. Like is paired with like: beams with beams, int8 with int8, LoRA with LoRA; "
             "rows that are a step of the course (live weights) are in the files alone. The spread pairs the slowest round of one with the fastest of the other. The "
             "page is made by `tools/benchmark_page.py` from what the scripts have written."]
    every = {name: ratios(name, one["result"]["rows"]) for name, one in kept.items()}
    lost = sorted((r for found in every.values() for r in found if r.ratio < 1 and r.theirs), key=lambda r: r.ratio)
    if lost:
        lines = ["| what | case | minigpt | peer | ratio |", "|---|---|---|---|---|"]
        lines += [f"| {SPECS[r.bench].title} | {r.case or '-'}: {r.metric} | {r.ours} | {r.theirs} | {r.ratio:.2f} |" for r in lost]
        parts += ["## Where minigpt loses", "\n".join(lines)]
    elif kept:
        parts += ["## Where minigpt loses", "In none of the comparisons below."]
    for name, one in kept.items():
        spec = SPECS[name]
        parts += [f"## {spec.title}", f"{spec.text} Chapter [{spec.chapter[:2]}]({spec.chapter}.ipynb).",
                  bench_table(every[name]), f"`{one['command']}`: {machine_line(one)}. {versions(one['result'].get('machine', {}))}"]
    missing = [SPECS[name].title for name in SPECS if name not in kept]
    if missing:
        parts += ["## Not measured here", f"No results are kept for: {'; '.join(missing)}. "
                  "`python benchmarks/run_all.py --list` names the scripts and what they need."]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    found = results(folder)
    PAGE.write_text(page(found), encoding="utf-8", newline="\n")
    print(f"{len(found)} benchmarks in {PAGE.relative_to(ROOT)}")
