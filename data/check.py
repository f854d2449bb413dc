"""No question of the bundled evaluation sets in generated data: exact copies, and near ones. Licence: MIT.

    python data/check.py FILE [FILE ...] [--held held.jsonl]

FILE holds a conversation a line, `[kind, [user, assistant, ...]]` or `{"messages": [...]}`, plain or packed (.xz).
For each evaluation set it prints how many conversations collide with it, with an example; the exit status is 1 if any
does. Two rules:

- A *question* (of questions, goals, cloze, pairs and rag, and everyday's of one turn) collides with a conversation if
  one of its turns is the same text, small letters and marks apart, or holds at least 80 % of the question's word
  5-grams.
- A *conversation* (of held.jsonl, everyday's of several turns) collides if the user's side is the same, or holds at
  least 80 % of its 5-grams and is at most twice as long: there, single turns such as "Thank you!" are everybody's.
"""
from __future__ import annotations

import argparse
import json
import lzma
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, TextIO

ASSETS = Path(__file__).resolve().parent.parent / "minigpt" / "assets"
GRAM = 5                                          # words
SHARE = 0.8                                       # of an evaluation text's 5-grams
TOKEN = re.compile(r"[^\W_]+|[+\-*/=]")


@dataclass(frozen=True)
class Item:
    """One text of an evaluation set. whole: it is a conversation's user side, not a single turn."""

    source: str
    text: str
    whole: bool


def words(text: str) -> list[str]:
    """The words, numbers and signs of sums of a text, in small letters."""
    return TOKEN.findall(text.lower())


def grams(parts: list[str]) -> set[str]:
    """The word 5-grams of a text."""
    return {" ".join(parts[at:at + GRAM]) for at in range(len(parts) - GRAM + 1)}


def user_texts(turns: list) -> list[str]:
    """The user's messages of a conversation: messages with roles, or texts in turn beginning with the user's."""
    if turns and isinstance(turns[0], dict):
        return [turn["content"] for turn in turns if turn["role"] == "user"]
    return list(turns[::2])


def item_texts(row: dict, turns_alternate: bool = False) -> Iterator[tuple[str, bool]]:
    """(text, whole) of a row of an evaluation set, by the fields it has.

    turns_alternate: `turns` holds the assistant's messages too, as plain texts; otherwise plain texts are the user's.
    """
    if "messages" in row:
        yield " ".join(user_texts(row["messages"])), True
    elif "turns" in row:
        turns = row["turns"]
        plain = bool(turns) and isinstance(turns[0], str) and not turns_alternate
        said = turns if plain else user_texts(turns)
        yield " ".join(said), len(said) > 1
    elif "question" in row:
        yield row["question"], False
    elif "goal" in row:
        yield from ((f"{row['goal']} {row[side]}", False) for side in ("sol1", "sol2"))
    elif "sentence_good" in row:
        yield from ((row[side], False) for side in ("sentence_good", "sentence_bad"))
    elif "text" in row:
        yield row["text"], False
    else:
        raise ValueError(f"no text in {sorted(row)}")


def read_items(path: Path) -> list[Item]:
    """The texts of one evaluation set."""
    name = path.stem if path.parent.name != "rag" else "rag"
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    rows = [{"turns": row[1]} if isinstance(row, list) else row for row in rows]
    alternate = name.startswith("held")
    items = [Item(name, text, whole) for row in rows for text, whole in item_texts(row, alternate)]
    return [Item(item.source, item.text, True) for item in items] if alternate else items


def bundled_sets() -> list[Path]:
    """The evaluation sets of the package."""
    others = [ASSETS / "data" / "held.jsonl", ASSETS / "rag" / "questions.jsonl"]
    return [*sorted((ASSETS / "eval").glob("*.jsonl")), *others]


class Guard:
    """Finds the evaluation text that a conversation copies. items: what must not be copied."""

    def __init__(self, items: Iterable[Item]):
        self.items = list(items)
        self.exact: dict[tuple[bool, str], int] = {}
        self.sizes: list[int] = []                # number of 5-grams of each item
        self.lengths: list[int] = []              # number of words of each item
        self.where: dict[tuple[bool, str], list[int]] = {}
        for number, item in enumerate(self.items):
            parts = words(item.text)
            self.exact.setdefault((item.whole, " ".join(parts)), number)
            found = grams(parts)
            self.sizes.append(len(found))
            self.lengths.append(len(parts))
            for gram in found:
                self.where.setdefault((item.whole, gram), []).append(number)

    @classmethod
    def bundled(cls, *more: Path) -> "Guard":
        """For the evaluation sets of the package, and further files such as the whole held-out set."""
        return cls(item for path in [*bundled_sets(), *more] for item in read_items(path))

    def copied(self, turns: list[str] | list[dict]) -> Item | None:
        """The evaluation text that a conversation copies, or None. turns: as user_texts takes them."""
        texts = [turn["content"] if isinstance(turn, dict) else turn for turn in turns]
        for text, whole in [(" ".join(user_texts(turns)), True), *((text, False) for text in texts)]:
            number = self._copied(words(text), whole)
            if number is not None:
                return self.items[number]
        return None

    def _copied(self, parts: list[str], whole: bool) -> int | None:
        """The number of the item that a text, or with `whole` a user's side, copies."""
        number = self.exact.get((whole, " ".join(parts)))
        if number is not None and parts:
            return number
        hits: Counter = Counter()
        for gram in grams(parts):
            hits.update(self.where.get((whole, gram), ()))
        for number, count in hits.items():
            if count >= SHARE * self.sizes[number] and (not whole or len(parts) <= 2 * self.lengths[number]):
                return number
        return None


def open_text(path: Path, mode: str = "r") -> TextIO:
    """A text file, packed if its name ends with .xz."""
    opener = lzma.open if path.suffix == ".xz" else open
    return opener(path, mode + "t", encoding="utf-8")


def read_conversations(path: Path) -> Iterator[list]:
    """The turns of each conversation of a file: texts in turn, or messages with roles."""
    with open_text(path) as file:
        for line in file:
            row = json.loads(line)
            yield row["messages"] if isinstance(row, dict) else row[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="conversations, .jsonl or .jsonl.xz")
    parser.add_argument("--held", type=Path, help="a further held-out set, such as held.jsonl of the data folder")
    args = parser.parse_args()
    guard = Guard.bundled(*([args.held] if args.held else []))
    print("evaluation texts:", dict(Counter(item.source for item in guard.items)))
    found = False
    for path in args.files:
        copies: Counter = Counter()
        examples: dict[str, str] = {}
        total = 0
        for turns in read_conversations(path):
            total += 1
            item = guard.copied(turns)
            if item:
                copies[item.source] += 1
                examples.setdefault(item.source, item.text[:80])
        print(f"{path}: {total:,} conversations, {sum(copies.values()):,} copy an evaluation text")
        for source, count in copies.most_common():
            print(f"    {source}: {count:,}, for example {examples[source]!r}")
        found = found or bool(copies)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
