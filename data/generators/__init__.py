"""Generators of training conversations: each module has `rows(seed, n)`, see README.md of the folder above.

Licence: MIT, as the project; everything was written for it.
"""
from __future__ import annotations

from typing import Callable, Iterator

from . import context, facts, limits, recall, sums, talk, tasks

Row = tuple[str, list[str]]
KINDS: dict[str, Callable[[int, int], Iterator[Row]]] = {
    "context": context.rows, "recall": recall.rows, "sums": sums.rows, "limits": limits.rows, "task": tasks.rows,
    "talk": talk.rows, "fact": facts.rows}
