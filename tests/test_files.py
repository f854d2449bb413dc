"""engine/files: nothing is ever half or lost, two writers are told apart, and errors name the user's file."""
import bz2
import errno
import gzip
import json
import lzma
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.engine import files
from minigpt.engine.files import (atomic_file, atomic_folder, decode_text, open_text, parse_json, read_json,
                                  read_text, reading, refuse_existing, refuse_same, refuse_unwritable,
                                  write_files, write_text)

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX files")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def run_python(code: str, *args) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ------------------------------------------------------------------ reading

@pytest.mark.parametrize("data, line, byte", [(b"caf\xe9", "", "e9"), (b"a\r\nb\xff\n", ", line 2", "ff"),
                                              (b"\xef\xbb\xbfa\n\n\xc3", ", line 3", "c3"), (b"\xed\xa0\x80", "", "ed")])
def test_bytes_that_are_no_utf8_are_named(tmp_path, data, line, byte):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_text(path)
    assert str(error.value).startswith(f"{path}{line} is not UTF-8 (byte 0x{byte}): save it as UTF-8 first")
    with open_text(path) as file, pytest.raises(UnicodeDecodeError):
        file.read()
    with pytest.raises(ValueError, match=f"a.txt is not UTF-8 .byte 0x{byte}."), open_text(path) as file:
        file.read()


def test_windows_text_is_recognised():
    with pytest.raises(ValueError, match="the pipe is not UTF-8 .byte 0xff.*iconv -f utf-16"):
        decode_text("hi".encode("utf-16"), "the pipe")


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress),
                                          (".bz2", bz2.compress)])
def test_text_is_read_packed_or_not(tmp_path, suffix, pack):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack("\ufeffcafé\r\n😀\n".encode()))
    with open_text(path) as file:
        assert list(file) == ["café\n", "😀\n"]
    with open_text(path, exact=True) as file:
        assert file.read() == "\ufeffcafé\r\n😀\n"
    if suffix:
        path.write_bytes(pack(b"a" * 10_000)[:-9])
        with pytest.raises(ValueError, match=f"a.txt{suffix} is damaged or cut short"), open_text(path) as file:
            file.read()


