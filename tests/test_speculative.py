"""Speculative decoding: the same tokens, the same distribution, whatever the draft; and the lesson's table."""
import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exercise_cells import exercises, said
from test_generation import model, prompts, tiny, tokenizer  # noqa: F401

from minigpt.deeper.fast_decoding import Decoder
from minigpt.deeper.speculative import ModelDraft, NGramDraft, _verify, speculate
from minigpt.engine.logits_processors import BannedTokens
from minigpt.generation import Options, generate, pick, process

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


def test_log_probabilities_are_the_models_own():
    """Whatever the processors did: one pass of the model over the text gives the same numbers."""
    model = tiny()  # noqa: F811
    options = Options(max_new_tokens=9, repetition_penalty=1.4, processors=[BannedTokens([3, 4])], seed=1, temperature=0.8)
    tokens = speculate(model, tiny(5), [1, 2], options)
    list(tokens)
    text = tokens.result
    with torch.no_grad():
        logp = model(torch.tensor([[1, 2] + text.ids]))[0, 1:-1].log_softmax(-1)
    want = logp.gather(-1, torch.tensor(text.ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(text.logprobs), want, atol=1e-4) and text.steps > 0


class Wild:
    """A draft that guesses at random, and says so."""

    def start(self, prompt):
        q = torch.full((50,), 1 / 50, dtype=torch.float64)
        return lambda ids, count, rng: ([rng.randrange(50) for _ in range(count)], [q] * count)


class Silent:
    """A draft that has nothing to say."""

    def start(self, prompt):
        return lambda ids, count, rng: ([], None)


@pytest.mark.parametrize("name", ["itself", "other", "ngram", "wild", "nothing"])
@pytest.mark.parametrize("guesses", [1, 3, 6])
def test_speculation_keeps_greedy_tokens(name, guesses):
    model = tiny()  # noqa: F811
    options = Options(temperature=0, max_new_tokens=20, stop_ids=[13], repetition_penalty=1.1)
    for first in range(6):
        draft = {"itself": model, "other": tiny(9), "ngram": NGramDraft(), "wild": Wild(), "nothing": Silent()}[name]
        want = generate(model, [first, 5, first], options)
        tokens = speculate(model, draft, [first, 5, first], options, guesses=guesses)
        assert list(tokens) == want.ids and tokens.finish_reason == want.finish_reason
        if name == "itself":  # every guess is right
            assert tokens.result.steps <= -(-(want.steps - 1) // (guesses + 1)) + 1


def test_speculation_on_the_shipped_model(model, prompts):  # noqa: F811
    decoder, draft = Decoder(model), NGramDraft(prompts)
    options = Options(temperature=0, max_new_tokens=12, stop_ids=[0, 1, 2])
    for ids in prompts[:10]:
        assert list(speculate(model, draft, ids, options, decoder=decoder)) == generate(
            model, ids, options, decoder=decoder).ids


@pytest.mark.parametrize("size", [3, 12, 31])
def test_a_draft_with_a_smaller_context(size):
    model, draft = tiny(), tiny(9, block_size=size)  # noqa: F811
    options = Options(temperature=0, max_new_tokens=20)
    want = generate(model, [5, 6, 7, 8], options)
    assert list(speculate(model, draft, [5, 6, 7, 8], options)) == want.ids


def in_turn(order):
    """A processor that allows order[step] alone, and nothing at all afterwards."""
    def only(ids, logits, step):
        allowed = order[step:step + 1]
        return logits.index_fill(-1, torch.tensor([i for i in range(50) if i not in allowed]), -torch.inf)
    return only


def test_a_draft_counts_new_tokens_as_the_model_does():
    model, order = tiny(), [3, 1, 4, 1, 5, 9, 2, 6, 5]  # noqa: F811
    options = Options(temperature=0, max_new_tokens=9, processors=[in_turn(order)])
    tokens = speculate(model, model, [7, 8], options, guesses=3)
    assert list(tokens) == order
    assert tokens.result.steps == 3  # one token, then twice three right guesses and one for free
    draft = ModelDraft(model, options)
    for prompt in ([7], [2, 2, 2, 2]):  # one draft for prompts of several lengths
        assert speculate(model, draft, prompt, options, guesses=3).result.steps == 0
        tokens = speculate(model, draft, prompt, options, guesses=3)
        assert len(list(tokens)) == 9 and tokens.result.steps == 3


def test_one_draft_serves_several_texts_in_turn():
    """Two texts drawn token by token in turn, from one draft of each kind: nothing of one gets into the other."""
    model = tiny()  # noqa: F811
    options = Options(temperature=0, max_new_tokens=9, stop_ids=(), processors=[in_turn([3, 1, 4, 1, 5, 9, 2, 6, 5])])
    for draft in (ModelDraft(model, options), NGramDraft([[3, 1, 4, 1, 5, 9, 2, 6, 5]])):
        both = [speculate(model, draft, prompt, options, guesses=3) for prompt in ([7], [2, 2, 2, 2])]
        drawn = list(zip(*both))
        assert [a for a, _ in drawn] == [b for _, b in drawn] == [3, 1, 4, 1, 5, 9, 2, 6, 5]
        alone = speculate(model, draft, [7], options, guesses=3)
        list(alone)
        assert both[0].result.steps == alone.result.steps


def test_a_draft_of_ones_own_kind_is_called_as_every_draft():
    class Mine(ModelDraft):
        calls = 0

        def start(self, prompt):
            guess = super().start(prompt)

            def counted(ids, count, rng):
                self.calls += 1
                return guess(ids, count, rng)
            return counted
    model, order = tiny(), [3, 1, 4, 1, 5, 9, 2, 6, 5]  # noqa: F811
    options = Options(temperature=0, max_new_tokens=9, processors=[in_turn(order)])
    mine = Mine(model, options)
    tokens = speculate(model, mine, [7, 8], options, guesses=3)
    assert list(tokens) == order and tokens.result.steps == 3 and mine.calls == 2


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("stop", [[0], None])
def test_a_draft_ends_where_the_text_does(temperature, stop):
    """At the stop tokens that are asked for, or at the model's own."""
    model = tiny(eos_token_id=0)  # noqa: F811
    options = Options(temperature=temperature, max_new_tokens=9, stop_ids=stop, processors=[in_turn([3, 4, 0])])
    tokens = speculate(model, model, [7, 8], options)
    assert list(tokens) == [3, 4] and tokens.finish_reason == "stop"
    assert ModelDraft(model, options).start([7, 8])([7, 8], 5, random.Random(0))[0] == [3, 4, 0]


def test_a_dead_end_of_the_draft_alone():
    model, options = tiny(), Options(temperature=0, max_new_tokens=9, stop_ids=())  # noqa: F811
    want = generate(model, [7, 8], options)
    lost = ModelDraft(model, replace(options, processors=[in_turn(want.ids[:4])]))
    assert list(speculate(model, lost, [7, 8], options)) == want.ids
    assert lost.start([7, 8])([7, 8], 6, random.Random(0))[0] == want.ids[:4]


def test_n_grams_are_looked_up_as_if_each_text_were_read_anew():
    """What a draft has noted step by step is what the whole text says."""
    rng, draft = random.Random(0), NGramDraft([[1, 2, 3, 4, 2, 3]], order=3)
    ids = [rng.randrange(6) for _ in range(3)]
    guess = draft.start(ids)
    for _ in range(40):
        here = {tuple(ids[i:end]): ids[end] for end in range(1, len(ids)) for i in range(max(0, end - 3), end)}
        want = []
        while len(want) < 4:
            tails = [tuple((ids + want)[-n:]) for n in (3, 2, 1)]
            found = [known[tail] for known in (here, draft.known) for tail in tails if tail in known]
            if not found:
                break
            want.append(found[0])
        assert guess(ids, 4, rng) == (want, None)
        ids = ids + [rng.randrange(6) for _ in range(rng.randrange(1, 4))]
    assert draft.known[3,] == 4 and draft.known[2, 3] == 4


# ------------------------------------------------------------------ the distribution

def chi_square(counts, expected):
    """Pearson's statistic over cells with five or more expected, the others as one; and its degrees of freedom."""
    big = [cell for cell, value in expected.items() if value >= 5]
    rest = sum(value for cell, value in expected.items() if value < 5)
    rows = [(counts[cell], expected[cell]) for cell in big]
    if rest:
        rows.append((sum(counts[cell] for cell in expected if expected[cell] < 5), rest))
    return sum((seen - want) ** 2 / want for seen, want in rows), len(rows) - 1


def limit(freedom):
    """Chi-square's value that one in ten thousand exceeds, by Wilson and Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("name", ["model", "ngram"])
def test_speculation_draws_from_the_same_distribution(name, ledger):
    """1,000 texts of three tokens over a vocabulary of five, against the probabilities computed from the model."""
    shape = dict(vocab_size=5, n_layer=1, n_embd=8, spread=9.0)
    model, other, runs = tiny(2, **shape), tiny(3, **shape), 1000  # noqa: F811
    options = Options(temperature=1.3, top_k=4, max_new_tokens=3, stop_ids=())
    draft = ModelDraft(other, options) if name == "model" else NGramDraft([[1, 2, 3, 1, 4, 0, 0, 2]])
    decoder, counts, expected = Decoder(model), Counter(), {}
    chain = options.chain()
    for text in itertools.product(range(5), repeat=3):
        p = 1.0
        for i, token in enumerate(text):
            ids = [1, *text[:i]]
            with torch.no_grad():
                p *= float(process(chain, [ids], model(torch.tensor([ids]))[:, -1], i).softmax(-1)[0, token])
        if p:
            expected[text] = runs * p
    for seed in range(runs):
        tokens = speculate(model, draft, [1], options, seed=seed, guesses=2, decoder=decoder)
        counts[tuple(tokens)] += 1
    assert set(counts) <= set(expected) and abs(sum(expected.values()) - runs) < 1e-3 * runs
    value, freedom = chi_square(counts, expected)
    ledger(f"speculative sampling ({name} draft): chi-square over {freedom} degrees of freedom", float(value),
           bound=round(limit(freedom), 1))
    assert value < limit(freedom)


def test_verifying_is_exact():
    torch.manual_seed(0)
    for seed in range(3):
        p, q = torch.rand(2, 6, dtype=torch.float64).pow(3).unbind()
        p, q, rng = p / p.sum(), q / q.sum(), random.Random(seed)
        counts = Counter(_verify(guess, p, q, rng) for guess in pick(q.log().expand(6000, -1), [rng] * 6000))
        value, freedom = chi_square(counts, {i: 6000 * float(p[i]) for i in range(6)})
        assert value < limit(freedom)
        sure = Counter(_verify(2, p, None, rng) for _ in range(3000))
        value, freedom = chi_square(sure, {i: 3000 * float(p[i]) for i in range(6)})
        assert value < limit(freedom)


# ------------------------------------------------------------------ bad input

def test_several_prompts_are_an_error():
    with pytest.raises(ValueError, match="2 prompts were given where only one is taken"):
        speculate(tiny(), NGramDraft(), [[1, 2], [3]])
    assert list(speculate(tiny(), NGramDraft(), [[1, 2]], max_new_tokens=3, seed=0)) == list(
        speculate(tiny(), NGramDraft(), [1, 2], max_new_tokens=3, seed=0))


def test_a_draft_of_another_vocabulary_is_an_error():
    model, other = tiny(), tiny(vocab_size=40)  # noqa: F811
    for draft in (other, ModelDraft(other)):
        with pytest.raises(ValueError, match="vocab_size=40 must be the model's, 50"):
            speculate(model, draft, [1], max_new_tokens=5)
    with pytest.raises(ValueError, match="guess=77 must be a token id of the model, 0 to 49"):
        list(speculate(model, NGramDraft([[i, 77] for i in range(50)]), [1], max_new_tokens=5))


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("who", ["model", "draft"])
def test_a_damaged_model_is_told(temperature, who):
    model, draft = tiny(), tiny(4)  # noqa: F811
    with torch.no_grad():
        (model if who == "model" else draft).blocks[0].mlp.c_fc.bias[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        list(speculate(model, draft, [1], max_new_tokens=5, temperature=temperature))


@pytest.mark.parametrize("options, message", [
    ({"guesses": 0}, "guesses=0"), ({"overflow": "slide"}, "overflow='slide'"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"max_new_tokens": 40}, "exceed the context of 32")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        speculate(tiny(), NGramDraft(), [1], **options)


# ------------------------------------------------------------------ the lesson

def test_the_table_is_the_benchmarks():
    """Every number of the table in the lesson, from benchmarks/results/speculative.json."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "speculative.json").read_text(encoding="utf-8"))["result"]["rows"]
    cells = json.loads((ROOT / "nbs" / "deeper" / "speculative.ipynb").read_text(encoding="utf-8"))["cells"]
    [text] = ["".join(cell["source"]) for cell in cells if "tokens a step | right guesses" in "".join(cell["source"])]
    table = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]
    want = [["1", "", "1"]] + [
        [f"{row['tokens_a_step']:.3f}", f"{100 * row['accepted']:.1f} %", f"{row['vs_plain']:.2f}"]
        for row in rows if row["guesses"] == 4]
    assert [row[1:] for row in table] == want and all(row["same_tokens"] for row in rows)


@pytest.fixture(scope="module")
def names():
    """What the notebook has defined by the time of its exercises."""
    def gain(a, g, c):
        return sum(a ** i for i in range(g + 1)) / (1 + c * g)
    p = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -2.0]).double().softmax(-1)
    return {"torch": torch, "gain": gain, "p": p, "q": torch.tensor([0.1, 0.5, 0.1, 0.1, 0.1, 0.1]).double()}


@pytest.mark.parametrize("number, empty, check, solution", exercises("deeper/speculative"), ids=lambda v: v[-1])
def test_exercise(number, empty, check, solution, names, capsys):
    assert said(empty, check, names, capsys) == "not solved yet"
    assert said(solution, check, names, capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def accepted_share(p, q): return (p * q).sum()", "two independent draws"),
    (1, "def accepted_share(p, q): return (p / q).clamp(max=1).mean()", "weigh them by q"),
    (2, "def best_count(a, c): return 4", "for a, c = (0.8, 0.05)"),
    (3, "def generous(p, q, f): return torch.minimum(p, q).sum(), p", "not the share"),
    (3, "def generous(p, q, f):\n    kept = q * (f * p / q).clamp(max=1)\n    return kept.sum(), kept / kept.sum()",
     "factor 1")])
def test_wrong_answers_are_told(number, wrong, words, names, capsys):
    assert words in said(wrong, exercises("deeper/speculative")[number - 1][2], names, capsys)
