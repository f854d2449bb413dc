"""The processors beside the everyday ones: against transformers, by hand, and in the loop."""
import pytest
import torch
from test_generation import equal_processors, tiny

from minigpt.engine.logits_processors import (BannedTokens, BannedWords, ForcedTokens, FrequencyPenalty, LogitBias, MinLength,
                                              NoRepeatNGram, PresencePenalty, Typical)
from minigpt.generation import Options, RepetitionPenalty, TopK, generate

transformers = pytest.importorskip("transformers")
INF = float("inf")
pytestmark = pytest.mark.usefixtures("one_thread")


def pairs():
    """Ours with 6 new tokens of 24, and transformers' class with the same meaning."""
    t, bad = transformers, [[3], [7, 8], [5, 6, 7]]
    return [
        (Typical(0.2), t.TypicalLogitsWarper(0.2)), (Typical(0.95), t.TypicalLogitsWarper(0.95)),
        (NoRepeatNGram(1), t.NoRepeatNGramLogitsProcessor(1)), (NoRepeatNGram(2), t.NoRepeatNGramLogitsProcessor(2)),
        (NoRepeatNGram(3), t.NoRepeatNGramLogitsProcessor(3)), (NoRepeatNGram(40), t.NoRepeatNGramLogitsProcessor(40)),
        (BannedTokens([1, 5, 5]), t.SuppressTokensLogitsProcessor([1, 5], device="cpu")),
        (BannedWords(bad), t.NoBadWordsLogitsProcessor(bad, eos_token_id=2)),
        (LogitBias({3: 1.5, 7: -100.0}), t.SequenceBiasLogitsProcessor({(3,): 1.5, (7,): -100.0})),
        (LogitBias({}), t.LogitsProcessorList()),
        (MinLength(7, [2, 4]), t.MinNewTokensLengthLogitsProcessor(18, 7, [2, 4], device="cpu")),
        (MinLength(6, [2, 4]), t.MinNewTokensLengthLogitsProcessor(18, 6, [2, 4], device="cpu"))]


@pytest.mark.parametrize("case", range(len(pairs())))
def test_processor_equals_transformers(case, ledger):
    equal_processors(lambda: pairs()[case], ledger)


def test_forced_tokens_equal_transformers():
    logits, ids = torch.randn(3, 20), torch.randint(0, 20, (3, 1))
    bos = transformers.ForcedBOSTokenLogitsProcessor(7)
    assert torch.equal(ForcedTokens([7])(ids.tolist(), logits, 0), bos(ids, logits.clone()))
    eos = transformers.ForcedEOSTokenLogitsProcessor(6, 9)
    longer = torch.randint(0, 20, (3, 5))
    assert torch.equal(ForcedTokens([0, 1, 2, 3, 9])(longer.tolist(), logits, 4), eos(longer, logits.clone()))
    assert torch.equal(ForcedTokens([7])(longer.tolist(), logits, 1), logits)


def test_presence_and_frequency_by_hand():
    """transformers has no such processors; OpenAI's formula: logit - frequency * count - presence * (count > 0)."""
    torch.manual_seed(0)
    logits, ids = torch.randn(4, 9), torch.randint(0, 9, (4, 12)).tolist()
    for step in (0, 1, 7, 12):
        want = logits.clone()
        for b, row in enumerate(ids):
            for token in row[len(row) - step:]:
                want[b, token] -= 0.3
            for token in set(row[len(row) - step:]):
                want[b, token] -= 0.9
        got = PresencePenalty(0.9)(ids, FrequencyPenalty(0.3)(ids, logits, step), step)
        assert torch.allclose(got, want, atol=1e-5)


def test_each_knows_its_place():
    """Given in any order, they go by their stages, and greedy decoding leaves out what is for draws."""
    given = [Typical(0.9), ForcedTokens([1]), MinLength(2, [0]), LogitBias({1: 1.0}), NoRepeatNGram(2), PresencePenalty(1.0),
             BannedTokens([3]), BannedWords([[4]]), FrequencyPenalty(1.0)]
    names = [type(rule).__name__ for rule in Options(processors=given, top_k=5, repetition_penalty=1.1).chain()]
    assert names == ["RepetitionPenalty", "LogitBias", "PresencePenalty", "FrequencyPenalty", "MinLength", "NoRepeatNGram",
                     "BannedTokens", "BannedWords", "ForcedTokens", "TopK", "Typical"]
    greedy = [type(rule) for rule in Options(processors=given, top_k=5, temperature=0).chain()]
    assert TopK not in greedy and Typical not in greedy and len(greedy) == 8
    assert RepetitionPenalty not in greedy


def test_they_hold_in_the_loop():
    model, ids = tiny(), [1, 2, 3]
    options = dict(max_new_tokens=25, temperature=0, stop_ids=())
    new = generate(model, ids, processors=[NoRepeatNGram(2)], **options).ids
    grams = list(zip(ids + new, (ids + new)[1:]))
    assert len(set(grams)) == len(grams)
    greedy = generate(model, ids, **options).ids
    banned = generate(model, ids, processors=[BannedTokens(greedy)], **options).ids
    assert not set(banned) & set(greedy)
    assert generate(model, ids, max_new_tokens=5, processors=[ForcedTokens([4, 4])], seed=0).ids[:2] == [4, 4]
    unlike = generate(model, ids, processors=[PresencePenalty(1e4)], **options).ids
    assert len(set(unlike)) == 25
    assert set(generate(model, ids, processors=[LogitBias({9: 1e4})], **options).ids) == {9}


def test_a_least_length_holds_in_the_loop():
    model = tiny()
    for n in (0, 1, 5, 12):
        texts = generate(model, [[i] for i in range(12)], max_new_tokens=20, temperature=2.0, seed=0,
                         stop_ids=range(0, 50, 2), processors=[MinLength(n, range(0, 50, 2))])
        lengths = [len(text.ids) for text in texts]
        assert min(lengths) >= n and "stop" in {text.finish_reason for text in texts}


@pytest.mark.parametrize("make, message", [
    (lambda: Typical(2), "typical_p=2"), (lambda: NoRepeatNGram(0), "no_repeat_ngram_size=0"),
    (lambda: BannedWords([[]]), "banned_words"), (lambda: FrequencyPenalty(INF), "frequency_penalty=inf"),
    (lambda: PresencePenalty(float("nan")), "presence_penalty=nan"), (lambda: LogitBias({1: INF}), "logit_bias=inf"),
    (lambda: MinLength(-1, [0]), "min_new_tokens=-1")])
def test_bad_values(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("rule", [BannedTokens([50]), BannedTokens([-1]), LogitBias({50: 1.0}), ForcedTokens([50]),
                                  MinLength(3, [50])])
def test_ids_that_the_model_does_not_have(rule):
    with pytest.raises(ValueError, match="a token id of the model, 0 to 49"):
        generate(tiny(), [1], processors=[rule], max_new_tokens=3)
