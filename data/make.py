"""Make training conversations with the generators. Licence: MIT.

    python data/make.py rows KIND [-n 20] [--seed 0]        a few rows of a kind, to look at
    python data/make.py extra FOLDER OUT.jsonl.xz           rows of all kinds but limits, for a whole training
    python data/make.py limits FOLDER OUT.jsonl.xz          rows of kind limits, for a whole training
    python data/make.py clean FILE OUT.jsonl.xz             a file such as train.jsonl.xz without evaluation questions
    python data/make.py mix FOLDER OUT.jsonl --tokens 1e7   a mix for tuning the shipped model, with ordinary rows

FOLDER holds train.jsonl.xz and held.jsonl, see README.md. extra, limits and clean write a line for each conversation,
`[kind, [user, assistant, ...]]`, as those files have it; mix writes {"messages": [...]} for `minigpt finetune`. Every
row that copies an evaluation question (check.py), that stands in train.jsonl.xz (extra, limits), or that was written
before is left out; what was left out is printed. The same command writes the same file.
"""
from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Iterable, Iterator

import check
from generators import KINDS, Row

SEEDS = {kind: 101 + number for number, kind in enumerate(KINDS)}
# rows for a whole training
EXTRA = {"context": 200_000, "recall": 120_000, "sums": 120_000, "task": 60_000, "talk": 40_000, "fact": 30_000}
LIMITS = 30_000
# a tuning mix: share of the tokens, tokens in a row (measured with the shipped tokenizer)
NEW_SHARES = {"context": (0.27, 130), "recall": (0.12, 91), "sums": (0.08, 45), "task": (0.035, 38),
              "limits": (0.04, 46), "talk": (0.025, 44), "fact": (0.01, 38)}
OLD_SHARES = {("explain", "asked", "chat", "howto"): (0.25, 87),
              ("story", "paragraph", "task"): (0.08, 105),
              ("context",): (0.05, 142),
              ("talk",): (0.01, 49),
              ("words", "word", "animal", "country", "things", "class", "fact", "yesno", "who", "order", "questions",
               "math"): (0.03, 46)}


def key_of(turns: list[str]) -> str:
    """What makes two conversations the same: their texts, small letters and marks apart."""
    return "\n".join(" ".join(check.words(turn)) or turn for turn in turns)


