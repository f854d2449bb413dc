"""Beam search: against transformers, against slow versions, and against trying every text."""
import itertools
from collections import Counter

import pytest
import torch
from exercise_cells import exercises, said
from test_generation import as_hf, hf, hf_batch, hf_generate, model, new_tokens, prompts, tiny, tokenizer  # noqa: F401

from minigpt.deeper.beam_search import BeamOptions, beam_search
from minigpt.deeper.fast_decoding import Decoder
from minigpt.engine import devices
from minigpt.engine.logits_processors import BannedTokens
from minigpt.generation import Options, RepetitionPenalty, generate

pytestmark = pytest.mark.usefixtures("one_thread")


def same_beams(ours, out, prompt, stop, rows=slice(None)):
    """Whether texts agree, and the largest difference of scores."""
    texts = [new_tokens(row, prompt, stop) for row in out.sequences[rows]]
    scores = [abs(float(want) - got.score) for want, got in zip(out.sequences_scores[rows], ours)]
    return texts == [text.ids for text in ours], max(scores)


def test_beams_equal_transformers_on_50_prompts(model, hf, prompts, ledger):  # noqa: F811
    decoder, stop, wrong, worst = Decoder(model), (0, 1, 2), 0, 0.0
    out, longest = hf_batch(hf, prompts, num_beams=4, num_return_sequences=2, max_new_tokens=8, eos_token_id=list(stop),
                            output_scores=True)
    for i, ids in enumerate(prompts):
        ours = beam_search(model, ids, num_beams=4, num_return=2, max_new_tokens=8, stop_ids=stop, decoder=decoder)
        same, off = same_beams(ours, out, longest, stop, slice(2 * i, 2 * i + 2))
        wrong, worst = wrong + (not same), max(worst, off)
    ledger("beam search, 50 prompts, 4 beams, 2 results, 8 tokens: prompts with other tokens", wrong, peer="transformers", bound=0)
    ledger("beam search, 50 prompts, 4 beams, 2 results, 8 tokens: scores", worst, peer="transformers", bound=1e-5)
    assert wrong == 0 and worst <= 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_beam_settings_equal_transformers(seed, tmp_path):
    """Every combination of length penalty, early stopping and stop tokens, on a random model in which texts do end."""
    model = tiny(seed, vocab_size=12, spread=3.0)  # noqa: F811
    hf = as_hf(model, tmp_path / "m")  # noqa: F811
    tested = 0
    for power, early, stop, penalty in itertools.product((1.0, 0.0, 2.0, -1.0), (False, True, "never"),
                                                         ((), (3,), (3, 5)), (1.0, 1.5)):
        prompt = [1, 4, tested % 12]
        out = hf_generate(hf, prompt, num_beams=3, num_return_sequences=3, max_new_tokens=7, length_penalty=power,
                          early_stopping=early, eos_token_id=list(stop) or None, repetition_penalty=penalty,
                          output_scores=True)
        ours = beam_search(model, prompt, num_beams=3, num_return=3, max_new_tokens=7, length_penalty=power,
                           early_stopping=early, stop_ids=stop, processors=[RepetitionPenalty(penalty, prompt=True)])
        same, off = same_beams(ours, out, prompt, stop)
        assert same, (power, early, stop, penalty)
        assert off <= 1e-5 * max(1.0, abs(ours[-1].score))
        tested += 1


def test_the_models_own_end_token_ends_a_beam(tmp_path):
    """As in transformers, which takes it from the model's config; stop_ids=() turns it off."""
    model = tiny(3, vocab_size=12, spread=3.0, eos_token_id=5)  # noqa: F811
    hf, ended = as_hf(model, tmp_path / "m"), 0  # noqa: F811
    for first in range(6):
        out = hf_generate(hf, [first, 1], num_beams=3, max_new_tokens=9, eos_token_id=5)
        ours = beam_search(model, [first, 1], num_beams=3, max_new_tokens=9)[0]
        assert ours.ids == new_tokens(out.sequences[0], [first, 1], (5,))
        ended += ours.finish_reason == "stop"
        assert len(beam_search(model, [first, 1], num_beams=3, max_new_tokens=9, stop_ids=())[0].ids) == 9
    assert ended


