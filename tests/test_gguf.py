"""GGUF files against the package `gguf` of llama.cpp's authors, both ways, and files that lie."""
import struct
import tracemalloc

import numpy as np
import pytest

from minigpt.engine.gguf import GGUF, dequantize, quantize, write_gguf

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
META = {"general.architecture": "llama", "a.int": 7, "a.minus": -3, "a.float": 0.5, "a.yes": True, "a.no": False,
        "a.text": "naïve\n", "a.words": ["x", "", "Ġy"], "a.ints": [3, 1, -2], "a.floats": [0.5, 2.0],
        "a.bytes": np.arange(3, dtype=np.uint8), "a.big": 2**40}


@pytest.fixture(scope="module")
def rows():
    found = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    found[1, :32], found[2, :32], found[3, 5] = 0.0, 1.5, 40.0  # a block of zeros, of one number, one that stands out
    return found


@pytest.fixture
def file(tmp_path, rows):
    path = tmp_path / "a.gguf"
    write_gguf(path, META, {kind: (rows, kind) for kind in KINDS} | {"line": (rows[0], "F32")})
    return path


# ------------------------------------------------------------------ against the other package

@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_the_gguf_package(rows, kind):
    quants = pytest.importorskip("gguf.quants", reason="pip install gguf")
    from gguf import GGMLQuantizationType
    theirs = quants.quantize(rows, GGMLQuantizationType[kind])
    ours = quantize(rows, kind)
    assert ours.tobytes() == theirs.tobytes()
    np.testing.assert_array_equal(dequantize(ours, kind).reshape(rows.shape),
                                  quants.dequantize(theirs, GGMLQuantizationType[kind]))


def test_the_gguf_package_reads_what_we_write(file, rows):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    read = gguf.GGUFReader(file)
    for name, value in META.items():
        found = read.fields[name].contents()
        assert found == (value.tolist() if isinstance(value, np.ndarray) else value), name
    for tensor in read.tensors:
        kind = "F32" if tensor.name == "line" else tensor.name
        values = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        want = rows[0] if tensor.name == "line" else rows
        np.testing.assert_array_equal(values.reshape(want.shape), dequantize(quantize(want, kind), kind).reshape(want.shape))


def test_we_read_what_the_gguf_package_writes(tmp_path, rows):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint32("a.int", 7)
    writer.add_string("a.text", "naïve")
    writer.add_array("a.words", ["x", "Ġy"])
    writer.add_bool("a.yes", True)
    writer.add_float32("a.float", 0.5)
    for kind in KINDS:
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, gguf.quants.quantize(rows, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GGUF(tmp_path / "b.gguf")
    assert {name: read.metadata[name] for name in ("a.int", "a.text", "a.words", "a.yes", "a.float")} == {
        "a.int": 7, "a.text": "naïve", "a.words": ["x", "Ġy"], "a.yes": True, "a.float": 0.5}
    for kind in KINDS:
        np.testing.assert_array_equal(read.tensor(kind), dequantize(quantize(rows, kind), kind).reshape(rows.shape))


# ------------------------------------------------------------------ by itself

def test_what_is_written_is_read_again(file, rows):
    read = GGUF(file)
    assert list(read.metadata) == list(META)
    for name, value in META.items():
        assert np.array_equal(read.metadata[name], value) and (
            isinstance(value, (list, np.ndarray)) or type(read.metadata[name]) is type(value)), name
    assert read.tensors["line"].shape == (64,) and read.tensors["Q4_0"].shape == (6, 64)
    np.testing.assert_array_equal(read.tensor("F32"), rows)
    for kind, most in (("F16", 0.02), ("BF16", 0.2), ("Q8_0", 0.2), ("Q4_0", 3), ("Q4_1", 2)):
        assert np.abs(read.tensor(kind) - rows).max() < most


def test_a_block_by_hand():
    x = np.arange(32, dtype=np.float32)
    data = quantize(x, "Q4_1")
    d, m = struct.unpack("<ee", data[:4].tobytes())
    assert (round(d, 3), m) == (2.066, 0.0)       # 31 / 15 as a 16-bit number
    steps = [int(v * 15 / 31 + 0.5) for v in range(32)]
    assert [b & 15 for b in data[4:]] == steps[:16] and [b >> 4 for b in data[4:]] == steps[16:]
    np.testing.assert_allclose(dequantize(data, "Q4_1"), np.array(steps) * d, rtol=1e-6)


def test_nothing_is_replaced_unasked(file):
    before = file.read_bytes()
    with pytest.raises(FileExistsError):
        write_gguf(file, {}, {})
    assert file.read_bytes() == before
    write_gguf(file, {}, {}, overwrite=True)
    assert not GGUF(file).tensors


@pytest.mark.parametrize("values, kind", [
    (np.zeros((2, 33), np.float32), "Q8_0"), (np.zeros(32, np.float32), "Q4_K"), (np.full(32, np.nan, np.float32), "F32")])
def test_what_can_not_be_written(tmp_path, values, kind):
    with pytest.raises(ValueError):
        write_gguf(tmp_path / "c.gguf", {}, {"x": (values, kind)})
    assert not list(tmp_path.iterdir())


def test_metadata_that_can_not_be_written(tmp_path):
    with pytest.raises(ValueError, match="can't stand"):
        write_gguf(tmp_path / "c.gguf", {"a": [[1], [2]]}, {})


# ------------------------------------------------------------------ files that lie

def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def head(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def info(name: bytes = b"x", shape=(32,), kind: int = 0, offset: int = 0, sides: int | None = None) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape) if sides is None else sides, *shape, kind, offset)