class Sieve:
    """Lets a conversation through once, and never one that copies an evaluation question.

    counts: how many were left out, and why.
    """

    def __init__(self, guard: check.Guard):
        self.guard = guard
        self.seen: set[int] = set()
        self.counts: Counter = Counter()

    def know(self, turns: list[str]) -> None:
        """This conversation is there already."""
        self.seen.add(hash(key_of(turns)))

    def keep(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows that are new and copy nothing."""
        for kind, turns in rows:
            mark = hash(key_of(turns))
            if mark in self.seen:
                self.counts["was there"] += 1
            elif item := self.guard.copied(turns):
                self.counts[f"copies {item.source}"] += 1
            else:
                self.seen.add(mark)
                yield kind, turns

    def report(self) -> str:
        """One line of what was left out."""
        return "left out: " + (", ".join(f"{count:,} {why}" for why, count in self.counts.most_common()) or "nothing")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a data file."""
    with check.open_text(path) as file:
        for line in file:
            kind, turns = json.loads(line)
            yield kind, turns


def write_rows(path: Path, rows: Iterable[Row]) -> Counter:
    """Writes rows as a data file; returns how many of each kind."""
    kinds: Counter = Counter()
    with check.open_text(path, "w") as file:
        for kind, turns in rows:
            kinds[kind.split(":")[0]] += 1
            file.write(json.dumps([kind, turns], ensure_ascii=False) + "\n")
    return kinds


def new_rows(kind: str, count: int, sieve: Sieve, seed: int = 0) -> Iterator[Row]:
    """Rows of one kind; a few less than count where some are left out."""
    yield from sieve.keep(KINDS[kind](SEEDS[kind] + 1000 * seed, count))


def shuffled(rows: Iterable[Row], seed: int) -> list[Row]:
    """The rows in a random order that the seed decides."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


def sieve_for(folder: Path | None, known: Iterable[str] = ()) -> Sieve:
    """A sieve for the evaluation sets and the folder's held-out set.

    known: names of files in the folder whose rows are there already.
    """
    held = [folder / "held.jsonl"] if folder else []
    sieve = Sieve(check.Guard.bundled(*held))
    for name in known:
        for _, turns in read_rows(folder / name):
            sieve.know(turns)
    return sieve


def show(args: argparse.Namespace) -> None:
    """Prints some rows."""
    for kind, turns in KINDS[args.kind](args.seed, args.n):
        print(json.dumps([kind, turns], ensure_ascii=False))


def extra(args: argparse.Namespace) -> None:
    """Writes rows of all kinds but limits."""
    sieve = sieve_for(args.folder, ["train.jsonl.xz"])
    counts = {kind: int(count * args.scale) for kind, count in EXTRA.items()}
    rows = [row for kind, count in counts.items() for row in new_rows(kind, count, sieve, args.seed)]
    print(dict(write_rows(args.out, shuffled(rows, args.seed))), sieve.report(), sep="\n")


def limits(args: argparse.Namespace) -> None:
    """Writes rows of kind limits."""
    sieve = sieve_for(args.folder, ["train.jsonl.xz"])
    rows = new_rows("limits", int(LIMITS * args.scale), sieve, args.seed)
    print(dict(write_rows(args.out, shuffled(rows, args.seed))), sieve.report(), sep="\n")


def clean(args: argparse.Namespace) -> None:
    """Writes the rows of a file that copy no evaluation question."""
    sieve = sieve_for(None)
    print(dict(write_rows(args.out, sieve.keep(read_rows(args.file)))), sieve.report(), sep="\n")


def mixed_rows(folder: Path, tokens: float, seed: int, sieve: Sieve) -> list[Row]:
    """Generated rows and ordinary ones of train.jsonl.xz, as many of each as their share of the tokens says."""
    rows: list[Row] = []
    for kind, (share, size) in NEW_SHARES.items():
        rows += new_rows(kind, round(tokens * share / size), sieve, 7 + seed)
    old = shuffled(read_rows(folder / "train.jsonl.xz"), seed)
    for kinds, (share, size) in OLD_SHARES.items():
        some = (row for row in old if row[0].split(":")[0] in kinds)
        wanted = round(tokens * share / size)
        for _, row in zip(range(wanted), sieve.keep(some)):
            rows.append(row)
    return shuffled(rows, seed)


def mix(args: argparse.Namespace) -> None:
    """Writes a mix for tuning, as messages."""
    sieve = sieve_for(args.folder)
    rows = mixed_rows(args.folder, args.tokens, args.seed, sieve)
    with open(args.out, "w", encoding="utf-8") as file:
        for kind, turns in rows:
            roles = ["user", "assistant"] * (len(turns) // 2)
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns)]
            file.write(json.dumps({"messages": messages, "kind": kind}, ensure_ascii=False) + "\n")
    print(dict(Counter(kind.split(":")[0] for kind, _ in rows)), sieve.report(), sep="\n")


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("rows", help="print some rows of a kind")
    one.add_argument("kind", choices=list(KINDS))
    one.add_argument("-n", type=int, default=20, help="how many")
    one.set_defaults(run=show)
    for run, text in ((extra, "all kinds but limits"), (limits, "kind limits"), (mix, "a mix for tuning")):
        one = commands.add_parser(run.__name__, help=text)
        one.add_argument("folder", type=Path, help="holds train.jsonl.xz and held.jsonl")
        one.add_argument("out", type=Path, help="the file to write")
        one.set_defaults(run=run)
        if run is mix:
            one.add_argument("--tokens", type=float, default=1e7, help="about how many")
        else:
            one.add_argument("--scale", type=float, default=1.0, help="times as many rows")
    one = commands.add_parser("clean", help="a file without evaluation questions")
    one.add_argument("file", type=Path)
    one.add_argument("out", type=Path)
    one.set_defaults(run=clean)
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=0)
    return whole


def main() -> int:
    args = parser().parse_args()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
