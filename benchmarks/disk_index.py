"""An index of 100,000 passages on disk: how long it takes to build, to open, and to look a question up (wall clock).

  python benchmarks/disk_index.py [--passages 100000] [--questions 100]
  (once before: python benchmarks/prepare_text.py)

Passages are paragraphs of 20 words of text-20mb.txt, in ten files; a question is 6 words of one. `RAG.look_up` is what
stands before a reader: the confidence and the three best passages. The index is opened in a process of its own, which
has not seen it before (the system's cache has); `first_ms` is its first question.
"""
from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import _common as c


def write_files(folder: Path, n: int) -> list[list[str]]:
    """Ten files with n paragraphs; their words."""
    words = c.load_text("text-20mb.txt").split()
    rows = [words[i:i + 20] for i in range(0, 20 * n, 20)]
    if not rows[-1]:
        raise SystemExit(f"{n} passages of 20 words are more than the text has: {len(words)} words")
    for part in range(10):
        text = "\n\n".join(" ".join(row) for row in rows[part::10])
        (folder / f"{part}.txt").write_text(text, encoding="utf-8")
    return rows


def build(folder: str, to: str) -> float:
    from minigpt import Index
    start = time.perf_counter()
    Index.build(folder, to, size=200, overlap=0)
    return time.perf_counter() - start


def ask(to: str, questions: list[str]) -> dict:
    from minigpt import Index
    from minigpt.rag import RAG
    marks = [time.perf_counter()]
    rag = RAG(Index.open(to), lambda prompt: None)
    marks.append(time.perf_counter())
    for question in questions:
        rag.look_up(question)
        marks.append(time.perf_counter())
    took = [b - a for a, b in zip(marks, marks[1:])]
    return {"passages": len(rag.index), "open_s": took[0], "first_ms": 1e3 * took[1],
            "ms": 1e3 * sorted(took[2:])[len(took[2:]) // 2], "most_ms": 1e3 * max(took[2:])}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--passages", type=int, default=100_000)
    ap.add_argument("--questions", type=int, default=100)
    a = ap.parse_args()
    c.project()
    with tempfile.TemporaryDirectory() as home:
        texts, to = Path(home, "texts"), Path(home, "index")
        texts.mkdir()
        rows, rng = write_files(texts, a.passages), random.Random(0)
        asked = [" ".join(rng.sample(rng.choice(rows), 6)) for _ in range(a.questions + 1)]
        seconds, reason = c.in_subprocess(build, str(texts), str(to), timeout_s=600)
        found, reason = c.in_subprocess(ask, str(to), asked, timeout_s=300) if seconds else (None, reason)
        if found is None:
            raise SystemExit(reason)
        row = {"passages": found.pop("passages"), "file_mb": sum(p.stat().st_size for p in to.iterdir()) / 2**20,
               "build_s": seconds, **found}
    c.report("disk_index", [row], list(row))


if __name__ == "__main__":
    main()