def test_an_error_of_the_disk_is_not_called_damage(tmp_path, monkeypatch):
    def broken(path, *args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")
    (tmp_path / "a.gz").write_bytes(b"no packed file")
    with pytest.raises(ValueError, match="damaged"), open_text(tmp_path / "a.gz") as file:
        file.read()
    monkeypatch.setitem(files.OPENERS, ".gz", broken)
    with pytest.raises(OSError, match="Input/output error"), open_text(tmp_path / "a.gz"):
        pass


def test_a_file_that_holds_something_else_is_named():
    for broken, kind in (({}, "KeyError: 'weight_map'"), ({"weight_map": 7}, "TypeError"), ("x", "TypeError")):
        with pytest.raises(ValueError, match=f"^index.json does not hold what it should .{kind}"), reading("index.json"):
            broken["weight_map"]["a"]
    with pytest.raises(ValueError, match="^index.json: bad shape$"), reading("index.json"):
        raise ValueError("bad shape")
    with pytest.raises(ValueError, match="^line 3 of index.json$"), reading("index.json"):
        raise ValueError("line 3 of index.json")
    with pytest.raises(ZeroDivisionError), reading("index.json"):
        1 / 0


def test_what_is_no_file_is_not_read(tmp_path):
    for read in (read_text, read_json, lambda path: open_text(path).__enter__()):
        with pytest.raises(FileNotFoundError, match="no such file: .*nowhere"):
            read(tmp_path / "nowhere")
        with pytest.raises(IsADirectoryError, match="is a folder"):
            read(tmp_path)
        if os.name != "nt":
            with pytest.raises(OSError, match="/dev/zero is no regular file"):
                read("/dev/zero")


@pytest.mark.parametrize("text, match", [
    ("", "line 1: not valid JSON"), ('{"a": 1,\n "b" 2}', "line 2: not valid JSON .Expecting ':' delimiter, column 6"),
    ("[" * 100_000, "line 1: not valid JSON .nested too deeply"), ('{"a":' * 100_000, "nested too deeply"),
    ("9" * 5000, "not valid JSON .*4300 digits")])
def test_broken_json_names_file_and_line(tmp_path, text, match):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"config.json, {match}" if "line" in match else match) as error:
        read_json(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 250 + len(str(path))


def test_a_row_of_json_lines_is_counted_from_its_line():
    assert parse_json('{"a": [1.5, null]}', "x", 7) == {"a": [1.5, None]}
    with pytest.raises(ValueError, match="x.jsonl, line 8: "):
        parse_json('{"a":\n}', "x.jsonl", 7)


def test_json_of_another_kind(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff[1, {"b": "é"}]', encoding="utf-8")
    assert read_json(path) == read_json(path, list) == [1, {"b": "é"}]
    with pytest.raises(ValueError, match="a.json must hold a JSON object, this is a list"):
        read_json(path, dict)


# ------------------------------------------------------------- before writing

def test_what_exists_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "a"
    refuse_existing(path, False)
    path.mkdir()
    refuse_existing(path, True)
    with pytest.raises(FileExistsError, match="a exists: choose another place, or replace it with --overwrite"):
        refuse_existing(path, False)
    with pytest.raises(FileExistsError, match="with overwrite=True"):
        refuse_existing(path, False, "overwrite=True")


@POSIX
def test_source_and_target_may_not_be_one(tmp_path):
    source, link, hard = tmp_path / "a", tmp_path / "link", tmp_path / "hard"
    source.write_text("mine")
    link.symlink_to(source)
    os.link(source, hard)
    for target in (source, link, hard, tmp_path / "x" / ".." / "a"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="is also what is read"):
            refuse_same(source, target)
    refuse_same(source, tmp_path / "b")
    refuse_same("owner/dataset-of-the-hub", source)


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path, monkeypatch):
    refuse_unwritable(tmp_path)
    refuse_unwritable(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    refuse_unwritable("run")
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match="file is a file: give a folder"):
            refuse_unwritable(path)
    if sys.platform.startswith("linux"):
        with pytest.raises(OSError) as error:
            refuse_unwritable("/proc/run")
        assert error.value.filename == "/proc/run"


# ---------------------------------------------------------------------- files

def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_file(path) as aside:
            aside.write_text("half")
            assert not path.exists() and aside.parent == tmp_path
            raise error
        assert names(tmp_path) == []
    write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n" and names(tmp_path) == ["a.txt"]
    with pytest.raises(FileExistsError, match="a.txt exists.*overwrite=True"):
        write_text(path, "new")
    with pytest.raises(ZeroDivisionError), atomic_file(path, overwrite=True) as aside:
        aside.write_text("half")
        1 / 0
    assert path.read_bytes() == b"\xc3\xa9\n"
    write_text(path, "new", overwrite=True)
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(FileExistsError, match="a exists"), atomic_file(path) as aside:
        aside.write_text("ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and names(tmp_path) == ["a"]


def test_several_files_are_replaced_when_all_are_written(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "f"
    write_files(folder, {"a": "é", "b": "\n"})
    write_files(folder, {"a": "é", "b": "\n"})      # the same again is fine
    for texts in ({"b": "new", "a": "new"}, {"c": "new", "a": "new"}):
        with pytest.raises(FileExistsError, match="a exists|b exists"):
            write_files(folder, texts)
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: 1 / 0 if data == b"bad" else write(self, data))
    with pytest.raises(ZeroDivisionError):
        write_files(folder, {"a": "new", "b": "bad"}, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"a": b"\xc3\xa9", "b": b"\n"}
    write_files(folder, {"a": "new", "c": "new"}, overwrite=True)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"a": "new", "b": "\n", "c": "new"}


@POSIX
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes(tmp_path, umask):
    """A new file has the mode of any new file, also if what writes it makes another; an old one's mode is kept."""
    def write(aside: Path) -> None:
        own = aside.with_name("own")
        own.touch(mode=0o600)
        os.replace(own, aside)                     # as safetensors does

    old = os.umask(umask)
    try:
        path = tmp_path / "a"
        with atomic_file(path) as aside:
            write(aside)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        for mode in (0o640, 0o444, 0o600):
            path.chmod(mode)
            with atomic_file(path, overwrite=True) as aside:
                assert stat.S_IMODE(aside.stat().st_mode) == mode | 0o600
                write(aside)
            assert stat.S_IMODE(path.stat().st_mode) == mode
        for text in ("new", "again"):
            with atomic_folder(tmp_path / "f", overwrite=True) as folder:
                write(folder / "a")
                (folder / "b").write_text(text)
            assert stat.S_IMODE((tmp_path / "f" / "a").stat().st_mode) == 0o666 & ~umask
            assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o777 & ~umask
            assert stat.S_IMODE((tmp_path / "f" / "b").stat().st_mode) == (
                0o666 & ~umask if text == "new" else 0o640)
            (tmp_path / "f" / "b").chmod(0o640)
    finally:
        os.umask(old)


@POSIX
def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a", tmp_path / "link"
    link.symlink_to(target)
    write_text(link, "new")                        # the target is not there yet
    write_text(link, "newer", overwrite=True)
    assert link.is_symlink() and target.read_text() == "newer" and names(tmp_path / "real") == ["a"]
    folder = tmp_path / "folder"
    folder.symlink_to(tmp_path / "real")
    with atomic_folder(folder, overwrite=True) as aside:
        (aside / "b").touch()
    assert folder.is_symlink() and names(tmp_path / "real") == ["a", "b"]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="loop"):
        write_text(loop, "x", overwrite=True)


