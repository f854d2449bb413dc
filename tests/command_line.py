"""The command line within this process: main() with arguments and input, and what it wrote."""
import io
import sys
from unittest import mock

import pytest

from minigpt.engine import cli


def text_stream(data: bytes = b"") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def minigpt(*arguments, given: bytes = b"", code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of `minigpt ...`, which has to end with `code`. A bug is raised."""
    out, err = text_stream(), text_stream()
    with mock.patch.multiple(sys, argv=["minigpt", *map(str, arguments)], stdin=text_stream(given), stdout=out, stderr=err), \
            pytest.raises(SystemExit) as left:
        cli.main()
    for stream in (out, err):
        stream.flush()
    said = tuple(stream.buffer.getvalue().decode("utf-8").replace("\r\n", "\n") for stream in (out, err))
    assert (left.value.code or 0) == code, said
    return said


def one_line(*arguments, given: bytes = b"") -> str:
    """The only line of a command that ends with an error of the user's: on standard error, with code 2."""
    out, err = minigpt(*arguments, given=given, code=2)
    assert out == "" and err.startswith("minigpt: ") and err.count("\n") == 1, out + err
    return err
