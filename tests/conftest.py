"""Fixtures for all tests: the exactness ledger, and the built distributions."""
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # with -n 2, each on its own core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that tests start inherit it, and get Ctrl-C


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run each notebook: also lessons of more than half a minute, the "
                     "deeper ones and those of the engine whose stamps say that their outputs come from this very code")


def pytest_collection_modifyitems(items):
    """What is long first, the runs of notebooks and the site: as the last file it would keep one of two processes alone."""
    items.sort(key=lambda item: "runs_and_saved" not in item.name and "test_site" not in item.nodeid)


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


@pytest.fixture(scope="module")
def one_thread():
    """torch on one thread for the tests of a module that ask for it."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """(sdist, wheel): built once a session from a copy of the sources, the wheel from the sdist; nothing is fetched."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "setup.py", "settings.ini", "constraints.txt", "MANIFEST.in", "README.md", "LICENSE",
                 "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, copy)
    (copy / "tests").mkdir()
    shutil.copy(__file__, copy / "tests" / "test_not_packed.py")
    shutil.copytree(ROOT / "minigpt", copy / "minigpt", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy], check=True,
                   stdout=subprocess.DEVNULL)
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def wheel(distributions):
    return distributions[1]


@pytest.fixture(scope="session")
def web_build(tmp_path_factory):
    """A copy of web/ with its packages installed as the lockfile says; skips where npm or its registry can't be had."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    copy = tmp_path_factory.mktemp("web") / "web"
    shutil.copytree(ROOT / "web", copy, ignore=shutil.ignore_patterns("node_modules"))
    try:
        done = subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--prefer-offline"], cwd=copy, timeout=300,
                              capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        pytest.skip("npm's registry did not answer in five minutes")
    if done.returncode:
        network = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ECONNRESET", "ENETUNREACH")
        if any(code in done.stderr for code in network):
            pytest.skip("npm's registry can't be reached")
        pytest.fail(f"npm ci: {done.stderr[-2000:]}")
    return copy