def slow_beams(model, prompt, beams, groups, diversity, power, stop, limit):
    """Diverse beam search the obvious way: whole texts as lists, no cache, one list of groups; transformers has moved
    its own out of the package. Vijayakumar et al. (2018), with transformers' rules for what is finished."""
    width = beams // groups
    running = [[([], 0.0)] for _ in range(groups)]
    done = [[] for _ in range(groups)]
    for length in range(1, limit + 1):
        chosen = Counter()
        for j in range(groups):
            if not running[j]:
                continue
            candidates = []
            for text, score in running[j]:
                with torch.no_grad():
                    logp = model(torch.tensor([prompt + text]))[0, -1].log_softmax(-1)
                for token in range(len(logp)):
                    value = score + float(logp[token]) - diversity * chosen[token]
                    candidates.append((value, text + [token]))
            candidates.sort(key=lambda c: -c[0])
            following = []
            for place, (value, text) in enumerate(candidates[:max(2, 1 + len(stop)) * width]):
                if text[-1] in stop or length == limit:
                    if place < width:
                        done[j].append((value / length ** power, text))
                elif len(following) < width:
                    following.append((text, value))
            done[j] = sorted(done[j], key=lambda d: -d[0])[:width]
            chosen.update(text[-1] for text, _ in following)
            full = len(done[j]) == width
            over = not following or full and following[0][1] / length ** power <= done[j][-1][0]
            running[j] = [] if over else following
    return sorted((d for group in done for d in group), key=lambda d: -d[0])


@pytest.mark.parametrize("beams, groups, diversity, stop", [
    (4, 2, 0.5, ()), (4, 2, 2.0, (3,)), (6, 3, 1.0, (3, 5)), (3, 3, 0.7, (3,)), (4, 1, 0.0, (3,)), (6, 2, 0.0, (3,))])
def test_diverse_beams_equal_a_slow_version(beams, groups, diversity, stop, ledger):
    worst = 0.0
    for seed in range(3):
        model = tiny(seed, vocab_size=12, spread=3.0)  # noqa: F811
        want = slow_beams(model, [1, 2], beams, groups, diversity, 1.0, stop, 6)
        got = beam_search(model, [1, 2], num_beams=beams, num_return=beams, num_beam_groups=groups, stop_ids=stop,
                          diversity_penalty=diversity, max_new_tokens=6)
        assert [[t for t in text if t not in stop] for _, text in want[:len(got)]] == [text.ids for text in got]
        worst = max(worst, max(abs(a - b.score) for (a, _), b in zip(want, got)))
    ledger("diverse beam search = a slow version: scores", worst, bound=1e-4)
    assert worst < 1e-4


def test_beams_of_several_prompts_and_with_constraints():
    model = tiny()  # noqa: F811
    both = beam_search(model, [[1, 2], [3]], max_new_tokens=5)
    assert both == [beam_search(model, row, max_new_tokens=5) for row in ([1, 2], [3])]
    banned = beam_search(model, [1], max_new_tokens=5, num_return=4, processors=[BannedTokens(range(40))])
    assert all(token >= 40 for text in banned for token in text.ids)
    few = beam_search(model, [1], num_beams=4, num_return=4, max_new_tokens=2, stop_ids=(),
                      processors=[BannedTokens(range(2, 50))])
    assert sorted(text.ids for text in few) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    with pytest.raises(ValueError, match="no token is left"):
        beam_search(model, [1], max_new_tokens=3, processors=[BannedTokens(range(50))])


@pytest.mark.parametrize("groups, penalty", [(1, 0.0), (2, 1.0)])
def test_log_probabilities_are_the_models_own(groups, penalty):
    """Whatever processors and diversity did to the scores: one pass of the model over each text gives the same."""
    model = tiny()  # noqa: F811
    texts = beam_search(model, [1, 2], num_beams=4, num_return=4, num_beam_groups=groups, diversity_penalty=penalty,
                        max_new_tokens=9, stop_ids=[7], repetition_penalty=1.4, processors=[BannedTokens([3, 4])])
    for text in texts:
        with torch.no_grad():
            logp = model(torch.tensor([[1, 2] + text.ids]))[0, 1:-1].log_softmax(-1)
        want = logp.gather(-1, torch.tensor(text.ids, dtype=torch.long)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(text.logprobs), want, atol=1e-4)
        assert len(text.ids) <= text.steps <= 9


