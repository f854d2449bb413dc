"""Does a question of the bundled everyday evaluation stand in training data?

    python benchmarks/eval_copies.py FILE ... [--threshold 0.6] [--show 0.5]

FILE: conversations in any layout that `load_chats` reads; one that is not there is skipped, and said so. Prints each row
whose closest text reaches --show; exits with 1 if one reaches --threshold. As its last line, one JSON object.

The question of a row is all that its user says, as one text. It is held against every run of user turns of each
conversation. Overlap: pieces of five characters that both have / that one of them has (Jaccard), without case and
punctuation; 1 is an exact copy. Characters, since questions are short: with one other word in the middle of seven there
are no five words in a row left.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minigpt.engine.dataset_readers import load_chats  # noqa: E402
from minigpt.engine.everyday import load_everyday, split_turns  # noqa: E402


def pieces(text: str) -> set[str]:
    text = " ".join(["", *re.findall(r"\w+", text.lower()), ""])
    return {text[n:n + 5] for n in range(max(1, len(text) - 4))}


def question(row: dict) -> str:
    """What the user says in a row of `load_everyday`."""
    return "\n".join(m["content"] for part in split_turns(row["turns"]) for m in part if m["role"] == "user")


def near_copies(rows: Iterable[dict], texts: Iterable[str], threshold: float = 0.6) -> Iterator[tuple[str, str, float]]:
    """(id of a row, text, overlap) of all texts that overlap with a row's question by `threshold` or more."""
    rows = list(rows)
    own = [pieces(question(row)) for row in rows]
    index: dict[str, list[int]] = {}
    for n, found in enumerate(own):
        for piece in found:
            index.setdefault(piece, []).append(n)
    for text in texts:
        found = pieces(text)
        common = Counter(n for piece in found for n in index.get(piece, ()))
        for n, both in common.items():
            overlap = both / (len(own[n]) + len(found) - both)
            if overlap >= threshold:
                yield rows[n]["id"], text, overlap


def user_texts(chats: Iterable[dict], seen: set[int]) -> Iterator[str]:
    """Every run of user turns of conversations, each once; `seen` grows."""
    for chat in chats:
        said = [m["content"] for m in chat["messages"] if m["role"] == "user"]
        for first in range(len(said)):
            for end in range(first + 1, len(said) + 1):
                text = "\n".join(said[first:end])
                if hash(text) not in seen:
                    seen.add(hash(text))
                    yield text


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--threshold", type=float, default=0.6)
    parser.add_argument("--show", type=float, default=0.5)
    args = parser.parse_args()
    rows, seen, read = load_everyday(), set(), []
    closest: dict[str, tuple[float, str]] = {}
    for path in args.files:
        if not path.exists():
            print(f"skipped: {path} is not there")
            continue
        read.append(path.name)
        texts = user_texts(load_chats(path, streaming=True), seen)
        for name, text, overlap in near_copies(rows, texts, min(args.show, args.threshold)):
            closest[name] = max(closest.get(name, (0.0, "")), (overlap, text))
    asked = {row["id"]: question(row) for row in rows}
    for name, (overlap, text) in sorted(closest.items(), key=lambda item: -item[1][0]):
        print(f"{overlap:.2f} {name}: {asked[name][-100:]!r} <- {text[-100:]!r}")
    copies = sorted(name for name, (overlap, _) in closest.items() if overlap >= args.threshold)
    print(json.dumps({"files": read, "texts": len(seen), "questions": len(rows), "threshold": args.threshold,
                      "copies": copies}))
    return int(bool(copies))


if __name__ == "__main__":
    sys.exit(main())
