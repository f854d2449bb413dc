"""The everyday questions: their rows, the judge, and how a model is asked."""
import hashlib
import inspect
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from minigpt.bpe import BPETokenizer
from minigpt.chat import ChatSession
from minigpt.engine.hub import load_pair
from minigpt.engine.everyday import (
    EVERYDAY, KINDS, SESSION, ask_rows, count_items, everyday, everyday_table, judge, load_everyday, split_turns,
    well_formed)
from minigpt.evaluation import wilson
from minigpt.gpt2 import GPT2, GPT2Config

HERE = Path(__file__).resolve().parent
ROWS = load_everyday()
ANSWERS = {row["id"]: row for row in map(json.loads, (HERE / "everyday_answers.jsonl").read_text("utf-8").splitlines())}


def flat(patterns):
    return [one for p in patterns for one in (flat(p) if isinstance(p, list) else [p])]


# ------------------------------------------------------------------ the rows

def test_every_kind_has_enough_rows_and_half_of_them_are_final():
    count = Counter((row["kind"], row["half"]) for row in ROWS)
    for kind in KINDS:
        assert count[kind, "tune"] == count[kind, "final"] >= 20
    assert len({row["id"] for row in ROWS}) == len(ROWS) == sum(count.values())
    assert {row["kind"] for row in ROWS} == set(KINDS)


def test_the_hash_of_the_id_draws_the_half():
    def digest(row):
        return hashlib.sha256(row["id"].encode()).hexdigest()
    for one, two in zip(ROWS[::2], ROWS[1::2]):
        (name, first), (other, second) = (row["id"].split("-") for row in (one, two))
        assert name == other and int(first) % 2 and int(second) == int(first) + 1
        final, tune = sorted((one, two), key=digest)
        assert (final["half"], tune["half"]) == ("final", "tune"), final["id"]


def test_rows_hold_what_they_should():
    assert EVERYDAY.stat().st_size <= 120_000 and (HERE / "everyday_answers.jsonl").stat().st_size <= 150_000
    for row in map(json.loads, EVERYDAY.read_text("utf-8").splitlines()):
        assert {"id", "kind", "half", "turns", "accept", "reject", "note"} == set(row) - {"form"}
        assert row["accept"] and all(isinstance(row[key], list) for key in ("turns", "accept", "reject"))
        for part in split_turns(row["turns"]):
            assert part[-1]["role"] == "user" and all(message["content"].strip() for message in part)
        if row["kind"] == "context":
            assert re.fullmatch(r"Context: .+\n\nQuestion: [^\n]+", row["turns"][0], re.S), row["id"]
        assert (len(row["turns"]) > 1) == (row["kind"] == "recall")
    asked = [json.dumps(row["turns"]).lower() for row in ROWS]
    assert len(set(asked)) == len(asked)


def test_patterns_are_plain_lower_case_with_numbers_as_digits():
    words = r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|fifty)\b"
    for row in ROWS:
        for pattern in flat(row["accept"] + row["reject"]):
            re.compile(pattern)
            assert not pattern.startswith("@") and not re.search(words, pattern), row["id"]
            assert re.sub(r"\\[A-Z]", "", pattern) == re.sub(r"\\[A-Z]", "", pattern).lower(), row["id"]


def test_a_part_of_the_rows_can_be_had():
    some = load_everyday("tune", ["sums", "facts"])
    assert [row["id"] for row in some] == [r["id"] for r in ROWS
                                           if r["half"] == "tune" and r["kind"] in ("sums", "facts")]
    with pytest.raises(ValueError, match="no kind 'poems'"):
        load_everyday(kinds=["sums", "poems"])
    with pytest.raises(ValueError, match="half='all'"):
        load_everyday("all")


# ------------------------------------------------------------------ the judge

def test_the_judge_accepts_a_right_answer_to_every_question_and_refuses_a_wrong_one():
    assert set(ANSWERS) == {row["id"] for row in ROWS}
    refused = [row["id"] for row in ROWS if not judge(row, [ANSWERS[row["id"]]["right"]])]
    accepted = [row["id"] for row in ROWS if judge(row, [ANSWERS[row["id"]]["wrong"]])]
    assert (refused, accepted) == ([], [])


def test_no_question_is_its_own_answer_and_no_answer_fits_everywhere():
    for row in ROWS:
        asked = split_turns(row["turns"])[-1][-1]["content"]
        assert not judge(row, [asked]) and not judge(row, [asked + "."]) and not judge(row, [""]), row["id"]
    fits = {said: {row["kind"] for row in ROWS if judge(row, [said])} for said in (
        "I do not know.", "The text does not say.", "Sorry, I don't understand. What do you mean?",
        "I can't help with that. Is there something else you would like to talk about?")}
    assert list(fits.values()) == [{"context", "limits"}, {"context"}, {"limits"}, {"limits"}]


def test_patterns_are_of_the_matter():
    """Right answers to other questions are mostly refused: a pattern that lets every eighth pass says little."""
    right = [answers["right"] for answers in ANSWERS.values()]
    for row in ROWS:
        others = sum(judge(row, [said]) for said in right) - 1
        assert others <= len(right) / 8, f"{row['id']} accepts {others} right answers to other questions"


