"""engine/console: what a terminal is shown."""
import pytest

from minigpt.engine.console import USER_ERRORS, error_of, explain, parse_settings, printable


def test_control_characters_are_left_out():
    assert printable("a\x1b[2J\x07b\x9b1mc\r\x00d\x7f\n\te 😀 é") == "a[2Jb1mcd\n\te 😀 é"


def test_an_error_is_one_line():
    assert explain(ValueError("a\n   b\x1b[0m")) == "a b[0m"
    assert explain(FileNotFoundError(2, "No such file", "x\x1b.json")) == "x.json: No such file"
    assert explain(OSError("plain")) == "plain" and explain(KeyError()) == "KeyError"


def test_bugs_are_no_errors_for_the_user():
    for bug in (TypeError, KeyError, AttributeError, ZeroDivisionError, AssertionError, RuntimeError, RecursionError):
        assert not issubclass(bug, USER_ERRORS)
    for meant in (ValueError, FileNotFoundError, PermissionError, ModuleNotFoundError, MemoryError, ConnectionError):
        assert issubclass(meant, USER_ERRORS)


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
