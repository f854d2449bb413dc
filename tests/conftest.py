"""Fixtures for all tests: the exactness ledger."""
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def ledger(request):
    """`ledger(name, value, peer=..., bound=...)` notes a measured figure of exactness.

    With MINIGPT_LEDGER set to a file, one json line a figure is appended to it.
    """
    def note(name: str, value: float | int | str, *, peer: str = "", bound: float | int | str = "") -> None:
        target = os.environ.get("MINIGPT_LEDGER")
        if not target:
            return
        try:
            peer_version = version(peer) if peer else ""
        except PackageNotFoundError:
            peer_version = ""
        row = {"name": name, "value": value, "bound": bound, "peer": peer, "version": peer_version,
               "test": request.node.nodeid}
        with open(target, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return note