@pytest.mark.parametrize("said, right", [
    ("9 + 6 = 15.", True), ("It's fifteen!", True), ("15", True), ("15 is the sum of 9 and 6.", True),
    ("9 + 15 = 24.", False), ("It is 15, or maybe 16.", False), ("1.15", False), ("15.5", False), ("1,500", False),
    ("First 9 + 1 = 10, then 10 + 5 = 15.", True), ("It is fifty-one.", False), ("9 6", False)])
def test_a_sum_is_right_by_its_last_new_number(said, right):
    row = {"kind": "sums", "turns": ["what do 9 and six make"], "accept": ["15"], "reject": []}
    assert judge(row, [said]) == right


def test_words_count_whole_and_lists_need_all():
    row = {"kind": "tasks", "turns": ["q"], "accept": [["boats?", "s"]], "reject": ["ice|21"]}
    assert judge(row, ["A boat 's' swims."]) and judge(row, ["Boats: S."])
    assert not judge(row, ["The boat's oar."]) and not judge(row, ["houseboat s"])
    assert judge(row, ["nice boats s"]) and not judge(row, ["boat s twenty-one"]) and judge(row, ["boat s 121"])


def test_form():
    assert well_formed("One two three.", {"words": [3, 3], "sentences": [1, 1], "prose": True})
    assert not well_formed("One two three", {"prose": True}) and not well_formed("One, two,", {"prose": True})
    assert well_formed("He said: \"Stop!\"", {"prose": True}) and well_formed("Fine :)", {"prose": True})
    assert not well_formed("It is. It was.", {"sentences": [1, 1]})
    assert well_formed("a b c d " * 2, {}) and not well_formed("a b c d " * 3, {})
    assert [count_items(text) for text in ("Tea.", "Tea, milk and jam.", "Tea, milk, and jam", "1. Tea\n2. Jam, red",
                                           "- a, b\n- c\n- d", "tea or milk")] == [1, 3, 3, 2, 3, 2]


# ------------------------------------------------------------------ asking a model

def test_turns_are_split_where_the_model_answers():
    def say(role, content):
        return {"role": role, "content": content}
    assert split_turns(["a", "b"]) == [[say("user", "a")], [say("user", "b")]]
    fixed = [say("user", "a"), say("assistant", "b"), say("user", "c")]
    assert split_turns(fixed) == [fixed]
    assert split_turns([*fixed, "d"]) == [fixed, [say("user", "d")]]


def test_the_session_settings_are_those_of_a_chat():
    defaults = inspect.signature(ChatSession).parameters
    assert SESSION == {name: defaults[name].default for name in SESSION}


def test_a_model_says_in_the_evaluation_what_it_says_in_a_chat():
    model, tokenizer = load_pair()
    rows = [next(row for row in load_everyday("tune", [kind])) for kind in ("recall", "facts", "sums", "tasks")]
    said = ask_rows(model, tokenizer, rows, max_new_tokens=40)
    for row, answers in zip(rows, said):
        session = ChatSession(model, tokenizer, temperature=0, repetition_penalty=1, max_new_tokens=40)
        assert answers == [session.reply(turn).strip() for turn in row["turns"]], row["id"]
    drawn = ask_rows(model, tokenizer, rows, seed=3, max_new_tokens=40, **SESSION)
    assert drawn != said and drawn[-1:] == ask_rows(model, tokenizer, rows[-1:], seed=3, max_new_tokens=40, **SESSION)
    assert drawn != ask_rows(model, tokenizer, rows, seed=4, max_new_tokens=40, **SESSION)


def test_counts_are_means_over_seeds_of_what_the_judge_says():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20000, block_size=256)).eval()
    tokenizer = BPETokenizer.from_pretrained()
    options = {"max_new_tokens": 12, "temperature": 1.0}
    found = everyday(model, tokenizer, half="tune", kinds=["limits", "sums"], seeds=(1, 2), **options)
    right = Counter()
    for seed in (1, 2):
        for kind in ("sums", "limits"):
            rows = load_everyday("tune", [kind])
            said = ask_rows(model, tokenizer, rows, seed=seed, **options)
            right[kind] += sum(map(judge, rows, said)) / 2
    assert {kind: (count.n, count.right) for kind, count in found.items()} == {
        "sums": (24, right["sums"]), "limits": (24, right["limits"]), "all": (48, right.total())}
    assert found["all"][2:] == wilson(right.total(), 48)[1:3]
    lines = everyday_table({"tiny": found, "again": found}).splitlines()
    assert [line.split()[0] for line in lines] == ["tiny", "sums", "limits", "all"]
    assert lines[-1].count(" of  48 ") == 2


@pytest.mark.parametrize("right, n", [(0, 24), (3, 24), (18, 24), (24, 24), (131, 192)])
def test_wilson_is_scipys(right, n):
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((right / n, theirs.low, theirs.high, n), abs=1e-5)