ROOM = bytes(4096)
LIES = {
    "empty": b"", "foreign": b"PK\x03\x04" + ROOM, "short": b"GGUF\x03", "old": head(version=1) + ROOM,
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + ROOM,
    "many tensors": head(tensors=2**63) + ROOM, "many pairs": head(pairs=2**62) + ROOM,
    "more tensors than there are": head(tensors=100) + ROOM[:3300],
    "a long name": head(pairs=1) + text(b"a", 2**40) + ROOM,
    "a long text": head(pairs=1) + text(b"a") + struct.pack("<I", 8) + text(b"b", 2**50) + ROOM,
    "no text": head(pairs=1) + text(b"\xff\xfe") + struct.pack("<IB", 0, 1) + ROOM,
    "a long list": head(pairs=1) + text(b"a") + struct.pack("<IIQ", 9, 6, 2**61) + ROOM,
    "a long list of texts": head(pairs=1) + text(b"a") + struct.pack("<IIQ", 9, 8, 2**59) + ROOM,
    "lists in lists": head(pairs=1) + text(b"a") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1) + ROOM,
    "an unknown type": head(pairs=1) + text(b"a") + struct.pack("<I", 77) + ROOM,
    "a list of an unknown type": head(pairs=1) + text(b"a") + struct.pack("<IIQ", 9, 77, 1) + ROOM,
    "one name twice": head(pairs=2) + 2 * (text(b"a") + struct.pack("<IB", 0, 1)) + ROOM,
    "alignment 0": head(pairs=1) + text(b"general.alignment") + struct.pack("<II", 4, 0) + ROOM,
    "alignment huge": head(pairs=1) + text(b"general.alignment") + struct.pack("<II", 4, 2**31) + ROOM,
    "alignment a text": head(pairs=1) + text(b"general.alignment") + struct.pack("<I", 8) + text(b"x") + ROOM,
    "huge shape": head(tensors=1) + info(shape=(2**40, 2**40)) + ROOM,
    "shape of the largest numbers": head(tensors=1) + info(shape=(2**64 - 32, 2**64 - 1, 2**64 - 1, 2**64 - 1)) + ROOM,
    "a side of 0": head(tensors=1) + info(shape=(32, 0)) + ROOM,
    "no sides": head(tensors=1) + info(shape=()) + ROOM, "many sides": head(tensors=1) + info(shape=(1,) * 5) + ROOM,
    "sides that are not there": head(tensors=1) + info(sides=2**32 - 1) + ROOM,
    "half a block": head(tensors=1) + info(shape=(33,), kind=8) + ROOM,
    "Q4_K": head(tensors=1) + info(shape=(256,), kind=12) + ROOM, "unknown kind": head(tensors=1) + info(kind=999) + ROOM,
    "outside": head(tensors=1) + info(offset=2**40) + ROOM, "the end outside": head(tensors=1) + info(offset=4064) + ROOM,
    "not aligned": head(tensors=1) + info(offset=4) + ROOM,
    "shared bytes": head(tensors=2) + info(b"x") + info(b"y") + ROOM,
    "two of one name": head(tensors=2) + info(b"x") + info(b"x", offset=128) + ROOM,
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused_in_one_line_and_without_memory(tmp_path, name):
    path = tmp_path / "lie.gguf"
    path.write_bytes(LIES[name])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            GGUF(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_lies_are_told_by_their_numbers_alone(tmp_path):
    """The same heads with numbers that are true are read."""
    path = tmp_path / "true.gguf"
    path.write_bytes(head(tensors=2, pairs=1) + text(b"general.alignment") + struct.pack("<II", 4, 64)
                     + info(b"x") + info(b"y", offset=128) + ROOM)
    read = GGUF(path)
    assert read.metadata == {"general.alignment": 64} and read.tensor("y").tolist() == [0.0] * 32


@pytest.mark.parametrize("where", range(0, 700, 13))
def test_a_file_that_is_cut_or_changed_is_never_anything_but_a_value_error(file, where, tmp_path):
    whole, path = file.read_bytes(), tmp_path / "b.gguf"
    for data in (whole[:where], whole[:where] + b"\xff" * 9 + whole[where + 9:]):
        path.write_bytes(data)
        try:
            read = GGUF(path)
            for name in read.tensors:
                read.tensor(name)
        except ValueError as error:
            assert "\n" not in str(error)


def test_cut_tensors_and_numbers_that_are_none(file, tmp_path):
    whole, path = file.read_bytes(), tmp_path / "b.gguf"
    path.write_bytes(whole[:-64])
    with pytest.raises(ValueError, match="after the file"):
        GGUF(path)
    read = GGUF(file)
    start = read._start + read.tensors["Q8_0"].offset
    path.write_bytes(whole[:start] + struct.pack("<e", float("nan")) + whole[start + 2:])
    with pytest.raises(ValueError, match="Q8_0 holds NaN"):
        GGUF(path).tensor("Q8_0")


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "x.gguf", tmp_path):
        with pytest.raises(FileNotFoundError):
            GGUF(path)
