"""Read the tables beside this folder. Licence: MIT, as the project.

Two layouts, both plain text: a line that begins with # is a comment, an indented line goes on with the one before.

A table has a head with the names of its columns; a row is a line, or several short rows share a line:

    [animals] animal | class | sound
    cow | mammal | moos
    [opposites] word | other
    hot | cold ; big | small ; tall | short

Blocks have a name, settings, and labelled lists of wordings:

    [hello place=open]
    you: Hello! | hello | <Hi/Hey> there
        | Good day!
    bot: Hello! What would you like to talk about?
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "tables"
HEAD = re.compile(r"\[([^\]]+)\]\s*(.*)")
LABEL = re.compile(r"(\w+):(?:\s+|$)(.*)")


@dataclass
class Block:
    """A named group of wordings, such as one intent: `block["you"]` is the list behind `you:`."""

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)

    def __getitem__(self, label: str) -> list[str]:
        if label not in self.lists:
            raise KeyError(f"[{self.name}] has no '{label}:', only {', '.join(self.lists)}")
        return self.lists[label]

    def get(self, label: str) -> list[str]:
        """The wordings behind a label, or an empty list."""
        return self.lists.get(label, [])


def content_lines(name: str) -> list[str]:
    """The lines of tables/NAME.txt without comments and blank lines, indented lines joined to the one before."""
    lines: list[str] = []
    for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith(" "):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.rstrip())
    return lines


def split_list(text: str, mark: str = "|") -> list[str]:
    """The parts of a text between marks, stripped; empty parts are left out."""
    return [part.strip() for part in text.split(mark) if part.strip()]


@lru_cache(maxsize=None)
def read_tables(name: str) -> dict[str, list[dict[str, str]]]:
    """All tables of a file: name of the table -> rows, each a dict by column."""
    tables: dict[str, list[dict[str, str]]] = {}
    columns: list[str] = []
    for line in content_lines(name):
        head = HEAD.match(line)
        if head:
            columns = split_list(head[2])
            rows = tables.setdefault(head[1], [])
            continue
        for entry in split_list(line, ";"):
            cells = [cell.strip() for cell in entry.split("|")]
            if len(cells) != len(columns):
                raise ValueError(f"{name}.txt: '{entry}' has {len(cells)} cells, its table has {len(columns)} columns")
            rows.append(dict(zip(columns, cells)))
    return tables


@lru_cache(maxsize=None)
def read_blocks(name: str) -> dict[str, Block]:
    """All blocks of a file by name, in the file's order."""
    blocks: dict[str, Block] = {}
    for line in content_lines(name):
        head, labelled = HEAD.match(line), LABEL.match(line)
        if head:
            title, *settings = head[1].split()
            if title in blocks:
                raise ValueError(f"{name}.txt: [{title}] stands there twice")
            block = blocks[title] = Block(title, dict(setting.split("=") for setting in settings))
        elif labelled:
            block.lists.setdefault(labelled[1], []).extend(split_list(labelled[2]))
        else:
            raise ValueError(f"{name}.txt: '{line[:60]}' is neither a head nor 'label: wordings'")
    return blocks