@POSIX
def test_devices_pipes_and_folders_are_refused(tmp_path, monkeypatch):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link, Path("/dev/null")):
        with pytest.raises(OSError, match=f"{path} is no regular file but a device or a pipe"):
            write_text(path, "x", overwrite=True)
    with pytest.raises(IsADirectoryError, match="is a folder: give a file"):
        write_text(tmp_path, "x", overwrite=True)
    with pytest.raises(FileExistsError, match="pipe is a file: give a folder"), atomic_folder(pipe):
        pass
    with pytest.raises(FileNotFoundError, match="nowhere.*create it first"):
        write_text(tmp_path / "nowhere" / "a", "x")
    monkeypatch.chdir(tmp_path)
    Path("old").touch()
    for write in (lambda: write_text("old", "x"), lambda: write_files(".", {"old": "x"})):
        with pytest.raises(FileExistsError, match="^old exists"):   # as it was given
            write()
    Path("old").unlink()
    assert stat.S_ISFIFO(pipe.stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert names(tmp_path) == ["link", "pipe"]


@POSIX
def test_results_that_come_one_by_one_can_be_kept(tmp_path):
    path = tmp_path / "a.txt"
    for number in ("", "2"):
        with pytest.raises(KeyboardInterrupt), atomic_file(path, keep=True) as aside:
            aside.write_text(f"first{number}")
            raise KeyboardInterrupt
        assert (tmp_path / f"a.txt.part{number}").read_text() == f"first{number}"
    with pytest.raises(ZeroDivisionError), atomic_file(path, keep=True):
        1 / 0                                      # nothing was written: nothing is left
    path.write_text("old")
    path.chmod(0o600)
    with atomic_file(path, keep=True, overwrite=True) as aside:
        assert stat.S_IMODE(aside.stat().st_mode) == 0o600
        aside.write_text("all")
    assert path.read_text() == "all" and names(tmp_path) == ["a.txt", "a.txt.part", "a.txt.part2"]


# ---------------------------------------------------------------------- disks

@POSIX
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_names_the_target(tmp_path, kind):
    """No file of the process may grow over 5 kB: text, plain bytes, and safetensors with its own kind of error."""
    path = tmp_path / "out"
    code = """
import resource, sys
import numpy as np
from minigpt.engine.files import atomic_file, atomic_folder
from safetensors.numpy import save_file
kind, path = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
for write in (lambda p: p.write_text("x" * 10_000), lambda p: open(p, "ab").write(b"x" * 10_000),
              lambda p: save_file({"a": np.zeros(10_000)}, p)):
    try:
        with (atomic_file if kind == "file" else atomic_folder)(path, overwrite=True) as aside:
            write(aside if kind == "file" else aside / "w.safetensors")
            print("written")
    except OSError as error:
        print(error.errno, error.filename)
"""
    if kind == "file":
        path.write_text("old")
    out, err = run_python(code, kind, path).communicate(timeout=120)
    assert out.splitlines() == [f"{errno.EFBIG} {path}"] * 3, (out, err)
    assert names(tmp_path) == (["out"] if kind == "file" else [])
    assert kind == "folder" or path.read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not sys.platform.startswith("linux"),
                    reason="only root mounts")
