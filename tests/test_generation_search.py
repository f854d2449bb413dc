"""Chapter 05: beams, contrastive search, speculative decoding; against transformers and slow versions."""
import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minigpt import generation as g
from minigpt.deeper.beam_search import beam_search, contrastive_search
from minigpt.deeper.fast_decoding import Decoder
from minigpt.engine.logits_processors import BannedTokens
from minigpt.deeper.speculative import ModelDraft, NGramDraft, judge, speculate
from minigpt.deeper.hooks import trace
from test_generation import (as_hf, hf, hf_batch, hf_generate, model, new_tokens, prompts, tiny,  # noqa: F401
                             tokenizer)


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
    model = tiny(seed, vocab_size=12, spread=3.0)
    hf = as_hf(model, tmp_path / "m")  # noqa: F811
    tested = 0
    for power, early, stop, penalty in itertools.product((1.0, 0.0, 2.0, -1.0), (False, True, "never"),
                                                         ((), (3,), (3, 5)), (1.0, 1.5)):
        prompt = [1, 4, tested % 12]
        out = hf_generate(hf, prompt, num_beams=3, num_return_sequences=3, max_new_tokens=7, length_penalty=power,
                          early_stopping=early, eos_token_id=list(stop) or None, repetition_penalty=penalty,
                          output_scores=True)
        ours = beam_search(model, prompt, num_beams=3, num_return=3, max_new_tokens=7, length_penalty=power,
                             early_stopping=early, stop_ids=stop, options=g.Options(processors=[g.RepetitionPenalty(penalty, prompt=True)]))
        same, off = same_beams(ours, out, prompt, stop)
        assert same, (power, early, stop, penalty)
        assert off <= 1e-5 * max(1.0, abs(ours[-1].score))
        tested += 1


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


def test_beams_of_several_prompts_and_with_constraints(tokenizer):  # noqa: F811
    model = tiny()  # noqa: F811
    both = beam_search(model, [[1, 2], [3]], max_new_tokens=5)
    assert both == [beam_search(model, row, max_new_tokens=5) for row in ([1, 2], [3])]
    banned = beam_search(model, [1], max_new_tokens=5, num_return=4, options=g.Options(processors=[BannedTokens(range(40))]))
    assert all(token >= 40 for text in banned for token in text.ids)
    few = beam_search(model, [1], num_beams=4, num_return=4, max_new_tokens=2, options=g.Options(processors=[BannedTokens(range(2, 50))]))
    assert sorted(text.ids for text in few) == [[0, 0], [0, 1], [1, 0], [1, 1]]


def slow_contrastive(model, prompt, k, alpha, limit):
    """Su et al. (2022) the obvious way: every candidate is read with the whole text before it."""
    def last_layer(ids):
        return trace(model, torch.tensor([ids]), ["ln_f"])["ln_f"][0]

    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            probs = model(torch.tensor([ids]))[0, -1].softmax(-1)
            values = []
            for p, token in zip(*(t.tolist() for t in probs.topk(k))):
                hidden = last_layer(ids + [token])
                like = max(float(F.cosine_similarity(hidden[-1], h, dim=0)) for h in hidden[:-1])
                values.append(((1 - alpha) * p - alpha * like, token))
        ids.append(max(values)[1])
    return ids[len(prompt):]


@pytest.mark.parametrize("k, alpha", [(4, 0.6), (5, 0.9), (1, 0.5), (3, 0.0)])
def test_contrastive_search_equals_a_slow_version(k, alpha):
    """transformers has moved its own out of the package."""
    for seed in range(3):
        model = tiny(seed, spread=2.0)  # noqa: F811
        got = list(contrastive_search(model, [1, 2, 3], g.Options(max_new_tokens=8), top_k=k, penalty_alpha=alpha))
        assert got == slow_contrastive(model, [1, 2, 3], k, alpha, 8)