def test_one_beam_is_greedy_decoding():
    model = tiny()  # noqa: F811
    for first in range(5):
        [text] = beam_search(model, [first], num_beams=1, max_new_tokens=20)
        want = generate(model, [first], max_new_tokens=20, temperature=0)
        assert text.ids == want.ids and text.finish_reason == want.finish_reason
        assert text.logprobs == pytest.approx(want.logprobs, abs=1e-5)


# ------------------------------------------------------------------ bad input

def test_beams_that_do_not_fit_are_refused_before_work(monkeypatch):
    model = tiny()  # noqa: F811
    monkeypatch.setattr(devices, "free_memory", lambda device: 1e6)
    with pytest.raises(MemoryError, match=r"num_beams=1000 beams of 12 tokens need about 0.0 GB, and .* at most"):
        beam_search(model, [1, 2], num_beams=1000, max_new_tokens=10, decoder="never asked")
    assert beam_search(model, [1, 2], num_beams=4, max_new_tokens=10)


def test_a_damaged_model_is_told():
    model = tiny()  # noqa: F811
    with torch.no_grad():
        model.blocks[0].mlp.c_fc.bias[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        beam_search(model, [1], max_new_tokens=3)


@pytest.mark.parametrize("options, message", [
    ({"num_beams": 0}, "num_beams=0"), ({"num_beams": 4, "num_return": 5}, "num_return=5"),
    ({"num_beam_groups": 3}, "num_beam_groups=3"), ({"early_stopping": "soon"}, "early_stopping='soon'"),
    ({"diversity_penalty": -1}, "diversity_penalty=-1"), ({"length_penalty": float("nan")}, "length_penalty=nan"),
    ({"overflow": "slide"}, "overflow='slide'"), ({"max_new_tokens": 40}, "exceed the context of 32")])
def test_bad_options(options, message):
    with pytest.raises(ValueError) as error:
        beam_search(tiny(), [1], **{"max_new_tokens": 5} | options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_options_that_are_none():
    with pytest.raises(TypeError, match="num_beam"):
        beam_search(tiny(), [1], num_beam=3)
    with pytest.raises(TypeError):
        beam_search(tiny(), [1], 4)
    with pytest.raises(TypeError):
        BeamOptions(4)
    assert beam_search(tiny(), [1], Options(max_new_tokens=3), num_beams=2) == beam_search(
        tiny(), [1], num_beams=2, max_new_tokens=3)


# ------------------------------------------------------------------ the exercises

@pytest.mark.parametrize("number, empty, check, solution", exercises("deeper/beam_search"), ids=lambda v: v[-1])
def test_exercise(number, empty, check, solution, capsys):
    names = {"generate": generate, "tiny": tiny()}
    assert said(empty, check, names, capsys) == "not solved yet"
    assert said(solution, check, names, capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def smallest_power(short, long, powers): return 0.0", "plain sums"),
    (1, "def smallest_power(short, long, powers): return 1.0", "never wins"),
    (2, "def best_of(model, ids, n, new):\n    return generate(model, ids, max_new_tokens=new, seed=0, stop_ids=()).ids",
     "likelier"),
    (3, "def most_agreeable(texts): return 0", "text 1 shares more"),
    (3, "def most_agreeable(texts):\n    t = [sum(sum(i in b for i in a) for b in texts if b is not a) for a in texts]\n"
        "    return t.index(max(t))", "as often as both hold it")])
def test_wrong_answers_are_told(number, wrong, words, capsys):
    names = {"generate": generate, "tiny": tiny()}
    assert words in said(wrong, exercises("deeper/beam_search")[number - 1][2], names, capsys)
