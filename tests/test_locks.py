"""engine/locks: real processes with one output; a lock of a dead process is none."""
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minigpt.engine import locks
from minigpt.engine.files import write_text
from minigpt.engine.locks import locked, locked_folder

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


@POSIX
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no locks here")
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    write_text(tmp_path / "a", "text")
    assert names(tmp_path) == ["a"]


@POSIX
def test_a_lock_file_of_somebody_else_is_no_obstacle(tmp_path, monkeypatch):
    """It may not be opened for writing; reading is enough for a lock. A folder that may not be written is told so."""
    opened = os.open

    def mine_alone(path, flags, *mode):
        if str(path).endswith(".lock") and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *mode)
    monkeypatch.setattr(os, "open", mine_alone)
    (tmp_path / ".a.lock").touch(mode=0o444)
    with locked(tmp_path / "a"):
        pass
    with pytest.raises(PermissionError) as error, locked(tmp_path / "b"):
        pass
    assert error.value.filename == str(tmp_path / "b")


def test_a_folder_is_held_and_an_empty_one_goes_again(tmp_path):
    run = tmp_path / "runs" / "a"
    with pytest.raises(ZeroDivisionError), locked_folder(run):
        assert run.is_dir()
        1 / 0
    assert not run.exists()
    with locked_folder(run):
        (run / "log").touch()
        with locked_folder(run), locked(run):      # the same thread
            pass
        assert names(run) == [".a.lock", "log"]
    assert names(run) == ["log"]
    with pytest.raises(FileExistsError, match="log is a file: give a folder"), locked_folder(run / "log"):
        pass
