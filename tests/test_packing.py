"""deeper/packing: token files, equal to the plain stream, whole or not there."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from exercise_cells import exercises, said
from minigpt.data import TokenArray, WindowSampler, token_stream
from minigpt.deeper import packing
from minigpt.deeper.packing import TokenFile, pack, tokenizer_hash
from minigpt.chat_format import ChatRenderer, Rendered
from minigpt.engine.tokenizer import Tokenizer
from small_data import chats, stories, tok  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parent.parent


def naive_stream(rows, tok, max_length=None):
    renderer, ids, mask = ChatRenderer(tok), [], []
    for row in rows:
        if isinstance(row, str):
            one = Rendered([0, *tok.encode_ordinary(row)], [1] * (1 + len(tok.encode_ordinary(row))))
        else:
            one = renderer.render(row["messages"], max_length)
            if not any(one.mask):
                continue
        ids += one.ids
        mask += one.mask
    return ids, mask


def test_pack_equals_the_naive_stream(tmp_path, tok, stories, chats):
    texts = pack(stories[:300], tmp_path / "t.bin", tok, chunk=20_000)
    assert texts.mask is None and texts.ids.dtype == np.uint16
    assert texts.ids.tolist() == naive_stream(stories[:300], tok)[0]
    assert texts.header.n_documents == 300 == (texts.ids == 0).sum()
    rows = chats[:200] + stories[:20] + chats[200:300]
    both = pack(iter(rows), tmp_path / "sub" / "c.bin", tok, masked=True, max_length=60, chunk=10_000)
    ids, mask = naive_stream(rows, tok, 60)
    assert both.ids.tolist() == ids and both.mask.tolist() == mask
    head = both.header
    assert head.n_tokens == len(ids) == len(both) and head.n_targets == sum(mask)
    assert head.n_documents + head.n_dropped == len(rows) and head.n_dropped > 0
    assert head.vocab_size == both.vocab_size == 20_000 and head.tokenizer == tokenizer_hash(tok)
    assert sorted(p.name for p in tmp_path.rglob("*.bin*")) == ["c.bin", "t.bin"]  # no parts are left


def test_file_layout_is_what_the_chapter_says(tmp_path, tok, chats):
    file = pack(chats[:50], tmp_path / "c.bin", tok, masked=True)
    raw = (tmp_path / "c.bin").read_bytes()
    head = json.loads(raw[:4096])
    n = head["n_tokens"]
    assert raw[4095:4096] == b"\n" and len(raw) == 4096 + 3 * n
    assert np.frombuffer(raw, "<u2", n, 4096).tolist() == file.ids.tolist()
    assert np.frombuffer(raw, "u1", n, 4096 + 2 * n).tolist() == file.mask.tolist()


def test_processes_give_the_same_bytes(tmp_path, tok, chats):
    pack(chats, tmp_path / "one.bin", tok, masked=True, max_length=100, chunk=30_000)
    pack(chats, tmp_path / "two.bin", tok, masked=True, max_length=100, chunk=30_000, num_proc=2)
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("*.bin*")) == ["one.bin", "two.bin"]


def test_gpt2_vocabulary_fits(tmp_path):
    gpt2 = Tokenizer.from_pretrained("gpt2")
    file = pack(["Hello world"], tmp_path / "g.bin", gpt2)
    assert file.ids.tolist() == [50256, 15496, 995] and file.vocab_size == 50257


def test_errors_of_pack(tmp_path, tok, stories, chats):
    pack(stories[:5], tmp_path / "a.bin", tok)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        pack(stories[:6], tmp_path / "a.bin", tok)
    assert TokenFile(tmp_path / "a.bin").header.n_documents == 5
    assert pack(stories[:6], tmp_path / "a.bin", tok, overwrite=True).header.n_documents == 6
    with pytest.raises(ValueError, match="the dataset is empty"):
        pack([], tmp_path / "b.bin", tok)
    with pytest.raises(ValueError, match="max_length=3 leaves room for no answer"):
        pack(chats[:9], tmp_path / "b.bin", tok, masked=True, max_length=3)
    with pytest.raises(ValueError, match="<|im_start|>"):
        pack(chats[:9], tmp_path / "b.bin", Tokenizer.from_pretrained("gpt2"), masked=True)
    with pytest.raises(TypeError, match="expected a text"):
        pack(["a", 3], tmp_path / "b.bin", tok)
    for rows in (["a", chats[0]], [chats[0], "a"]):  # whichever comes first
        with pytest.raises(ValueError, match="a chat among texts: masked=True"):
            pack(rows, tmp_path / "b.bin", tok)
    large = Tokenizer(tok.token_bytes + [b"x%d" % n for n in range(50_000)], tok.merges, tok.special_tokens)
    with pytest.raises(ValueError, match="at most 65,536"):
        pack(["a"], tmp_path / "b.bin", large)
    assert sorted(p.name for p in tmp_path.glob("*.bin*")) == ["a.bin"]


def test_errors_of_token_files(tmp_path, tok, stories):
    path = tmp_path / "a.bin"
    pack(stories[:5], path, tok)
    assert TokenFile(path, tok).ids[0] == 0
    with pytest.raises(ValueError, match="was packed with the tokenizer") as error:
        TokenFile(path, Tokenizer.from_pretrained("gpt2"))
    assert tokenizer_hash(tok) in str(error.value) and "50257" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no token file at"):
        TokenFile(tmp_path / "none.bin")
    raw = path.read_bytes()
    for bad in (raw[:-3], raw + b"\0\0", raw[:4096]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="cut short or changed"):
            TokenFile(path)
    path.write_bytes(b"not a token file")
    with pytest.raises(ValueError, match="not a token file"):
        TokenFile(path)


def test_hash_changes_with_each_part_of_a_tokenizer(tok):
    swapped = [tok.merges[1], tok.merges[0], *tok.merges[2:]]
    others = [Tokenizer(tok.token_bytes, swapped, tok.special_tokens),
              Tokenizer([*tok.token_bytes, b"<new>"], tok.merges, {**tok.special_tokens, "<new>": 20_000}),
              Tokenizer(tok.token_bytes[:-1], tok.merges[:-1], tok.special_tokens)]
    assert len({tokenizer_hash(t) for t in [tok, *others]}) == 4


SLOW = """
import sys, time
from minigpt.engine.tokenizer import Tokenizer
from minigpt.deeper.packing import pack
from minigpt.engine.dataset_readers import load_text

