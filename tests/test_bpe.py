"""The tokenizer against tiktoken, HF tokenizers, transformers, and a naive trainer and encoder of this file."""
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minigpt import bpe
from minigpt.bpe import BPETokenizer, split_words
from minigpt.deeper import fast_bpe
from minigpt.engine import tokenizer as files
from minigpt.engine import vocabulary
from minigpt.engine.tokenizer import StreamDecoder, Tokenizer

tiktoken = pytest.importorskip("tiktoken")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "minigpt" / "assets"
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STORIES = (ASSETS / "data" / "stories.txt").read_text(encoding="utf-8").replace("<|endoftext|>", "")
# Characters that every library's Unicode tables know (unicodedata of Python 3.10 has Unicode 13).
KNOWN = [chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
         and unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn",)]
EMOJI = ["🙂", "👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "❤️", "🇩🇪", "1️⃣", "🤷🏻‍♀️"]
BLANKS = [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u2003", "\u2028",
          "\u202f", "\u205f", "\u3000", "\u180e", "\u200b", "\ufeff"]
CODE = Path(json.__file__).read_text(encoding="utf-8") + Path(warnings.__file__).read_text(encoding="utf-8")


# ------------------------------------------------------------------ peers, built without this project's readers

@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.from_pretrained("gpt2")


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.from_pretrained()


@pytest.fixture(scope="module")
def openai():
    """tiktoken's GPT-2 from the bundled files; ranks by tiktoken's own loader."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    ranks = data_gym_to_mergeable_bpe_ranks(str(ASSETS / "gpt2" / "vocab.bpe"), str(ASSETS / "gpt2" / "encoder.json"))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


@pytest.fixture(scope="module")
def hf():
    """HF tokenizers' GPT-2 from the bundled files."""
    tok = tokenizers.Tokenizer(models.BPE.from_file(str(ASSETS / "gpt2" / "encoder.json"),
                                                    str(ASSETS / "gpt2" / "vocab.bpe")))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>"])
    return tok


def hf_trained(texts, vocab_size, special=()):
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), show_progress=False, min_frequency=0,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok


def merges_of(tok):
    table = {char: byte for byte, char in visible().items()}
    return [tuple(bytes(table[c] for c in part) for part in merge)
            for merge in json.loads(tok.to_str())["model"]["merges"]]


def visible():
    """GPT-2's visible characters, by the rule as its paper's code states it."""
    keep = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    return {b: chr(b) if b in keep else chr(256 + sum(x not in keep for x in range(b))) for b in range(256)}


# ------------------------------------------------------------------ fuzz

def fuzz(kind, seed=0):
    rng = random.Random(seed)
    words = STORIES[:200_000].split()

    def pick(pool, low, high):
        return "".join(rng.choices(pool, k=rng.randint(low, high)))

    makers = {
        "unicode": lambda: pick(KNOWN, 1, 40),
        "unicode words": lambda: " ".join(pick(KNOWN[a:a + 300], 1, 8) for a in rng.choices(range(len(KNOWN)), k=8)),
        "code": lambda: CODE[(a := rng.randrange(len(CODE))):a + rng.randint(1, 300)],
        "emoji": lambda: pick(EMOJI + [" ", "a", "!"], 1, 12),
        "whitespace": lambda: pick(BLANKS + ["a", ".", "1", "é", "'"], 1, 20),
        "words": lambda: "".join(rng.choice(words) + pick(BLANKS[:5] + ["’", " — ", "“", "…", "'s ", "'LL "], 1, 2)
                                 for _ in range(12)),
        "ascii": lambda: pick([chr(c) for c in range(128)], 1, 60),
        "apostrophes": lambda: pick(["'", "s", "t", "re", "ve", "m", "ll", "d", " ", "S", "’", "1"], 1, 15)}
    return [makers[kind]() for _ in range(1000)]


KINDS = ["unicode", "unicode words", "code", "emoji", "whitespace", "words", "ascii", "apostrophes"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_tiktokens_and_hf_tokenizers(kind, gpt2, openai, hf, ledger):
    texts = fuzz(kind)
    ours = [gpt2.encode_ordinary(text) for text in texts]
    theirs = [openai.encode_ordinary(text) for text in texts]
    hf_ids = [e.ids for e in hf.encode_batch(texts, add_special_tokens=False)]
    wrong = [t for t, a, b, c in zip(texts, ours, theirs, hf_ids) if not a == b == c]
    ledger(f"GPT-2 ids, {kind}: texts of 1,000 that differ", len(wrong), peer="tiktoken", bound=0)
    ledger(f"GPT-2 ids, {kind}: texts of 1,000 that differ", len(wrong), peer="tokenizers", bound=0)
    assert wrong == []
    assert [gpt2.decode(ids) for ids in ours] == texts
    assert [gpt2.encode(text) for text in texts] == ours


def test_every_character_alone_and_between_letters(gpt2, openai):
    for char in KNOWN[::7]:
        text = f"{char} a{char}{char}b {char}1 \n{char}"
        assert gpt2.encode_ordinary(text) == openai.encode_ordinary(text), repr(text)


def test_a_whole_text_and_the_shipped_vocabulary(shipped, ledger):
    theirs = tokenizers.Tokenizer.from_file(str(ASSETS / "minigpt-chat" / "tokenizer.json"))
    text = STORIES[:400_000] + CODE
    ours = shipped.encode(text)
    wrong = sum(a != b for a, b in zip(ours, theirs.encode(text).ids)) + abs(len(ours) - len(theirs.encode(text).ids))
    ledger("shipped tokenizer, ids of 430,000 characters that differ", wrong, peer="tokenizers", bound=0)
    assert wrong == 0
    assert shipped.decode(ours) == text


@pytest.mark.parametrize("text", ["a" * 20_000, "ab" * 5_000, "é" * 3_000, "数学" * 2_000, "-=" * 4_000, "\n" * 3_000,
                                  "".join(random.Random(1).choices("abcdeth", k=20_000))],
                         ids=["a", "ab", "é", "cjk", "signs", "newlines", "random"])
def test_very_long_words(text, gpt2, openai):
    assert gpt2.encode_ordinary(text) == openai.encode_ordinary(text)


def test_half_surrogates_as_tiktoken_reads_them(gpt2, openai):
    for text in ["\ud83d", "a\ud83d b", "\udc00\ud83d", "x \ud83d\ude42 y", "\ud83d" * 3 + "é"]:
        assert gpt2.encode_ordinary(text) == openai.encode_ordinary(text)


@pytest.mark.parametrize("text", [
    STORIES, STORIES.replace(" ", "\r\n"), STORIES.replace(" ", "") + " end", STORIES.replace("e", "é")],
    ids=["stories", "a word a line", "few blanks", "accents"])
def test_a_text_in_slices_has_the_ids_of_the_whole(text, gpt2, openai):
    assert len(text) > 900_000
    text = "A title\n\n" + text * 2  # two slices or more
    want = openai.encode_ordinary(text)
    assert gpt2.encode_ordinary(text) == want and gpt2.encode(text) == want
    assert np.array_equal(gpt2.encode_array(text), want)


def test_slices_around_a_broken_surrogate_and_a_special_token(gpt2, openai):
    text = ("one two \ud83d three\n" * 70_000)[:1_100_000]
    assert gpt2.encode(text + "<|endoftext|>" + text, "all") == [
        *openai.encode_ordinary(text), 50256, *openai.encode_ordinary(text)]


def test_memory_for_a_long_text_is_bounded(gpt2):
    """The list of the words of a whole text would take many times its size."""
    def peak(text):
        gpt2.encode_array(text)  # fills the cache
        tracemalloc.start()
        try:
            gpt2.encode_array(text)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    text = STORIES[:1 << 20]
    assert peak(text * 3) - peak(text) < 3 * (2 * len(text))  # 3 bytes for each character more


def naive_encode(tok, text):
    """Word by word, merge by merge, over all merges: the definition."""
    ranks = {pair: n for n, pair in enumerate(tok.merges)}
    ids = {token: i for i, token in enumerate(tok.token_bytes) if i not in tok.special_tokens.values()}
    out = []
    for word in split_words(text):
        parts = [bytes([b]) for b in word.encode()]
        while pairs := [ranks[p] for p in zip(parts, parts[1:]) if p in ranks]:
            left, right = tok.merges[min(pairs)]
            merged, i = [], 0
            while i < len(parts):
                both = parts[i] == left and parts[i + 1:i + 2] == [right]
                merged.append(left + right if both else parts[i])
                i += 1 + both
            parts = merged
        out += [ids[part] for part in parts]
    return out


def test_ids_equal_the_naive_encoder(shipped):
    for kind in KINDS:
        for text in fuzz(kind, seed=3)[:15]:
            assert shipped.encode_ordinary(text) == naive_encode(shipped, text)


# ------------------------------------------------------------------ decoding

def test_decode_of_any_ids_equals_tiktoken(gpt2, openai, ledger):
    rng, wrong = random.Random(0), 0
    for _ in range(2000):
        ids = rng.choices(range(50257), k=rng.randint(0, 30))
        wrong += gpt2.decode_bytes(ids) != openai.decode_bytes(ids) or gpt2.decode(ids) != openai.decode(ids)
    ledger("decoding 2,000 rows of random ids: rows that differ", wrong, peer="tiktoken", bound=0)
    assert wrong == 0


def test_bytes_that_are_no_text(gpt2):
    rng = random.Random(0)
    byte_ids = [gpt2.token_bytes.index(bytes([b])) for b in range(256)]
    for _ in range(500):
        data = rng.randbytes(rng.randint(0, 20))
        ids = [byte_ids[b] for b in data]
        assert gpt2.decode_bytes(ids) == data
        assert gpt2.decode(ids) == data.decode("utf-8", errors="replace")
    with pytest.raises(UnicodeDecodeError):
        gpt2.decode([byte_ids[0xff]], errors="strict")


def test_stream_decoder_gives_the_same_text_and_no_half_characters(gpt2):
    rng = random.Random(0)
    for text in fuzz("emoji")[:200] + fuzz("unicode")[:200]:
        stream, shown = StreamDecoder(gpt2), []
        for i in gpt2.encode_ordinary(text):
            shown.append(stream.push(i))
        assert "\ufffd" not in "".join(shown) or "\ufffd" in text
        assert stream.flush() == "" and "".join(shown) == text
    for _ in range(500):
        ids = rng.choices(range(50257), k=12)
        stream = StreamDecoder(gpt2)
        assert "".join(map(stream.push, ids)) + stream.flush() == gpt2.decode(ids)


@pytest.mark.parametrize("kind", [list, tuple, np.array, iter, lambda ids: np.array(ids, np.uint16)])
def test_kinds_of_ids(kind, gpt2):
    assert gpt2.decode(kind([15496, 995])) == "Hello world"


def test_a_torch_tensor_of_ids(gpt2):
    torch = pytest.importorskip("torch")
    assert gpt2.decode(torch.tensor([15496, 995])) == "Hello world"


@pytest.mark.parametrize("ids, error, words", [
    ([1, 50257], ValueError, "50257 .*0 to 50256"), ([-1], ValueError, "id -1 "), ([1.5], TypeError, "whole numbers"),
    ([[1, 2]], TypeError, "whole numbers"), (5, TypeError, "whole numbers"), ("12", TypeError, "whole numbers")])
def test_ids_that_cannot_be_decoded(ids, error, words, gpt2):
    with pytest.raises(error, match=words):
        gpt2.decode(ids)


def test_readable_vocabulary(gpt2):
    assert gpt2.vocab[15496] == "Hello" and gpt2.vocab[995] == "␣world"
    assert gpt2.vocab[198] == "\\n" and gpt2.vocab[50256] == "<|endoftext|>"
    assert all(text.isprintable() for text in gpt2.vocab) and len(gpt2.vocab) == 50257


# ------------------------------------------------------------------ special tokens

def test_special_tokens_as_tiktoken(gpt2, openai, hf):
    for text in ["<|endoftext|>", "a<|endoftext|>b <|endoftext|>\n", "<|endoftext|", "<|endoftext|><|endoftext|>", ""]:
        want = openai.encode(text, allowed_special="all")
        assert gpt2.encode(text, allowed_special="all") == want == hf.encode(text).ids
        assert gpt2.encode(text, {"<|endoftext|>"}) == want
        assert gpt2.encode_ordinary(text) == openai.encode_ordinary(text)


def test_the_class_of_the_lesson_gives_the_same_ids(gpt2):
    plain = BPETokenizer(gpt2.token_bytes, gpt2.merges, gpt2.special_tokens)
    for kind in KINDS:
        for text in fuzz(kind)[:40]:
            text = text.encode("utf-8", "replace").decode()
            assert plain.encode_ordinary(text) == gpt2.encode_ordinary(text)
            assert plain.decode(plain.encode(text, "all")) == text


def test_the_class_of_the_lesson_learns_the_same_merges():
    plain = BPETokenizer.train(STORIES[:20_000], 400, MARKS)
    fast = Tokenizer.train(STORIES[:20_000], 400, MARKS)
    assert plain.merges == fast.merges and plain.token_bytes == fast.token_bytes


def test_merges_that_do_not_reach_a_token_are_not_skipped(tmp_path):
    """A token that its own merges never make: tokenizers does not use it either, with the ignore_merges that we write."""
    by_hand = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
    ours = Tokenizer([bytes([b]) for b in bpe.BYTE_ORDER] + [a + b for a, b in by_hand], by_hand)
    ours.save_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("abc", "abcab", " abc bc", "aabbcc"):
        assert ours.encode(text) == theirs.encode(text).ids


def test_tokens_that_count_as_reached_are_reached(gpt2, shipped):
    """Made-up vocabularies, many of them odd, against HF's library; all tokens of the trained ones are sure."""
    rng, sure, reached = random.Random(5), 0, 0
    for _ in range(300):
        tokens, merges = [bytes([b]) for b in range(256)], []
        parts = [bytes([b]) for b in rng.choice([b"a", b"ab", b"abc"])] + rng.choices([b"abba", b"aa"], k=rng.randint(0, 1))
        tokens += [part for part in parts if len(part) > 1]
        for _ in range(rng.randint(1, 10)):
            pair = rng.choice(parts), rng.choice(parts)
            token = pair[0] + pair[1]
            if len(token) <= 16 and pair not in merges:
                merges.append(pair)
                if token not in tokens:
                    tokens.append(token)
                    parts.append(token)
        if rng.random() < 0.2:
            rng.shuffle(merges)
        shown = bpe.bytes_to_unicode()
        word = ["".join(shown[b] for b in token) for token in tokens]
        theirs = tokenizers.Tokenizer(models.BPE(dict(zip(word, range(len(word)))),
                                                 [("".join(shown[b] for b in a), "".join(shown[b] for b in c))
                                                  for a, c in merges]))
        encode = fast_bpe.WordEncoder({token: i for i, token in enumerate(tokens)}, merges)
        for i, token in enumerate(tokens[256:], 256):
            ids = theirs.encode(word[i]).ids
            assert encode(token) == ids, (merges, token)
            sure += encode.whole[i]
            reached += ids == [i]
    assert 0.6 * reached < sure < reached
    for trained in (gpt2, shipped):
        assert sum(trained._cache.encode_word.whole) == len(trained._ids)


def test_a_stray_special_token_is_an_error(shipped):
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' at character 3 .*encode_ordinary"):
        shipped.encode("ab <|im_end|>")
    with pytest.raises(ValueError, match="at character 12"):
        shipped.encode("<|im_start|><|im_end|>", {"<|im_start|>"})
    assert not set(shipped.encode_ordinary("<|im_start|>system")) & {0, 1, 2}


@pytest.mark.parametrize("allowed, words", [
    ("<|im_end|>", 'give "all" or a set'), ({"<|end|>"}, "<|end|>"), ("none", 'give "all" or a set'), (None, "=None")])
def test_unknown_allowed_special(allowed, words, shipped):
    with pytest.raises(ValueError, match="allowed_special") as info:
        shipped.encode("plain", allowed)
    assert words in str(info.value)


def test_the_longest_of_two_special_tokens_wins():
    tok = Tokenizer.train("abc abc", 261, ["<a>", "<a><b>"])
    assert tok.encode("<a><b><a>", "all") == [1, 0]


@pytest.mark.parametrize("text", [b"abc", None, 5, ["a"]])
def test_text_that_is_no_text(text, gpt2):
    for call in (gpt2.encode, gpt2.encode_ordinary):
        with pytest.raises(TypeError, match="text must be str"):
            call(text)


# ------------------------------------------------------------------ training

def naive_train(words, n_merges):
    """Recount everything for each merge; ties by the smaller pair of ids; equal bytes share an id."""
    order = sorted(range(256), key=visible().get)
    tokens = [bytes([b]) for b in order]
    seqs = [([order.index(b) for b in word.encode()], n) for word, n in words.items()]
    merges = []
    while len(merges) < n_merges:
        counts = Counter()
        for seq, n in seqs:
            for pair in zip(seq, seq[1:]):
                counts[pair] += n
        if not counts:
            break
        a, b = min(counts, key=lambda p: (-counts[p], p))
        merges.append((tokens[a], tokens[b]))
        if tokens[a] + tokens[b] not in tokens:
            tokens.append(tokens[a] + tokens[b])
        new = tokens.index(tokens[a] + tokens[b])
        for seq, _ in seqs:
            i = 0
            while i < len(seq) - 1:
                if seq[i] == a and seq[i + 1] == b:
                    seq[i:i + 2] = [new]
                i += 1
    return merges


def test_merges_equal_the_naive_trainer_on_texts_full_of_ties():
    rng = random.Random(0)
    for trial in range(100):
        letters = rng.choice(["ab", "abc", "abcdefgh", "aé🙂"])
        words = {"".join(rng.choices(letters, k=rng.randint(1, 12))): rng.randint(1, 3)
                 for _ in range(rng.randint(1, 12))}
        want = naive_train(words, 40)
        tokens, merges = fast_bpe.learn_merges(words, 256 + len({a + b for a, b in want}))
        assert merges == want[:len(merges)] and len(merges) >= len(want) - 1, (trial, words)


TEXTS = {"stories": STORIES, "code": CODE, "ties": " ".join(fuzz("ascii")), "unicode": " ".join(fuzz("unicode words")),
         "blanks": "".join(fuzz("whitespace")), "runs": "aaaa aaaaa " * 9 + "a" * 77 + " bababab" * 5}


@pytest.mark.parametrize("name", TEXTS)
def test_merges_equal_hf_tokenizers_trainer(name, ledger):
    texts = TEXTS[name].splitlines(keepends=True)
    size = 8000 if name == "stories" else 1500
    want = hf_trained(texts, size, MARKS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = Tokenizer.train(texts, size, MARKS)
    merges = merges_of(want)
    wrong = sum(a != b for a, b in zip(ours.merges, merges)) + abs(len(ours.merges) - len(merges))
    ledger(f"merges learned from {name}, of {len(merges):,}: that differ", wrong, peer="tokenizers", bound=0)
    assert wrong == 0
    assert ours.encode_ordinary(TEXTS[name]) == want.encode(TEXTS[name]).ids


def test_order_of_texts_does_not_matter():
    lines = STORIES[:150_000].splitlines(keepends=True)
    again = random.Random(0).sample(lines, len(lines))
    assert Tokenizer.train(lines, 900).merges == Tokenizer.train(again, 900).merges


def test_special_tokens_get_the_first_ids():
    tok = Tokenizer.train("low lower lowest " * 3, 265, MARKS)
    assert tok.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert tok.vocab_size == 265 and tok.token_bytes[3] == b"!" and tok.token_bytes[259] == b"lo"


@pytest.mark.parametrize("name, says", [("user", "'user' is also a token.*'<.user.>'"), ("Ġuser", "'Ġuser' is also")])
def test_a_special_token_that_is_a_learned_word_is_refused(name, says, tmp_path):
    text = "user and user: the user " * 20
    with pytest.raises(ValueError, match=says):
        Tokenizer.train(text, 268, [name, "<|end|>"])
    tok = Tokenizer.train(text, 267, ["<|end|>"])
    clash = Tokenizer([*tok.token_bytes, name.encode()], tok.merges, tok.special_tokens | {name: tok.vocab_size})
    for save in (clash.save_pretrained, clash.save_gpt2):
        with pytest.raises(ValueError, match=says):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_special_token_that_is_a_byte_is_refused_before_the_text_is_read():
    def texts():
        raise AssertionError("read")
        yield
    for name in ("a", "!", "Ġ"):
        with pytest.raises(ValueError, match=f"{name!r} is also a token"):
            Tokenizer.train(texts(), 300, [name])


def test_a_special_token_that_is_in_the_text_but_no_token_is_fine(tmp_path):
    tok = Tokenizer.train("user and user: the user " * 20, 259, ["user", "<|end|>"])
    tok.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).encode("userx<|end|>", "all") == [0, tok.encode("x")[0], 1]


def test_too_large_a_vocabulary_stops_early_and_says_so():
    with pytest.warns(UserWarning, match=r"vocab_size=500 is too large .* 3 merges .* 259 ids"):
        tok = Tokenizer.train("abcd", 500)
    assert tok.vocab_size == 259 and tok.encode("abcd") == [258]


@pytest.mark.parametrize("texts, size, special, error, words", [
    ("abc", 255, [], ValueError, "vocab_size=255.*at least 256"), ("abc", 257, ["<a>", "<b>"], ValueError, "at least 258"),
    ("abc", 1 << 21, [], ValueError, "is the most"), ("", 300, [], ValueError, "empty"), ([], 300, [], ValueError, "empty"),
    ("abc", 300, "<a>", TypeError, "give a list"), ("abc", 300, ["<a>", "<a>"], ValueError, "own name"),
    ([b"abc"], 300, [], TypeError, "item 0 is no text"), ([{"body": "x"}], 300, [], ValueError, "no field 'text'"),
    (Path("no-such-file.txt"), 300, [], FileNotFoundError, "no-such-file")])
def test_training_input_that_is_wrong(texts, size, special, error, words):
    with pytest.raises(error, match=words):
        Tokenizer.train(texts, size, special)


def test_no_processes_is_an_error():
    with pytest.raises(ValueError, match="num_proc=0"):
        Tokenizer.train("abc", 300, num_proc=0)


def test_files_rows_and_processes_give_the_same_merges(tmp_path):
    text = STORIES[:400_000]
    want = Tokenizer.train(text, 1200).merges
    path = tmp_path / "stories.txt"
    path.write_text(text, encoding="utf-8", newline="")
    lines = text.splitlines(keepends=True)
    assert Tokenizer.train(path, 1200).merges == want
    rows = ({"body": line} for line in lines)
    by_row = Tokenizer.train(rows, 1200, field="body").merges
    assert by_row == Tokenizer.train(lines, 1200, num_proc=2).merges == Tokenizer.train(lines, 1200).merges


def test_a_streamed_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.txt"
    path.write_text(STORIES[:50_000], encoding="utf-8", newline="\n")
    stream = datasets.load_dataset("text", data_files=str(path), streaming=True, split="train",
                                   cache_dir=str(tmp_path / "cache"))
    lines = STORIES[:50_000].splitlines()
    assert Tokenizer.train(stream, 600).merges == Tokenizer.train(lines, 600).merges


def read_pieces(path, size):
    with open(path, encoding="utf-8", newline="") as file:
        yield from files._cut_safely(iter(lambda: file.read(size), ""))


def test_pieces_of_a_file_keep_the_words(tmp_path):
    path = tmp_path / "fuzz.txt"
    for n, text in enumerate(fuzz("whitespace")[:60] + fuzz("words")[:20]):
        path.write_text(text, encoding="utf-8", newline="")
        pieces = list(read_pieces(path, 1 + n % 9))
        assert "".join(pieces) == text
        assert [w for p in pieces for w in split_words(p)] == split_words(text)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r", " \r\n"])
def test_a_word_list_without_blanks_is_read_in_pieces(end, tmp_path):
    text = "".join(f"Wörd{n}{end}" for n in range(3000))
    path = tmp_path / "list.txt"
    path.write_text(text, encoding="utf-8", newline="")
    pieces = list(read_pieces(path, 500))
    assert "".join(pieces) == text and max(map(len, pieces)) < 1000
    assert [w for p in pieces for w in split_words(p)] == split_words(text)


def test_each_block_is_searched_once(tmp_path, monkeypatch):
    """So a file without any place to cut takes time in proportion to its length."""
    searched = []
    monkeypatch.setattr(files, "_match_cut", lambda text: searched.append(len(text)))
    (tmp_path / "one.txt").write_text("x" * 10_000)
    assert list(read_pieces(tmp_path / "one.txt", 100)) == ["x" * 10_000]
    assert sum(searched) < 11_000


def test_blocks_of_any_size_keep_the_words():
    rng = random.Random(3)
    for kind in KINDS:
        for text in fuzz(kind, seed=4)[:200]:
            cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
            blocks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)]) if b > a]
            pieces = list(files._cut_safely(blocks))
            assert "".join(pieces) == text and all(pieces)
            assert [w for p in pieces for w in split_words(p)] == split_words(text)


