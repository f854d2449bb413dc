"""Lesson 07: what a conversation may be, its ids and its loss mask, and the template that gives the same elsewhere."""
import random

import numpy as np
import pytest

from exercise_cells import exercises, said
from minigpt.chat_format import (
    CHAT_TEMPLATE, ChatRenderer, MaskView, Rendered, RowEncoder, break_marks, check_messages)
from minigpt.engine.dataset_readers import load_chats
from minigpt.engine.tokenizer import Tokenizer
from small_data import A, S, chats, talk, tok  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def renderer(tok):
    return ChatRenderer(tok)


# ------------------------------------------------------------------ messages

def test_a_system_message_alone_is_refused(renderer):
    for call in (check_messages, renderer.render, renderer.prompt):
        with pytest.raises(ValueError, match="a system message alone is no conversation: the user has to begin"):
            call(talk(system="Be kind."))
    assert check_messages(talk("Hi", system="Be kind.")) == talk("Hi", system="Be kind.")


# ------------------------------------------------------------------ rendering

PIECES = ["Hello", " there", "  ", "\n", "\n\n", "\t", "é", "日本", "🦊", "!", "<|im_end|>", "<|im_start|>",
          "<|endoftext|>", "assistant\n", " 12", "'s", "\u00a0", "\r\n", "\x1c", "\u2028", "#"]


def random_chats(n, pieces, seed=0):
    rng = random.Random(seed)
    text = lambda: "".join(rng.choice(pieces) for _ in range(rng.randrange(0, 9)))
    return [talk(*(text() for _ in range(2 * rng.randrange(1, 4))),
                 system=rng.choice([None, text() + "x"])) for _ in range(n)]


def reference_mask(ids, tok):
    """1 from behind each `<|im_start|>assistant\\n` up to its `<|im_end|>`, found in the ids alone."""
    start, end = tok.special_tokens["<|im_start|>"], tok.special_tokens["<|im_end|>"]
    head = [start, *tok.encode_ordinary("assistant\n")]
    mask, on = [0] * len(ids), False
    for n, i in enumerate(ids):
        mask[n] = int(on)
        on = (on and i != end) or ids[n + 1 - len(head):n + 1] == head if n + 1 >= len(head) else False
    return mask


@pytest.fixture(scope="module")
def hf(tok, tmp_path_factory):
    from transformers import AutoTokenizer
    folder = tmp_path_factory.mktemp("tok")
    tok.save_pretrained(folder, overwrite=True)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_equal_apply_chat_template(hf, renderer, chats, ledger):
    """transformers, with the tokenizer and template that we save, gives our ids and mask; 0 conversations differ."""
    assert hf.chat_template == CHAT_TEMPLATE
    plain = [p for p in PIECES if "<|" not in p]
    every = [c["messages"] for c in chats + load_chats("held")] + random_chats(300, plain)
    differ = 0
    for messages in every:
        theirs = hf.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        differ += (theirs["input_ids"], theirs["assistant_masks"]) != renderer.render(messages)
        asked = messages[:-1]
        ids = hf.apply_chat_template(asked, tokenize=True, return_dict=False, add_generation_prompt=True)
        differ += list(ids) != renderer.prompt(asked)
    ledger("chats whose ids differ from apply_chat_template", differ, peer="transformers", bound=0)
    assert differ == 0 and len(every) > 2000


NESTED = ["<|im_<|im_end|>end|>", "<|<|im_start|>im_start|>", "<|im_end|><|im_start|>", "<|im_start|><|endoftext|>", "< |",
          "<|im_end|", "|>", "<", "im_start|>"]


def test_no_text_opens_a_turn_under_transformers(hf, tok):
    special = set(tok.special_tokens.values())
    for messages in random_chats(400, PIECES + NESTED, seed=4):
        turns = [m for m in messages if m["role"] != S]
        ids = hf.apply_chat_template(messages, return_dict=False)
        assert [i for i in ids if i in special] == [0] + [1, 2] * len(turns)
        ids = hf.apply_chat_template(messages[:-1], return_dict=False, add_generation_prompt=True)
        assert [i for i in ids if i in special] == [0] + [1, 2] * (len(turns) - 1) + [1]


def test_marks_are_broken_and_nothing_else(tok):
    special = set(tok.special_tokens.values())
    assert break_marks("a <|im_end|>b< |<|end") == "a <| im_end|>b< |<|end"
    for messages in random_chats(400, PIECES + NESTED, seed=6):
        for text in (m["content"] for m in messages):
            broken = break_marks(text)
            assert not special & set(tok.encode(broken, allowed_special="all"))
            assert broken.replace("<| im_", "<|im_").replace("<| end", "<|end") == text


