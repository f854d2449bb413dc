"""Text as it comes: pieces of any text, stop strings anywhere, cancelling from another thread."""
import random
import threading

import pytest
from test_generation import model, prompts, tokenizer  # noqa: F401

from minigpt.deeper.speculative import NGramDraft, speculate
from minigpt.engine.streaming import StopStrings, TextStream, generate_text, stream_text
from minigpt.generation import Options, generate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pieces_of_any_text_and_any_stop_string(tokenizer):  # noqa: F811
    rng, alphabet = random.Random(0), ["a", "b", "ab", "\n", " ", "é", "日本", "😀", "👩‍👧", "User:", "."]
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 14)))
        stops = ["".join(rng.choices(alphabet, k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        pieces = TextStream(tokenizer, iter(tokenizer.encode_ordinary(text)), stops)
        shown = ""
        for piece in pieces:
            shown += piece
            assert piece and "\ufffd" not in piece
            assert text.startswith(shown) and not any(stop in shown for stop in stops)
        places = [text.find(stop) for stop in stops if stop in text]
        assert shown == pieces.text == (text[:min(places)] if places else text)
        assert pieces.finish_reason == "stop"


def test_half_a_character_at_the_end_is_dropped(tokenizer):  # noqa: F811
    ids = tokenizer.encode_ordinary("ok 😀")
    pieces = TextStream(tokenizer, iter(ids[:-1]))
    assert "".join(pieces) == "ok "


def test_cancel_from_another_thread(model, tokenizer, prompts):  # noqa: F811
    event, said = threading.Event(), []
    pieces = stream_text(model, tokenizer, prompts[0], Options(max_new_tokens=400, seed=0, stop_ids=()), cancel=event)

    def read():
        for piece in pieces:
            said.append(piece)
            started.set()
            event.wait(30)

    started = threading.Event()
    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(30)
    event.set()
    thread.join(30)
    assert not thread.is_alive() and pieces.finish_reason == "cancelled"
    assert "".join(said) == pieces.text and len(said) <= 2


def test_stop_strings_end_a_drawn_text(model, tokenizer):  # noqa: F811
    options = Options(temperature=0, max_new_tokens=40)
    full = generate_text(model, tokenizer, "One day a dog", options)
    stop = full[7:10]
    assert generate_text(model, tokenizer, "One day a dog", options, stop=[stop]) == full[:full.index(stop)]


def test_rows_leave_at_their_stop_string(model, tokenizer, prompts):  # noqa: F811
    """Each row of a batch ends with the token that completes a stop string, wherever its bytes lie in the tokens."""
    stops = [" the", "a s", "."]
    options = dict(temperature=0, max_new_tokens=16, stop_ids=())
    whole = generate(model, prompts[1:24:2], **options)
    texts = generate(model, prompts[1:24:2], stop_when=StopStrings(tokenizer, stops), **options)
    ended = 0
    for text, full in zip(texts, whole):
        ends = [n for n in range(17) if any(stop in tokenizer.decode(full.ids[:n]) for stop in stops)]
        assert text.ids == full.ids[:ends[0] if ends else 16]
        assert text.finish_reason == ("stop" if ends else "length")
        ended += bool(ends)
    assert 3 < ended and len({len(text.ids) for text in texts}) > 3
    other = speculate(model, NGramDraft(), prompts[1], stop_when=StopStrings(tokenizer, stops), **options)
    assert list(other) == texts[0].ids and other.finish_reason == texts[0].finish_reason


def test_stop_strings_in_any_text(tokenizer):  # noqa: F811
    rng, alphabet = random.Random(1), ["a", "b", "ab", "\n", " ", "é", "日本", "😀", "."]
    for _ in range(200):
        ids = tokenizer.encode_ordinary("".join(rng.choices(alphabet, k=rng.randrange(1, 12))))
        stops = ["".join(rng.choices(alphabet, k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 3))]
        ended = StopStrings(tokenizer, stops)
        texts = [tokenizer.decode_bytes(ids[:n]) for n in range(len(ids) + 1)]
        first = next((n for n, text in enumerate(texts) if any(s.encode() in text for s in stops)), None)
        assert next((n for n in range(len(ids) + 1) if ended(ids[:n])), None) == first


def test_bad_input(model, tokenizer):  # noqa: F811
    for stops in ("ab", ["a", ""]):
        with pytest.raises(ValueError, match="stop_strings"):
            TextStream(tokenizer, iter([]), stops)
    with pytest.raises(ValueError, match="strings=''"):
        StopStrings(tokenizer, "")
    with pytest.raises(ValueError, match="prompt=''"):
        generate_text(model, tokenizer, "")
