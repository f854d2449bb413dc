"""deeper/curation: near copies found as the plain way finds them, and mixing by weight."""
import random
from collections import Counter

import numpy as np
import pytest

from exercise_cells import exercises, said
from minigpt.data import text_of
from minigpt.deeper import curation
from minigpt.deeper.curation import min_hashes, mix, near_copies, shingles, similarity
from minigpt.engine.dataset_readers import load_chats, load_text


def test_similarity_by_hand():
    a, b = shingles("the cat sat on the mat"), shingles("the cat sat on the rug")
    assert a == {"the cat sat", "cat sat on", "sat on the", "on the mat"} and similarity(a, b) == 3 / 5
    assert similarity(a, shingles("quite another text here")) == 0


@pytest.mark.parametrize("text", ["", "a", "two words", " \n"])
def test_short_texts_are_like_themselves_and_nothing_is_divided_by_zero(text):
    assert similarity(shingles(text), shingles(text)) == 1 and similarity(set(), set()) == 1
    assert similarity(shingles(text), shingles("something else here")) == 0
    assert (min_hashes(shingles(text)) == min_hashes(shingles(text))).all()


def test_signatures_agree_as_often_as_the_sets_are_similar():
    """Over pairs of every similarity the mean error is that of a coin thrown 1,024 times, and there is no bias."""
    rng, errors = random.Random(0), []
    for n in range(60):
        words = [str(rng.random()) for _ in range(60)]
        a, b = set(words[:40]), set(words[n % 40:])
        share = (min_hashes(a, 1024, seed=n) == min_hashes(b, 1024, seed=n)).mean()
        errors.append(share - similarity(a, b))
    assert np.abs(errors).max() < 4.5 * 0.5 / 32 and abs(np.mean(errors)) < 0.004


def test_near_copies_are_those_of_all_comparisons():
    texts = [text_of(chat) for chat in load_chats()] + load_text(limit=300)
    rng = random.Random(1)
    texts += [" ".join("new" if rng.random() < 0.04 else word for word in text.split()) for text in texts[-100:]]
    sets = [shingles(text) for text in texts]
    every = [(i, j, s) for j in range(len(sets)) for i in range(j) if (s := similarity(sets[i], sets[j])) >= 0.6]
    found = near_copies(texts, 0.6)
    assert set(found) <= {(i, j) for i, j, _ in every} and len(every) > 60
    assert {(i, j) for i, j, s in every if s >= 0.75} <= set(found)  # missed with a chance of 5 in a million
    assert near_copies(["a b c d"] * 3) == [(0, 1), (0, 2), (1, 2)] and near_copies([]) == []


def test_mix_follows_the_weights():
    sources = [[("a", n) for n in range(6000)], [("b", n) for n in range(6000)], [("c", 0)]]
    mixed = list(mix(sources, [3, 1, 0], seed=5))
    share = Counter(name for name, _ in mixed)
    assert abs(share["a"] / len(mixed) - 0.75) < 0.02 and share["c"] == 0
    for name in "ab":
        numbers = [n for m, n in mixed if m == name]
        assert numbers == list(range(len(numbers)))  # each source in its own order
    assert share["a"] == 6000 and mixed == list(mix(sources, [3, 1, 0], seed=5))
    assert mixed != list(mix(sources, [3, 1, 0], seed=6))
    again = Counter(mix([["x"] * 500, ["y"] * 3], [1, 1], stop="all"))
    assert again["x"] == 500 and 400 < again["y"] < 600


@pytest.mark.parametrize("bad, says", [
    (([["a"]], [1, 2], {}), "1 sources need as many weights"), (([["a"]], [-1], {}), "0 or more"),
    (([["a"]], [0], {}), "not all 0"), (([], [], {}), "0 sources"), (([["a"]], [1], {"stop": "never"}), "stop='never'"),
    (([["a"], []], [1, 1], {}), "source 1 of the mix is empty")])
def test_mix_refuses_bad_weights(bad, says):
    with pytest.raises(ValueError, match=says):
        mix(*bad[:2], **bad[2])


def test_mix_reads_each_source_to_its_end():
    """stop="first" ends when a source is asked for more than it has; "all" when each was read whole."""
    for seed in range(20):
        first = mix(["abc", "0123456789"], [1, 1], seed)
        assert "".join(x for x in first if x.isalpha()) == "abc"[:sum(x.isalpha() for x in first)]
        assert "abc" in "".join(x for x in first if x.isalpha()) or "9" in first
        every = mix(["abc", "01"], [1, 1], seed, stop="all")
        assert set(every) == set("abc01")


WRONG = ["def containment(a, b):\n    return similarity(shingles(a), shingles(b))",
         "def tempered(sizes, alpha):\n    return [size / sum(sizes) for size in sizes]",
         "def groups(count, pairs):\n    first = list(range(count))\n    for i, j in pairs:\n        first[j] = first[i]\n"
         "    return first"]


def test_exercises(capsys):
    found = exercises("deeper/curation")
    assert len(found) == 3
    for (_, empty, check, solution), wrong in zip(found, WRONG):
        names = vars(curation) | {"np": np}
        assert said(empty, check, names, capsys) == "not solved yet"
        assert said(solution, check, names, capsys) == "correct"
        assert said(wrong, check, names, capsys) not in ("correct", "not solved yet")