def test_contrastive_search_never_takes_what_is_forbidden():
    """A forbidden candidate is like nothing that was said, and still must not win; nor may it end in nonsense."""
    allowed = (7, 8, 9)
    for seed in range(3):
        model = tiny(seed, spread=2.0)  # noqa: F811
        options = g.Options(max_new_tokens=12, processors=[BannedTokens([i for i in range(50) if i not in allowed])])
        drawn = contrastive_search(model, [1, 2, 3], options, top_k=8, penalty_alpha=0.95)
        assert set(drawn) <= set(allowed) and len(drawn.result.ids) == 12
    with pytest.raises(ValueError, match="no token is left"):
        list(contrastive_search(model, [1], g.Options(max_new_tokens=3, processors=[BannedTokens(range(50))])))
    with pytest.raises(ValueError, match="no token is left"):
        beam_search(model, [1], max_new_tokens=3, options=g.Options(processors=[BannedTokens(range(50))]))


def test_log_probabilities_are_the_models_own_in_every_strategy():
    """Whatever the processors did: one pass of the model over each text gives the same numbers."""
    model = tiny()  # noqa: F811
    options = g.Options(max_new_tokens=9, repetition_penalty=1.4, processors=[BannedTokens([3, 4])], seed=1, temperature=0.8)
    found = [g.generate(model, [1, 2], options)]
    for tokens in (speculate(model, tiny(5), [1, 2], options), contrastive_search(model, [1, 2], options)):
        list(tokens)
        found.append(tokens.result)
    for text in found:
        with torch.no_grad():
            logp = model(torch.tensor([[1, 2] + text.ids]))[0, 1:-1].log_softmax(-1)
        want = logp.gather(-1, torch.tensor(text.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(text.logprobs), want, atol=1e-4) and text.steps > 0


# ------------------------------------------------------------------ speculation

class Wild:
    """A draft that guesses at random, and says so."""

    def __call__(self, ids, count, rng):
        q = torch.full((50,), 1 / 50, dtype=torch.float64)
        return [rng.randrange(50) for _ in range(count)], [q] * count


@pytest.mark.parametrize("name", ["itself", "other", "ngram", "wild", "nothing"])
@pytest.mark.parametrize("guesses", [1, 3, 6])
def test_speculation_keeps_greedy_tokens(name, guesses):
    model = tiny()  # noqa: F811
    options = g.Options(temperature=0, max_new_tokens=20, stop_ids=[13], repetition_penalty=1.1)
    for first in range(6):
        draft = {"itself": model, "other": tiny(9), "ngram": NGramDraft(), "wild": Wild(),
                 "nothing": lambda ids, count, rng: ([], None)}[name]
        want = g.generate(model, [first, 5, first], options)
        tokens = speculate(model, draft, [first, 5, first], options, guesses=guesses)
        assert list(tokens) == want.ids and tokens.finish_reason == want.finish_reason
        if name == "itself":  # every guess is right
            assert tokens.result.steps <= -(-(want.steps - 1) // (guesses + 1)) + 1


def test_speculation_on_the_shipped_model(model, prompts):  # noqa: F811
    decoder, draft = Decoder(model), NGramDraft(prompts)
    options = g.Options(temperature=0, max_new_tokens=12, stop_ids=[0, 1, 2])
    for ids in prompts[:10]:
        assert list(speculate(model, draft, ids, options, decoder=decoder)) == g.generate(
            model, ids, options, decoder=decoder).ids


@pytest.mark.parametrize("size", [3, 12, 31])
def test_a_draft_with_a_smaller_context(size):
    model, draft = tiny(), tiny(9, block_size=size)  # noqa: F811
    options = g.Options(temperature=0, max_new_tokens=20)
    want = g.generate(model, [5, 6, 7, 8], options)
    assert list(speculate(model, draft, [5, 6, 7, 8], options)) == want.ids


def in_turn(order):
    """A processor that allows order[step] alone, and nothing at all afterwards."""
    def only(ids, logits, step):
        allowed = order[step:step + 1]
        return logits.index_fill(-1, torch.tensor([i for i in range(50) if i not in allowed]), -torch.inf)
    return only


def test_a_draft_counts_new_tokens_as_the_model_does():
    model = tiny()  # noqa: F811
    options = g.Options(temperature=0, max_new_tokens=9, processors=[in_turn([3, 1, 4, 1, 5, 9, 2, 6, 5])])
    tokens = speculate(model, model, [7, 8], options, guesses=3)
    assert list(tokens) == [3, 1, 4, 1, 5, 9, 2, 6, 5]
    assert tokens.result.steps == 3  # one token, then twice three right guesses and one for free
    draft = ModelDraft(model, options)
    for prompt in ([7], [2, 2, 2, 2]):  # one draft for prompts of several lengths
        assert speculate(model, draft, prompt, options, guesses=3).result.steps == 0
        tokens = speculate(model, draft, prompt, options, guesses=3)
        assert len(list(tokens)) == 9 and tokens.result.steps == 3


def test_a_draft_of_ones_own_kind_is_called_as_every_draft():
    class Mine(ModelDraft):
        calls = 0

        def __call__(self, ids, count, rng):
            self.calls += 1
            return super().__call__(ids, count, rng)
    model = tiny()  # noqa: F811
    options = g.Options(temperature=0, max_new_tokens=9, processors=[in_turn([3, 1, 4, 1, 5, 9, 2, 6, 5])])
    mine = Mine(model, options)
    tokens = speculate(model, mine, [7, 8], options, guesses=3)
    assert list(tokens) == [3, 1, 4, 1, 5, 9, 2, 6, 5] and tokens.result.steps == 3 and mine.calls == 2


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_ends_where_the_text_does(temperature):
    model = tiny()  # noqa: F811
    options = g.Options(temperature=temperature, max_new_tokens=9, stop_ids=[0], processors=[in_turn([3, 4, 0])])
    tokens = speculate(model, model, [7, 8], options)
    assert list(tokens) == [3, 4] and tokens.finish_reason == "stop"
    assert ModelDraft(model, options)([7, 8], 5, random.Random(0))[0] == [3, 4, 0]


def test_a_dead_end_of_the_draft_alone():
    model, options = tiny(), g.Options(temperature=0, max_new_tokens=9)  # noqa: F811
    want = g.generate(model, [7, 8], options)
    lost = ModelDraft(model, replace(options, processors=[in_turn(want.ids[:4])]))
    assert list(speculate(model, lost, [7, 8], options)) == want.ids
    assert lost([7, 8], 6, random.Random(0))[0] == want.ids[:4]


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
    """1,000 texts of three tokens over a vocabulary of five, against the chances computed from the model."""
    shape = dict(vocab_size=5, n_layer=1, n_embd=8, spread=9.0)
    model, other, runs = tiny(2, **shape), tiny(3, **shape), 1000  # noqa: F811
    options = g.Options(temperature=1.3, top_k=4, max_new_tokens=3)
    draft = ModelDraft(other, options) if name == "model" else NGramDraft([[1, 2, 3, 1, 4, 0, 0, 2]])
    decoder, counts, expected = Decoder(model), Counter(), {}
    chain = options.chain()
    for text in itertools.product(range(5), repeat=3):
        p = 1.0
        for i, token in enumerate(text):
            ids = [1, *text[:i]]
            with torch.no_grad():
                p *= float(g.process(chain, [ids], model(torch.tensor([ids]))[:, -1], i).softmax(-1)[0, token])
        if p:
            expected[text] = runs * p
    for seed in range(runs):
        tokens = speculate(model, draft, [1], replace(options, seed=seed), guesses=2, decoder=decoder)
        counts[tuple(tokens)] += 1
    assert set(counts) <= set(expected) and abs(sum(expected.values()) - runs) < 1e-3 * runs
    value, freedom = chi_square(counts, expected)
    ledger(f"speculative sampling ({name} draft): chi-square over {freedom} degrees of freedom", float(value),
           bound=round(limit(freedom), 1))
    assert value < limit(freedom)


def test_judge_is_exact():
    torch.manual_seed(0)
    for seed in range(3):
        p, q = torch.rand(2, 6, dtype=torch.float64).pow(3).unbind()
        p, q, rng = p / p.sum(), q / q.sum(), random.Random(seed)
        counts = Counter(judge(guess, p, q, rng) for guess in g.pick(q.log().expand(6000, -1), [rng] * 6000))
        value, freedom = chi_square(counts, {i: 6000 * float(p[i]) for i in range(6)})
        assert value < limit(freedom)
        sure = Counter(judge(2, p, None, rng) for _ in range(3000))
        value, freedom = chi_square(sure, {i: 3000 * float(p[i]) for i in range(6)})
        assert value < limit(freedom)
