"""engine/locks: real processes with one output; a lock of a dead process is none."""
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minigpt.engine import locks
from minigpt.engine.files import write_text
from minigpt.engine.locks import locked

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX files")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def run_python(code: str, *args) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


WRITE = """
import sys
from minigpt.engine.files import atomic_file, atomic_folder
path, kind, text = sys.argv[1:]
try:
    with (atomic_file if kind == "file" else atomic_folder)(path) as aside:
        print("began", flush=True)
        sys.stdin.readline()
        (aside if kind == "file" else aside / "a").write_text(text)
    print("wrote")
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_of_two_processes_one_writes(tmp_path, kind):
    path = tmp_path / "out"
    first = run_python(WRITE, path, kind, "first")
    assert first.stdout.readline() == "began\n"
    second = run_python(WRITE, path, kind, "second")
    out, err = second.communicate("\n", timeout=60)
    assert out.startswith(f"BlockingIOError {path} is being written by another process"), (out, err)
    assert "wrote" in first.communicate("\n", timeout=60)[0]
    third = run_python(WRITE, path, kind, "third").communicate("\n", timeout=60)[0]
    assert "FileExistsError" in third and "wrote" not in third
    assert (path if kind == "file" else path / "a").read_text() == "first" and names(tmp_path) == ["out"]


def test_many_processes_at_once_one_writes(tmp_path):
    """Without turns: whoever comes later is refused, as the file is being written or is there."""
    path = tmp_path / "out"
    writers = [run_python(WRITE, path, "file", str(n)) for n in range(6)]
    told = [writer.communicate("\n", timeout=120)[0].split("\n") for writer in writers]
    wrote = [n for n, lines in enumerate(told) if "wrote" in lines]
    assert len(wrote) == 1 and path.read_text() == str(wrote[0]) and names(tmp_path) == ["out"]


@POSIX
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_leaves_stands_in_nobodys_way(tmp_path, kind):
    path = tmp_path / "out"
    first = run_python(WRITE, path, kind, "first")
    assert first.stdout.readline() == "began\n"
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert len(names(tmp_path)) == 2               # a lock and a part
    assert "wrote" in run_python(WRITE, path, kind, "second").communicate("\n", timeout=60)[0]
    assert names(tmp_path) == ["out"]


def test_a_lock_is_the_threads_own(tmp_path):
    path, seen = tmp_path / "run", []

    def other() -> None:
        try:
            with locked(path):
                seen.append("both")
        except BlockingIOError as error:
            seen.append(str(error))
    with locked(path), locked(tmp_path / "." / "run"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        write_text(path, "within")                 # the same thread goes on
    assert len(seen) == 1 and f"{path} is being written" in seen[0]
    with locked(path):
        pass
    assert names(tmp_path) == ["run"]


def test_a_lock_file_that_was_removed_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking, its owner ends and removes it: the lock of the file that is gone does not count."""
    path, tries, lock = tmp_path / "out", [], locks._try_lock

    def late(handle: int) -> bool:
        tries.append(handle)
        if len(tries) == 1 and os.name != "nt":
            (tmp_path / ".out.lock").unlink()
        return lock(handle)
    monkeypatch.setattr(locks, "_try_lock", late)
    with locked(path):
        assert (tmp_path / ".out.lock").exists()
    assert len(tries) == (2 if os.name != "nt" else 1)