def test_a_broken_mark_is_all_that_the_template_changes(hf, tok, renderer):
    for messages in random_chats(200, PIECES + NESTED, seed=5):
        mild = [m | {"content": break_marks(m["content"])} for m in messages]
        assert hf.apply_chat_template(messages, return_dict=False) == renderer.render(mild).ids


def test_trl_can_train_with_the_template_as_it_is(hf):
    """It replaces templates without a loss mask or whose beginning depends on what follows; None: nothing to do."""
    utils = pytest.importorskip("trl.chat_template_utils")
    assert utils.has_generation_markers(hf.chat_template) and utils.get_training_chat_template(hf) is None


@pytest.mark.parametrize("messages, due", [
    (talk("a", "b")[::-1], "user"), (talk("a") * 2, "assistant"), (talk(system="x") * 2 + talk("a"), "user"),
    (talk("a") + talk(system="x"), "assistant"), ([{"role": "user\nHi<|im_end|>", "content": "a"}], "user"),
    ([{"role": "tool", "content": "a"}], "user")])
def test_the_template_refuses_what_we_refuse(hf, messages, due):
    from jinja2 import TemplateError
    with pytest.raises(TemplateError, match=f"(?s)the role is .* where {due} is due"):
        hf.apply_chat_template(messages)
    with pytest.raises(ValueError, match=f"where '{due}' is due"):
        check_messages(messages)


@pytest.mark.parametrize("bad, said", [
    ("hi", "expected a list of messages, got 'hi'"), ([], r"expected a list of messages, got '\[\]'"),
    (["hi"], "message 0: the field 'role' is missing; .*, not hi"),
    ([{"role": "user", "text": "hi"}], "the field 'content' is missing; .*, not {'role': 'user', 'text': 'hi'}"),
    ([{"role": "user", "content": None}], "'content' must be a text, not None"),
    ([{"role": "user", "content": [{"type": "text"}]}], r"'content' must be a text, not \[{'type': 'text'}\]"),
    (talk("a") + [{"role": "bot", "content": "b"}], "message 1: the role is 'bot' where 'assistant' is due")])
def test_bad_conversations_are_named(bad, said):
    with pytest.raises(ValueError, match=f"^my.jsonl, line 3(: |, ).*{said}"):
        check_messages(bad, "my.jsonl, line 3")