def test_a_disk_that_is_really_full(tmp_path):
    numpy, save = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy").save_file
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        with pytest.raises(OSError) as error:
            write_text(disk / "a.txt", "x" * 200_000)
        assert error.value.errno == errno.ENOSPC and error.value.filename == str(disk / "a.txt")
        with pytest.raises(OSError) as error, atomic_folder(disk / "model") as aside:
            (aside / "config.json").write_text("{}")
            save({"a": numpy.zeros(100_000)}, aside / "model.safetensors")
        assert error.value.errno == errno.ENOSPC and error.value.filename == str(disk / "model")
        assert names(disk) == []
        write_text(disk / "a.txt", "x" * 1000)     # there is room again: nothing was left
    finally:
        subprocess.run(["umount", disk], check=True)


def test_other_errors_pass_as_they_are(tmp_path):
    for error in (FileNotFoundError(2, "No such file", "elsewhere"), ConnectionError("no network"), KeyError("x"),
                  OSError(errno.EIO, "Input/output error")):
        with pytest.raises(type(error)) as seen, atomic_file(tmp_path / "a"):
            raise error
        assert seen.value is error
    with pytest.raises(FileNotFoundError) as seen, atomic_folder(tmp_path / "f") as aside:
        (aside / "sub" / "b").write_text("x")
    assert seen.value.filename == str(tmp_path / "f" / "sub" / "b")
    assert names(tmp_path) == []


@POSIX
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_fails_before_the_work(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="out"), atomic_file(tmp_path / "out"):
        raise AssertionError("the work began")


# -------------------------------------------------------------------- folders

def test_a_folder_appears_whole_and_keeps_what_is_not_replaced(tmp_path):
    folder = tmp_path / "deep" / "model"
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as aside:
        (aside / "a").write_text("half")
        1 / 0
    assert names(tmp_path / "deep") == []
    with atomic_folder(folder) as aside:
        (aside / "a").write_text("old")
        (aside / "inner").mkdir()
        (aside / "inner" / "b").write_text("deep")
        assert not folder.exists()
    (folder / "notes").write_text("mine")
    with pytest.raises(ZeroDivisionError), atomic_folder(folder, overwrite=True) as aside:
        (aside / "a").write_text("half")
        1 / 0
    assert names(folder) == ["a", "inner", "notes"] and (folder / "a").read_text() == "old"
    with pytest.raises(FileExistsError, match="a exists.*overwrite=True"), atomic_folder(folder) as aside:
        (aside / "a").write_text("new")
        (aside / "c").write_text("new")
    assert names(folder) == ["a", "inner", "notes"] and (folder / "a").read_text() == "old"
    with atomic_folder(folder) as aside:
        (aside / "c").write_text("new")
    with atomic_folder(folder, overwrite=True) as aside:
        (aside / "a").write_text("new")
    assert [(folder / name).read_text() for name in "ac"] == ["new", "new"]
    assert names(folder) == ["a", "c", "inner", "notes"] and names(tmp_path / "deep") == ["model"]


@pytest.mark.parametrize("error", [PermissionError, KeyboardInterrupt])
def test_a_move_that_fails_puts_all_back(tmp_path, monkeypatch, error):
    """Each move in turn fails: every time all is as before, and without a failure all is new."""
    folder, move, moves = tmp_path / "model", os.replace, []
    for name in ("a.json", "b.safetensors"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("old")

    def failing(source, target):
        moves.append(str(target))
        if len(moves) == at:
            raise error("in use")
        move(source, target)
    monkeypatch.setattr(os, "replace", failing)
    for at in range(1, 20):
        moves.clear()
        try:
            with atomic_folder(folder, overwrite=True) as aside:
                for name in ("a.json", "b.safetensors", "c.json"):
                    (aside / name).write_text("new")
            break
        except error:
            assert {p.name: p.read_text() for p in folder.iterdir()} == {"a.json": "old", "b.safetensors": "old"}
    assert at == 6 and moves[-1].endswith("b.safetensors") and {p.read_text() for p in folder.iterdir()} == {"new"}
    assert names(folder) == ["a.json", "b.safetensors", "c.json"]


@pytest.mark.parametrize("data", [{"a": 1}, json.loads("[" * 50 + "]" * 50)])
def test_json_comes_back(tmp_path, data):
    write_text(tmp_path / "a.json", json.dumps(data))
    assert read_json(tmp_path / "a.json") == data
