"""Lesson 01: documents, exact copies, held out by hash, the stream, and a sampler that goes on where it stopped."""
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exercise_cells import exercises, said
from minigpt import data
from minigpt.data import (TokenArray, WindowSampler, dedupe, fingerprint, first_text, shuffled_numbers, split_documents,
                          split_held, text_of, token_stream)
from minigpt.deeper.packing import pack
from minigpt.engine.tokenizer import Tokenizer
from small_data import A, chats, stories, talk, tok  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------ documents

def test_documents_of_lines():
    text = "Eins, zwei.\n\nDrei.\n<|endoftext|>\n\n  <|endoftext|>\nZwei <|endoftext|> drei\n"
    assert list(split_documents(text.splitlines(keepends=True))) == ["Eins, zwei.\n\nDrei.", "Zwei <|endoftext|> drei"]
    assert list(split_documents([])) == list(split_documents(["<|endoftext|>\n"])) == []


def test_dedupe_keeps_the_first_of_each():
    rng = random.Random(1)
    texts = [rng.choice(["a b", "A  b", "a\nB", "a c", "ac", "A C "]) for _ in range(200)]
    expected = list({re.sub(r"\s+", " ", t.lower()).strip(): t for t in reversed(texts)}.values())
    assert sorted(dedupe(texts)) == sorted(expected)
    doubled = [{"messages": talk("q", "a")}, {"messages": talk("Q", "A")}, {"messages": talk("q", "b")}]
    assert list(dedupe(doubled)) == [doubled[0], doubled[2]]
    assert list(dedupe(doubled, key=first_text)) == doubled[:1]


def test_fingerprints_differ_where_words_do():
    same = {fingerprint(t) for t in ("hello there", "Hello  there\n", " HELLO\tthere")}
    assert len(same) == 1 and len(same.pop()) == 16
    assert len({fingerprint(str(n)) for n in range(10_000)}) == 10_000
    assert fingerprint("half \ud83d") != fingerprint("half \ud83e")
    with pytest.raises(TypeError, match="expected a text"):
        list(dedupe([7]))