def test_labels_are_what_cross_entropy_counts(renderer, chats):
    import torch
    import torch.nn.functional as F
    rendered = renderer.render(chats[0]["messages"])
    logits = torch.randn(len(rendered.ids), renderer.tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
    each = F.cross_entropy(logits, torch.tensor(rendered.ids), reduction="none")
    counted = each[torch.tensor(rendered.mask, dtype=torch.bool)]
    assert torch.allclose(F.cross_entropy(logits, torch.tensor(rendered.labels)), counted.mean())
    assert 0 < len(counted) < len(rendered.ids)


def test_mask_counts_the_answers_and_their_end(tok, renderer, chats):
    for messages in [c["messages"] for c in chats] + random_chats(200, PIECES, seed=1):
        rendered = renderer.render(messages)
        assert rendered.mask == reference_mask(rendered.ids, tok)
        counted = [tok.decode(ids) for ids in runs(rendered)]
        assert counted == [m["content"].strip() + "<|im_end|>" for m in messages if m["role"] == A]


def runs(rendered):
    found, on = [], 0
    for i, counts in zip(*rendered):
        if counts and not on:
            found.append([])
        if counts:
            found[-1].append(i)
        on = counts
    return found


def test_text_cannot_open_a_turn(tok, renderer):
    special = set(tok.special_tokens.values())
    for messages in random_chats(300, PIECES, seed=2):
        ids = renderer.render(messages).ids
        turns = [m for m in messages if m["role"] != S]
        assert [i for i in ids if i in special] == [0] + [1, 2] * len(turns)


def test_system_text_goes_before_the_first_user_text(tok, renderer):
    with_system = renderer.render(talk("Hi", "Hello", "Bye", "Bye", system=" Be kind. "))
    assert with_system == renderer.render(talk("Be kind.\n\nHi", "Hello", "Bye", "Bye"))
    assert renderer.render(talk("Hi", "Yo", system="  ")) == renderer.render(talk("Hi", "Yo"))


def test_cut_at_a_turn(tok, renderer):
    for messages in random_chats(40, PIECES[:4] + ["a longer run of words here"], seed=3):
        whole = renderer.render(messages)
        ends = [0]  # lengths at which an answer is complete
        for n, (i, counts) in enumerate(zip(*whole)):
            if counts and i == renderer.im_end:
                ends.append(n + 2)
        for room in range(0, len(whole.ids) + 2):
            cut = renderer.render(messages, max_length=room)
            want = max(e for e in ends if e <= room)
            assert cut.ids == whole.ids[:want] and cut.mask == whole.mask[:want]


def test_unanswered_end_is_kept_unless_cut(renderer):
    messages = talk("one", "two", "three")
    assert renderer.render(messages).ids[-1] == renderer.newline[-1]
    assert sum(renderer.render(messages).mask) == sum(renderer.render(messages[:2]).mask)


def test_prompt_drops_the_oldest_and_keeps_system_and_question(tok, renderer):
    messages = talk("first question", "first answer", "second", "reply", "the last", system="Rules.")
    lengths = set()
    for room in range(len(renderer.prompt(messages)) + 1, 0, -1):
        try:
            ids = renderer.prompt(messages, max_length=room)
        except ValueError as error:
            assert "shorten" in str(error)
            break
        text = tok.decode(ids)
        assert len(ids) <= room and text.count("Rules.\n\n") == 1 and "the last" in text
        assert text.startswith("<|endoftext|><|im_start|>user\nRules.") and text.endswith("<|im_start|>assistant\n")
        lengths.add(len(ids))
    assert len(lengths) == 3  # all, without one exchange, without both
    assert messages == talk("first question", "first answer", "second", "reply", "the last", system="Rules.")
    with pytest.raises(ValueError, match="must end with a user message"):
        renderer.prompt(messages[:3])


def test_stop_ids_and_missing_special_tokens(renderer):
    assert renderer.stop_ids == {0, 2}
    with pytest.raises(ValueError, match=r"<\|im_start\|>, <\|im_end\|>"):
        ChatRenderer(Tokenizer.from_pretrained("gpt2"))


def test_mask_view_escapes_and_marks(tok, renderer):
    view = MaskView(renderer.render(talk("<b>?", "<i>")), tok)
    page = view._repr_html_()
    assert "&lt;b&gt;?" in page and "<b>" not in page and page.count("<span") == 3
    assert repr(view).endswith("[<i><|im_end|>]\n") and repr(view).count("[") == 1


def test_rows_of_both_kinds_become_bytes(tok, renderer):
    encoder = RowEncoder(tok, masked=True, max_length=20)
    ids, mask = encoder.row("Hello there")
    assert np.frombuffer(ids, np.uint16).tolist() == [0, *tok.encode_ordinary("Hello there")]
    assert list(mask) == [1] * (len(ids) // 2)
    ids, mask = encoder.row({"messages": talk("Hi", "Hello")})
    assert Rendered(np.frombuffer(ids, np.uint16).tolist(), list(mask)) == renderer.render(talk("Hi", "Hello"))
    assert encoder.row({"messages": talk("word " * 30, "Hello")}) == (b"", b"")
    for bad in (3, {"text": "a"}, None):
        with pytest.raises(TypeError, match="expected a text"):
            encoder.row(bad)


# ------------------------------------------------------------------ exercises

WRONG = ["def from_quiz(row):\n    return [{'role': 'user', 'content': row['question']},"
         " {'role': 'assistant', 'content': row['answers'][0]}]",
         "def last_answer_only(rendered):\n    return rendered",
         "def collate(batch):\n    rows = [torch.tensor(r.ids + [0] * (4 - len(r.ids))) for r in batch]\n"
         "    return torch.stack(rows)[:, :-1], torch.stack(rows)[:, 1:]",
         "def begun(messages):\n    return renderer.render(messages).ids"]


def test_exercises(tok, renderer, chats, capsys):
    import torch
    three = next(c["messages"] for c in chats if len(c["messages"]) == 6)
    names = {"tok": tok, "renderer": renderer, "three": three, "Rendered": Rendered, "MaskView": MaskView, "torch": torch,
             "check_messages": check_messages, "end": 2, "bees": talk("What do bees make?", "Honey."),
             "cows": talk("And cows?")[0]}
    found = exercises("07")
    assert [number for number, *_ in found] == ["07.1", "07.2", "07.3", "07.4"]
    for (_, empty, check, solution), wrong in zip(found, WRONG):
        assert said(empty, check, names, capsys) == "not solved yet"
        assert said(solution, check, names, capsys) == "correct"
        assert said(wrong, check, names, capsys) not in ("correct", "not solved yet")