def test_many_distinct_words_are_counted_right():
    words = files._count_words(f" w{i}." for i in range(280_000))
    assert words == Counter({f" w": 280_000, ".": 280_000}) + Counter(str(i) for i in range(280_000))


def test_broken_utf8_names_the_file(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 \(byte 0xe9\)"):
        Tokenizer.train(path, 300)


def test_units_keep_the_words_of_every_kind_of_text():
    for kind in KINDS:
        for text in fuzz(kind, seed=5)[:300]:
            words = [w for unit in fast_bpe._split_units(text) for w in split_words(unit)]
            assert words == split_words(text) and "".join(words) == text


def test_progress_bars_are_shown_when_asked(capsys):
    Tokenizer.train("low lower lowest " * 3, 260, progress=True)
    shown = capsys.readouterr().err
    assert "words" in shown and "merges: 100%" in shown
    Tokenizer.train("low lower lowest " * 3, 260, progress=False)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ files of others

def test_hf_tokenizers_file_loads_and_ours_is_the_same_file(tmp_path):
    theirs = hf_trained([STORIES[:100_000]], 1000, MARKS)
    (tmp_path / "theirs").mkdir()
    theirs.save(str(tmp_path / "theirs" / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "ours" / "tokenizer.json"))
    for text in fuzz("words")[:100] + fuzz("emoji")[:100] + ["<|im_start|>user\nhi<|im_end|>"]:
        assert ours.encode(text, "all") == theirs.encode(text).ids == again.encode(text).ids
        assert again.decode(again.encode(text).ids, skip_special_tokens=False) == text
    saved = (tmp_path / "ours" / "tokenizer.json").read_text(encoding="utf-8")
    assert saved == again.to_str(pretty=True)


def test_the_shipped_file_is_written_back_byte_for_byte(shipped, tmp_path):
    shipped.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (ASSETS / "minigpt-chat" / "tokenizer.json").read_bytes()


def test_older_forms_of_tokenizer_json(gpt2, tmp_path):
    spec = vocabulary.tokenizer_json(gpt2)
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    del spec["model"]["type"], spec["pre_tokenizer"]["use_regex"]
    spec["model"]["vocab"].pop("<|endoftext|>")  # only an added token
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.merges == gpt2.merges and loaded.special_tokens == gpt2.special_tokens


@pytest.mark.parametrize("change, words", [
    (lambda s: s.update(normalizer={"type": "NFC"}), "normalizer"),
    (lambda s: s["model"].update(type="WordPiece"), "WordPiece"),
    (lambda s: s["model"].update(dropout=0.1), "dropout"),
    (lambda s: s["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
    (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    (lambda s: s["model"]["vocab"].update(abc=999), "none with id"),
    (lambda s: s["model"]["merges"].append(["q", "zz"]), "no id for the token"),
    (lambda s: s.update(model="x"), "tokenizer.json does not hold")])
def test_files_that_would_give_other_ids_are_refused(change, words, tmp_path):
    spec = vocabulary.tokenizer_json(Tokenizer.train("low lower lowest " * 3, 262))
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_each_gpt2_has_the_vocabulary_that_ships(name, gpt2, tmp_path, monkeypatch):
    assert Tokenizer.from_pretrained(name).__reduce__() == gpt2.__reduce__()
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="needs tokenizer.json"):  # a folder goes before a name
        Tokenizer.from_pretrained(name)


def test_a_folder_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    tok = Tokenizer.train("low lower lowest " * 3, 262)
    tok.save_pretrained(tmp_path / "mine")
    for name in ("~/mine", Path("~/mine")):
        assert Tokenizer.from_pretrained(name).merges == tok.merges


def test_broken_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="needs tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json, line 1: not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="'gpt5'.*minigpt-chat"):
        Tokenizer.from_pretrained("gpt5")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        Tokenizer.from_pretrained("no-such-owner/no-such-model")
    with pytest.raises(FileNotFoundError, match="vocab.bpe"):
        Tokenizer.from_gpt2(ASSETS / "gpt2" / "encoder.json", tmp_path / "vocab.bpe")


def test_auto_tokenizer_loads_ours_with_the_chat_template(shipped, tmp_path, ledger):
    transformers = pytest.importorskip("transformers")
    shipped.save_pretrained(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for kind in KINDS for text in fuzz(kind)[:100]]
    wrong = sum(auto.encode(t, add_special_tokens=False) != shipped.encode(t) for t in texts)
    ledger("AutoTokenizer from our files, of 800 texts: that differ", wrong, peer="transformers", bound=0)
    assert wrong == 0
    assert (auto.eos_token, auto.eos_token_id, auto.pad_token_id) == ("<|im_end|>", 2, 0)
    assert len(auto) == 20_000
    chat = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi!\n"},
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]
    want = ("<|endoftext|><|im_start|>user\nBe brief.\n\nHi!<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n")
    assert auto.apply_chat_template(chat, tokenize=False) == want
    prompt = auto.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == want + "<|im_start|>assistant\n"
    assert auto.decode(shipped.encode("Hello there."), clean_up_tokenization_spaces=False) == "Hello there."


def test_gpt2_files_are_written_back(gpt2, tmp_path):
    gpt2.save_gpt2(tmp_path)
    files = ASSETS / "gpt2"
    assert (tmp_path / "vocab.bpe").read_bytes() == (files / "vocab.bpe").read_bytes().replace(b"\r\n", b"\n")
    assert json.loads((tmp_path / "encoder.json").read_text(encoding="utf-8")) == json.loads(
        (files / "encoder.json").read_text(encoding="utf-8"))
    (tmp_path / "encoder.json").rename(tmp_path / "vocab.json")
    (tmp_path / "vocab.bpe").rename(tmp_path / "merges.txt")
    assert Tokenizer.from_pretrained(tmp_path).merges == gpt2.merges


def test_to_tiktoken_has_the_same_ids(shipped, gpt2, openai):
    theirs = shipped.to_tiktoken("ours")
    assert theirs.name == "ours" and theirs.n_vocab == 20_000
    for kind in KINDS:
        for text in fuzz(kind)[:150]:
            assert theirs.encode_ordinary(text) == shipped.encode_ordinary(text)
    text = "<|im_start|>user\nhi<|im_end|>"
    assert theirs.encode(text, allowed_special="all") == shipped.encode(text, "all")
    assert gpt2.to_tiktoken().encode(STORIES[:50_000]) == openai.encode(STORIES[:50_000])


def test_to_tiktoken_refuses_ids_in_another_order(shipped):
    mixed = Tokenizer(shipped.token_bytes, shipped.merges[1::-1] + shipped.merges[2:], shipped.special_tokens)
    with pytest.raises(ValueError, match="order of its merges"):
        mixed.to_tiktoken()


def test_more_than_65536_ids():
    every = [bytes([b]) for b in range(255, -1, -1)]
    pairs = [(a, b) for a in every for b in every]
    tok = Tokenizer(every + [a + b for a, b in pairs], pairs)
    theirs = tok.to_tiktoken()
    for text in fuzz("unicode words")[:100] + ["\x00\x00"]:
        assert tok.encode(text) == theirs.encode(text)
    assert tok.encode("\x00\x00") == [256 + 65535] and tok.decode([65791]) == "\x00\x00"
    assert tok.encode_array("a").dtype == np.uint32


def test_a_vocabulary_without_all_bytes_is_refused():
    with pytest.raises(ValueError, match="all 256 bytes"):
        Tokenizer([b"a", b"b"], [])


# ------------------------------------------------------------------ saving is all or nothing

def test_other_files_are_not_overwritten(shipped, gpt2, tmp_path):
    shipped.save_pretrained(tmp_path)
    shipped.save_pretrained(tmp_path)  # the same again is fine
    before = (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        gpt2.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    gpt2.save_pretrained(tmp_path, overwrite=True)
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == 50257


def test_a_killed_save_leaves_whole_files(tmp_path):
    script = ("import sys, itertools\nfrom minigpt.engine.tokenizer import Tokenizer\n"
              "both = [Tokenizer.from_pretrained(n) for n in (None, 'gpt2')]\n"
              "for tok in itertools.cycle(both):\n    tok.save_pretrained(sys.argv[1], overwrite=True)\n"
              "    print('saved', flush=True)\n")
    for wait in (0.0, 0.05, 0.13):
        with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            time.sleep(wait)
            child.kill()
        assert Tokenizer.from_pretrained(tmp_path).vocab_size in (20_000, 50_257)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a child process")
@pytest.mark.parametrize("num_proc", [1, 2])
def test_ctrl_c_ends_training_and_leaves_nothing(num_proc, tmp_path):
    script = ("import itertools\nfrom minigpt.engine.tokenizer import Tokenizer\n"
              "def endless():\n    print('started', flush=True)\n"
              "    for i in itertools.count():\n        yield f'word{i % 5000} and more ' * 50\n"
              "if __name__ == '__main__':\n"
              f"    Tokenizer.train(endless(), 5000, num_proc={num_proc}).save_pretrained('out')\n")
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "started\n"
        time.sleep(1.0)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode != 0 and "KeyboardInterrupt" in errors
    assert [p.name for p in tmp_path.iterdir()] == ["script.py"]


# ------------------------------------------------------------------ several texts, several processes

def test_batches_in_two_processes(shipped):
    texts = [t for kind in KINDS for t in fuzz(kind)[:100]] + ["", "a<|im_end|>"] + [STORIES[:700_000]]
    try:
        arrays = list(shipped.encode_iter(iter(texts), num_proc=2))
        assert [a.tolist() for a in arrays] == [shipped.encode_ordinary(t) for t in texts]
        [again] = shipped.encode_iter(["still here"], num_proc=2)
        assert again.tolist() == shipped.encode("still here")
    finally:
        shipped.close()


def test_an_endless_stream_is_read_as_needed(shipped):
    import itertools
    texts = (f"text {i}" for i in itertools.count())
    first = list(itertools.islice(shipped.encode_iter(texts), 3))
    assert [shipped.decode(ids) for ids in first] == ["text 0", "text 1", "text 2"]


def test_one_text_is_no_batch(shipped):
    with pytest.raises(TypeError, match="put it in a list"):
        shipped.encode_iter("abc")


def test_arrays_are_the_lists(gpt2):
    ids = gpt2.encode_array(STORIES[:10_000])
    assert ids.dtype == np.uint16 and ids.tolist() == gpt2.encode(STORIES[:10_000])
    assert gpt2.encode("") == [] and gpt2.encode_array("").shape == (0,)


def test_copies_through_pickle_are_equal(shipped):
    again = pickle.loads(pickle.dumps(shipped))
    assert again.token_bytes == shipped.token_bytes and again.special_tokens == shipped.special_tokens
    assert again.encode(STORIES[:5000]) == shipped.encode(STORIES[:5000])


def test_a_full_cache_starts_afresh(gpt2):
    cache = fast_bpe.PieceCache(fast_bpe.WordEncoder(gpt2._ids, gpt2.merges), "H", limit=50)
    for unit in fast_bpe._split_units(STORIES[:20_000]):
        assert np.frombuffer(cache[unit], np.uint16).tolist() == gpt2.encode(unit)
        assert len(cache) <= 50


def test_merge_tree_has_the_tokens_of_the_encoder(gpt2):
    def leaves(tree):
        token, left, right = tree
        return [token] if left is None else leaves(left) + leaves(right)
    for word in split_words(STORIES)[100:115] + [" unforgettably"]:
        trees = bpe.merge_tree(gpt2, word)
        assert [gpt2.token_bytes.index(t[0]) for t in trees] == gpt2.encode(word)
        assert b"".join(b for t in trees for b in leaves(t)) == word.encode()