def slowly(texts):
    for n, text in enumerate(texts):
        if n == 100 and sys.argv[3:]:                  # say so, and wait for a word
            print("began", flush=True)
            sys.stdin.readline()
        if n % 100 == 0:
            time.sleep(0.05)
        yield text

if __name__ == "__main__":
    pack(slowly(load_text()), sys.argv[1], Tokenizer.from_pretrained(), chunk=50_000, num_proc=int(sys.argv[2]))
"""


@pytest.mark.parametrize("how, num_proc", [
    ("kill", 1), pytest.param("interrupt", 2, marks=pytest.mark.skipif(os.name == "nt", reason="POSIX signals"))])
def test_interrupted_packing_leaves_nothing_and_begins_again(tmp_path, tok, stories, how, num_proc):
    """A process that is killed or gets Ctrl-C leaves no token file; the next call makes the whole one."""
    script, target = tmp_path / "slow.py", tmp_path / "s.bin"
    script.write_text(SLOW)
    run = subprocess.Popen([sys.executable, str(script), str(target), str(num_proc)], stderr=subprocess.DEVNULL,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    part = tmp_path / ".s.bin.part"
    for _ in range(4000):
        time.sleep(0.05)
        if part.exists() and part.stat().st_size > packing.HEADER_BYTES or run.poll() is not None:
            break
    assert run.poll() is None, "too fast to be interrupted"
    run.kill() if how == "kill" else run.send_signal(signal.SIGINT)
    assert run.wait(60) != 0 and not target.exists()
    file = pack(stories, target, tok, chunk=50_000)
    assert file.ids.tolist() == naive_stream(stories, tok)[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.bin", "slow.py"]


def test_of_two_processes_one_packs(tmp_path, tok, stories):
    """A second process with the same target, and no overwrite, does not say that it packed, and changes nothing."""
    script, target = tmp_path / "slow.py", tmp_path / "s.bin"
    script.write_text(SLOW)
    first = subprocess.Popen([sys.executable, str(script), str(target), "1", "ask"], stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert first.stdout.readline() == "began\n" and (tmp_path / ".s.bin.part").exists()
    with pytest.raises(BlockingIOError, match="s.bin is being written by another process"):
        pack(stories[:10], target, tok)
    first.communicate("\n")
    assert first.returncode == 0
    with pytest.raises(FileExistsError, match="s.bin exists"):
        pack(stories[:10], target, tok)
    assert TokenFile(target, tok).header.n_documents == len(stories)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.bin", "slow.py"]


def test_what_is_no_regular_file_is_not_packed_over(tmp_path, tok):
    read = iter(["a story", "another"])
    for path in (tmp_path, *([Path("/dev/null")] if os.name != "nt" else [])):
        with pytest.raises(OSError, match="is a folder|is no regular file"):
            pack(read, path, tok, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_packing_reads_ahead_only_a_little(tmp_path, tok, monkeypatch):
    """An endless source is not read at once: with two processes at most a few chunks are in memory."""
    read = []

    def endless():
        while True:
            read.append(1)
            yield "word " * 100

    def write_three(path, chunks, header, bar):
        for _ in range(3):
            next(chunks)
        raise OSError("the disk is full")
    monkeypatch.setattr(packing, "_write", write_three)
    with pytest.raises(OSError, match="the disk is full"):
        pack(endless(), tmp_path / "a.bin", tok, chunk=5_000, num_proc=2)
    assert 3 * 10 <= len(read) <= (3 + 3 * 2 + 1) * 10 + 1 and not list(tmp_path.iterdir())


def test_a_file_is_the_stream_in_memory(tmp_path, tok, stories, chats):
    """The same ids, digest and windows as `token_stream`; and the digest in the header is that of its arrays."""
    file, stream = pack(stories, tmp_path / "a.bin", tok), token_stream(stories, tok)
    assert isinstance(file, TokenArray) and file.digest == stream.digest == TokenArray(np.array(file.ids)).digest
    one, other = WindowSampler(file, 32, 5, seed=3), WindowSampler(stream, 32, 5, seed=3)
    assert (one.next_batch().ids == other.next_batch().ids).all() and one.state_dict() == other.state_dict()
    masked = pack(chats, tmp_path / "b.bin", tok, masked=True)
    assert masked.digest == TokenArray(masked.ids, masked.mask).digest != TokenArray(masked.ids).digest


def test_files_of_before_the_digest_are_read(tmp_path, tok, stories):
    file, path = pack(stories[:50], tmp_path / "a.bin", tok), tmp_path / "b.bin"
    raw = (tmp_path / "a.bin").read_bytes()
    head = {k: v for k, v in json.loads(raw[:4096]).items() if k != "digest"}
    path.write_bytes(json.dumps(head).encode().ljust(4095) + b"\n" + raw[4096:])
    assert TokenFile(path, tok).header.digest == "" and TokenFile(path).digest == file.digest


WRONG = ["def join(parts):\n    return TokenArray(np.concatenate([p.ids for p in parts]))",
         "def document(tokens, n, endoftext):\n    return tokens.ids[:10]",
         "def to_bytes(ids, vocab_size):\n    return np.array(ids).astype(np.uint16).tobytes()\n"
         "def from_bytes(data, vocab_size):\n    return np.frombuffer(data, np.uint16)"]


def test_exercises(tmp_path, tok, stories, chats, capsys):
    names = {"np": np, "tok": tok, "stories": stories, "TokenArray": TokenArray, "stream": token_stream(stories, tok),
             "tokens": pack(stories, tmp_path / "a.bin", tok), "chat_file": pack(chats, tmp_path / "b.bin", tok, masked=True)}
    found = exercises("deeper/packing")
    assert len(found) == 3
    for (_, empty, check, solution), wrong in zip(found, WRONG):
        assert said(empty, check, names, capsys) == "not solved yet"
        assert said(solution, check, names, capsys) == "correct"
        assert said(wrong, check, names, capsys) not in ("correct", "not solved yet")
