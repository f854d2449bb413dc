"""engine/console: what a terminal is shown."""
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from minigpt.engine.console import error_of, explain, is_for_user, parse_settings, printable, run_program
from minigpt.engine.parallel import ordered_map


def test_control_characters_are_left_out():
    assert printable("a\x1b[2J\x07b\x9b1mc\r\x00d\x7f\n\te 😀 é") == "a[2Jb1mcd\n\te 😀 é"


def test_an_error_is_one_line():
    assert explain(ValueError("a\n   b\x1b[0m")) == "a b[0m"
    assert explain(FileNotFoundError(2, "No such file", "x\x1b.json")) == "x.json: No such file"
    assert explain(OSError("plain")) == "plain" and explain(KeyError()) == "KeyError"


def raised(call, *args) -> BaseException:
    with pytest.raises(BaseException) as found:
        call(*args)
    return found.value


def raised_in(module: str, line: str) -> BaseException:
    """What a line of a module of that name raises."""
    return raised(lambda: exec(f"def run():\n    {line}\nrun()", {"__name__": module}))


@pytest.mark.parametrize("kind", ["ValueError", "TypeError", "RuntimeError", "FloatingPointError", "ImportError"])
def test_what_minigpt_raises_on_purpose_is_for_the_user(kind):
    assert is_for_user(raised_in("minigpt.data", f"raise {kind}('a bad value')"))
    assert is_for_user(raised_in("minigpt.engine.files", f"raise {kind}('a bad value') from None"))


@pytest.mark.parametrize("module, line", [
    ("torch.nn", "raise ValueError('deep inside')"), ("torch.nn", "raise RuntimeError('shapes')"),
    ("minigptother.x", "raise ValueError('of somebody else')"), ("minigpt.data", "int('seven')"),
    ("minigpt.data", "a, b = [1]"), ("minigpt.data", "None + 1"), ("minigpt.data", "{}['key']"), ("minigpt.data", "None.name"),
    ("minigpt.data", "1 / 0"), ("minigpt.data", "assert False, 'never'"), ("minigpt.data", "raise NotImplementedError"),
    ("minigpt.data", "from minigpt.data import nothing"), ("minigpt.data", "import minigpt.nothing")])
def test_bugs_are_no_errors_for_the_user(module, line):
    assert not is_for_user(raised_in(module, line))


@pytest.mark.parametrize("line", ["open('nowhere/file')", "raise MemoryError", "import nobody_has_this", "raise ConnectionError('x')",
                                  "raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory')"])
def test_what_the_machine_says_is_for_the_user_wherever_it_is_said(line):
    assert is_for_user(raised_in("minigpt.data", line)) and is_for_user(raised_in("torch.nn", line))


def test_of_an_error_in_a_worker_process_only_the_kind_is_known():
    assert is_for_user(raised(lambda: list(ordered_map(int, ["7", "x"], 2))))
    assert not is_for_user(raised(lambda: list(ordered_map(int, ["7", None], 2))))


def test_a_program_ends_with_a_code(capsys):
    def user_error():
        exec("raise ValueError('x=3: not\\nthis \x1b[0m')", {"__name__": "minigpt.data"})

    def interrupted():
        raise KeyboardInterrupt
    assert run_program(lambda: None) == 0 and run_program(lambda: 7) == 7 and run_program(interrupted) == 130
    assert capsys.readouterr().err == ""
    assert run_program(user_error) == 2
    assert capsys.readouterr().err == "minigpt: x=3: not this [0m\n"
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="x=3"):
        patch.setenv("MINIGPT_DEBUG", "1")
        run_program(user_error)


def test_a_warning_is_one_line(capsys):
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run_program(lambda: warnings.warn("two\nlines")) == 0
    assert capsys.readouterr().err == "minigpt: warning: two lines\n" and warnings.showwarning is before


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes the streams")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_read_as_empty_and_take_all(closed, tmp_path):
    code = ("import sys; from minigpt.engine.console import run_program\n"
            "sys.exit(run_program(lambda: print(sys.stdin.read(), flush=True) or print(1, file=sys.stderr) or 5))")
    (tmp_path / "a.py").write_text(code)
    done = subprocess.run(["sh", "-c", f"'{sys.executable}' a.py {closed}"], cwd=tmp_path, stdin=subprocess.DEVNULL,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}, capture_output=True)
    assert done.returncode == 5 and b"Traceback" not in done.stderr


def test_an_error_is_shown_with_its_kind():
    assert error_of(int, "x", base=10) == "ValueError: invalid literal for int() with base 10: 'x'"
    with pytest.raises(AssertionError, match="should have raised"):
        error_of(int, "7")
    with pytest.raises(KeyboardInterrupt):
        error_of(lambda: (_ for _ in ()).throw(KeyboardInterrupt))


@pytest.mark.parametrize("text, value", [
    ("true", True), ("True", True), ("false", False), ("False", False), ("null", None), ("None", None),
    ("3e-4", 0.0003), ("[1, 2]", [1, 2]), ("wsd", "wsd"), ("", ""), ("a=b", "a=b"), ("[" * 100_000, "[" * 100_000)])
def test_settings_are_json_or_words(text, value):
    found = parse_settings([f"name={text}", "last=1"])
    assert found == {"name": value, "last": 1} and type(found["name"]) is type(value)


@pytest.mark.parametrize("pair", ["lr", "=3", ""])
def test_a_setting_has_a_name_and_a_value(pair):
    with pytest.raises(ValueError, match="must be name=value"):
        parse_settings([pair])