def test_split_is_stable_under_reordering_and_growth(stories, chats):
    rng = random.Random(2)
    for items in (stories, chats):
        train, held = split_held(items, 0.1)
        assert len(train) + len(held) == len(items) and 0.07 < len(held) / len(items) < 0.13
        names = {text_of(x) for x in held}
        other = rng.sample(items, len(items) // 2) + [items[0]]
        assert {text_of(x) for x in split_held(other, 0.1)[1]} == names & {text_of(x) for x in other}
        assert names <= {text_of(x) for x in split_held(items, 0.2)[1]}  # a larger share only adds
    assert split_held(stories, 0) == (stories, []) and split_held(stories, 1) == ([], stories)


def test_same_question_goes_to_the_same_side():
    rows = [{"messages": talk(f"question {n}", f"answer {k}")} for n in range(200) for k in range(3)]
    train, held = split_held(rows, 0.3)
    asked = lambda side: {c["messages"][0]["content"] for c in side}
    assert not asked(train) & asked(held) and held and train


def test_split_does_not_depend_on_the_process():
    code = "from minigpt.data import split_held; print(split_held([str(n) for n in range(50)], 0.3)[1])"
    outs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                           env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert outs == {f"{split_held([str(n) for n in range(50)], 0.3)[1]}\n"}


def test_a_copy_goes_where_its_original_went(stories):
    train, held = split_held(stories + [text.upper() for text in stories])
    assert not {t.lower() for t in train} & {t.lower() for t in held} and held


def test_a_share_that_is_none(stories):
    for share in (-0.1, 5, float("nan")):
        with pytest.raises(ValueError, match="expected a part between 0 and 1"):
            split_held(stories, share)


# ------------------------------------------------------------------ the stream

def test_the_stream_is_what_the_tokenizer_gives(tok, stories):
    stream = token_stream(stories[:200], tok)
    assert stream.ids.tolist() == [i for text in stories[:200] for i in [0, *tok.encode_ordinary(text)]]
    assert stream.ids.dtype == np.uint16 and stream.mask is None and len(stream) == len(stream.ids)
    assert len(token_stream([], tok)) == 0


def test_a_vocabulary_of_more_than_two_bytes(tok):
    names = {f"<|{n}|>": 20_000 + n for n in range(50_000)}
    large = Tokenizer(tok.token_bytes + [name.encode() for name in names], tok.merges, tok.special_tokens | names)
    assert token_stream(["a"], large).ids.dtype == np.uint32


def test_the_digest_is_of_ids_and_mask():
    ids = np.arange(3_000_000) % 50_000
    one = TokenArray(ids)
    assert re.fullmatch("[0-9a-f]{16}", one.digest) and one.digest == TokenArray(ids.astype(np.uint16)).digest
    for at in (0, 2**20 - 1, 2**20, len(ids) - 1):
        other = ids.copy()
        other[at] += 1
        assert TokenArray(other).digest != one.digest
    masks = [TokenArray(ids[:9], np.arange(9) % n).digest for n in (2, 3)]
    assert len({*masks, TokenArray(ids[:9]).digest}) == 3
    with pytest.raises(ValueError, match="one row of ids"):
        TokenArray(np.zeros((2, 3)))


# ------------------------------------------------------------------ sampling

@pytest.fixture(scope="module")
def chat_file(tmp_path_factory, tok, chats):
    return pack(chats, tmp_path_factory.mktemp("tokens") / "chats.bin", tok, masked=True)


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_windows_are_pieces_of_the_stream(chat_file, order):
    sampler = WindowSampler(chat_file, 32, 5, order=order)
    ids, mask = chat_file.ids.tolist(), chat_file.mask.tolist()
    starts = sampler.starts(0, 15).tolist()
    for step in range(3):
        batch = sampler.next_batch()
        assert batch.ids.shape == (5, 33) and batch.ids.dtype == np.int64 and batch.mask.dtype == bool
        for row in range(5):
            at = starts[5 * step + row]
            assert batch.x[row].tolist() == ids[at:at + 32] and batch.y[row].tolist() == ids[at + 1:at + 33]
            assert batch.mask[row].tolist() == [bool(m) for m in mask[at + 1:at + 33]]


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_resume_is_exact_across_epochs(chat_file, order):
    make = lambda seed=3: WindowSampler(chat_file, 512, 7, seed=seed, order=order)
    whole = make()
    batches = [whole.next_batch().ids for _ in range(60)]  # more than two epochs
    first = make()
    for _ in range(23):
        first.next_batch()
    state = json.loads(json.dumps(first.state_dict()))
    assert set(state) == {"seed", "position", "order", "block_size", "n_tokens", "digest"} and len(str(state)) < 200
    second = make(seed=99)
    second.load_state_dict(state)
    for want in batches[23:]:
        assert (second.next_batch().ids == want).all()
    assert not (batches[0] == make(seed=4).next_batch().ids).all()


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_ranks_and_batch_sizes_read_the_same_windows(chat_file, order):
    one = WindowSampler(chat_file, 64, 12, order=order)
    expected = np.concatenate([one.next_batch().ids for _ in range(8)])
    small = WindowSampler(chat_file, 64, 4, order=order)
    assert (np.concatenate([small.next_batch().ids for _ in range(24)]) == expected).all()
    ranks = [WindowSampler(chat_file, 64, 4, order=order, rank=r, world_size=3) for r in range(3)]
    got = np.concatenate([np.concatenate([s.next_batch().ids for s in ranks]) for _ in range(8)])
    assert (got == expected).all() and ranks[0].state_dict() == ranks[2].state_dict() == one.state_dict()


def test_shuffled_reads_each_window_once_an_epoch(chat_file):
    sampler = WindowSampler(chat_file, 64, 1, order="shuffled")
    n = (len(chat_file) - 1) // 64
    epochs = [sampler.starts(e * n, n).tolist() for e in range(3)]
    assert all(sorted(e) == list(range(0, 64 * n, 64)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])


def test_random_places_reach_both_ends_and_are_even(tmp_path, tok):
    file = pack(["a b c d e f g"], tmp_path / "a.bin", tok)
    starts = WindowSampler(file, 3, 1, seed=1).starts(0, 3000)
    counts = np.bincount(starts)
    assert len(counts) == len(file) - 3  # the last window ends with the last token
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


def test_errors_of_the_sampler(tmp_path, tok, chat_file):
    short = pack(["a b"], tmp_path / "a.bin", tok)
    with pytest.raises(ValueError, match="too few for a window of block_size"):
        WindowSampler(short, len(short), 1)
    assert WindowSampler(short, len(short) - 1, 1).next_batch().ids.tolist() == [short.ids.tolist()]
    with pytest.raises(ValueError, match="order='sorted'"):
        WindowSampler(chat_file, 8, 1, order="sorted")
    with pytest.raises(ValueError, match="rank=2"):
        WindowSampler(chat_file, 8, 1, rank=2, world_size=2)
    sampler = WindowSampler(chat_file, 8, 1)
    for wrong in ({**sampler.state_dict(), "n_tokens": 5}, {**sampler.state_dict(), "block_size": 9}, {"seed": 0}):
        with pytest.raises(ValueError, match="the sampler's state has"):
            sampler.load_state_dict(wrong)


def test_a_state_of_other_order_or_data_is_refused(chat_file):
    """All that decides the next batch is in the state, and loading what does not fit changes nothing."""
    ids = np.array(chat_file.ids)
    one = WindowSampler(TokenArray(ids), 16, 4, order="shuffled")
    one.next_batch()
    state = one.state_dict()
    changed = ids.copy()
    changed[len(ids) // 2] += 1
    for other, name in ((WindowSampler(TokenArray(ids), 16, 4), "order=shuffled, here it is random"),
                        (WindowSampler(TokenArray(changed), 16, 4, order="shuffled"), "digest="),
                        (WindowSampler(chat_file, 16, 4, order="shuffled"), "digest="),  # the same ids, with a mask
                        (WindowSampler(TokenArray(ids[:-1]), 16, 4, order="shuffled"), "n_tokens="),
                        (WindowSampler(TokenArray(ids), 17, 4, order="shuffled"), "block_size=16, here it is 17")):
        with pytest.raises(ValueError, match=f"the sampler's state has .*{name}"):
            other.load_state_dict(state)
        assert other.position == 0 and other.seed == 0
    again = WindowSampler(TokenArray(ids.astype(np.int64)), 16, 4, seed=7, order="shuffled")
    again.load_state_dict(state)
    assert (again.next_batch().ids == one.next_batch().ids).all()


def test_an_order_cannot_be_spoiled_by_its_user():
    with pytest.raises(ValueError, match="read-only"):
        data._epoch_order(0, 0, 8)[0] = 3
    assert sorted(shuffled_numbers(0, 0, 8, 8)) == list(range(8))


# ------------------------------------------------------------------ the module and the exercises

def test_import_is_light():
    code = "import sys, minigpt.data; print([m for m in ('torch', 'datasets', 'matplotlib', 'pyarrow') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stderr


WRONG = ["def pad_rows(rows, pad):\n    return np.ones((2, 3)), np.ones((2, 3))",
         "def document_places(ids, block_size, count, eot, rng):\n    return rng.choice(np.flatnonzero(ids == eot), count)",
         "def contamination(text, training, n):\n    return float(text in training)"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_exercise(number, tok, stories, capsys):
    assert len(exercises("01")) == 3
    names = {"np": np, "eot": 0, "tokens": token_stream(stories, tok)}
    _, empty, check, solution = exercises("01")[number]
    assert said(empty, check, names, capsys) == "not solved yet"
    assert said(solution, check, names, capsys) == "correct"
    assert said(WRONG[number], check, names, capsys) not in ("correct", "not solved yet")
