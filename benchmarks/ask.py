"""`minigpt ask` on the questions of lesson 10 about the course, with several models that read the same passages.

  python benchmarks/ask.py [--models minigpt-chat smollm2] [--limit 48]

`right`: the written answer stands in what was said, letter case and punctuation aside (`low`, `high`: 95 % by Wilson);
`own`: said in the model's own words, each of which a passage holds, and not as a sentence that was quoted instead;
`own_right`: of those, how many are right; `refused`: of the questions that the course does not answer, how many were not
answered. `wins` and `losses` are the questions that only this model, or only the first one, has right.
"""
from __future__ import annotations

import argparse
import json
import re

import _common as c


def words(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def evenly(rows: list, limit: int) -> list:
    n = min(limit, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--models", nargs="+", default=["minigpt-chat", "smollm2"])
    ap.add_argument("--limit", type=int, default=48, help="questions, two thirds of which the course answers")
    a = ap.parse_args()
    c.project()
    import torch
    from minigpt.engine.answers import ModelReader
    from minigpt.engine.files import ASSETS
    from minigpt.evaluation import wilson
    from minigpt.rag import RAG
    torch.set_num_threads(c.threads())
    with open(ASSETS / "rag" / "questions.jsonl", encoding="utf-8") as lines:
        asked = [json.loads(line) for line in lines]
    known = evenly([row for row in asked if row["answer"] is not None], a.limit * 2 // 3)
    foreign = evenly([row for row in asked if row["answer"] is None], a.limit - len(known))
    rows, first = [], None
    for name in a.models:
        rag = RAG(None, ModelReader(name))
        start = c.clock()
        said = [rag.ask(row["question"]) for row in known]
        seconds = (c.clock() - start) / len(said)
        right = [words(row["answer"]).strip() in words(answer.text) for row, answer in zip(known, said)]
        own = [answer.found and not answer.quoted for answer in said]
        first = right if first is None else first
        share = wilson(sum(right), len(right))
        rows.append({"model": name, "n": len(right), "right": share.value, "low": share.low, "high": share.high,
                     "own": sum(own), "own_right": sum(o and r for o, r in zip(own, right)),
                     "wins": sum(r and not f for r, f in zip(right, first)),
                     "losses": sum(f and not r for r, f in zip(right, first)),
                     "refused": f"{sum(not rag.ask(row['question']).found for row in foreign)} of {len(foreign)}",
                     "seconds": seconds})
    c.report("ask", rows, list(rows[0]))


if __name__ == "__main__":
    main()
