"""Chapter 05: processors, the loop, batches; against transformers and against slow, obvious versions."""
import random

import pytest
import torch

from minigpt import generation as g
from minigpt.deeper.beam_search import beam_search
from minigpt.deeper.fast_decoding import Decoder
from minigpt.engine.logits_processors import BannedTokens, BannedWords, ForcedTokens, FrequencyPenalty, NoRepeatNGram, PresencePenalty, Typical
from minigpt.engine.tokenizer import Tokenizer
from minigpt.chat_format import ChatRenderer
from minigpt.engine.dataset_readers import load_chats
from minigpt.gpt2 import GPT2, GPT2Config

transformers = pytest.importorskip("transformers")
INF = float("inf")


pytestmark = pytest.mark.usefixtures("one_thread")  # single tokens: threads would mostly wait for each other


@pytest.fixture(scope="module")
def model():
    return GPT2.from_pretrained()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained()


@pytest.fixture(scope="module")
def hf(model, tmp_path_factory):
    """The shipped model, saved by us and loaded by transformers."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """50 prompts of unequal length: questions of the held-out set as a chat, and beginnings of answers as plain text."""
    renderer, found = ChatRenderer(tokenizer), []
    for chat in load_chats("held"):
        question, answer = (m["content"] for m in chat["messages"][:2])
        ids = renderer.prompt([{"role": "user", "content": question}])
        if len(ids) < 30:
            found += [ids, tokenizer.encode_ordinary(answer)[:9]]
        if len(found) >= 50:
            return found[:50]
    raise AssertionError("the held-out sample is too small")


def tiny(seed=0, spread=6.0, **changes):
    """A small random model whose next-token distributions are far from flat."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=50, block_size=32, n_layer=2, n_head=2, n_embd=16, bos_token_id=0, eos_token_id=None) | changes
    model = GPT2(GPT2Config(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.wte.weight.mul_(spread)
    return model


def as_hf(model, folder):
    model.save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def hf_generate(hf, ids, **options):
    x = torch.tensor([ids])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True} | options
    return hf.generate(x, attention_mask=torch.ones_like(x), **options)


def hf_batch(hf, rows, **options):
    """transformers' generate for prompts of unequal length at once; padded on the left to the length that is returned."""
    longest = max(map(len, rows))
    x = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True} | options
    return hf.generate(x, attention_mask=seen, **options), longest


def new_tokens(row, prompt, stop=()):
    """The new tokens of a row of transformers' output, without the stop token and what follows it."""
    new = row[prompt if isinstance(prompt, int) else len(prompt):].tolist()
    ends = [i for i, token in enumerate(new) if token in stop]
    return new[:ends[0]] if ends else new


# ------------------------------------------------------------------ processors

def pairs():
    t = transformers
    return [
        (g.Temperature(0.7), t.TemperatureLogitsWarper(0.7)),
        (g.Temperature(3.0), t.TemperatureLogitsWarper(3.0)),
        (g.TopK(1), t.TopKLogitsWarper(1)), (g.TopK(40), t.TopKLogitsWarper(40)),
        (g.TopK(10**6), t.TopKLogitsWarper(10**6)),
        (g.TopP(0.1), t.TopPLogitsWarper(0.1)), (g.TopP(0.9), t.TopPLogitsWarper(0.9)),
        (g.TopP(0.999), t.TopPLogitsWarper(0.999)), (g.TopP(1.0), t.TopPLogitsWarper(1.0)),
        (g.MinP(0.05), t.MinPLogitsWarper(0.05)), (g.MinP(1.0), t.MinPLogitsWarper(1.0)),
        (g.RepetitionPenalty(1.3, prompt=True), t.RepetitionPenaltyLogitsProcessor(1.3)),
        (g.RepetitionPenalty(0.8, True), t.RepetitionPenaltyLogitsProcessor(0.8)),
        (g.RepetitionPenalty(1.3),
         t.RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=18)),
    ]


def equal_processors(pair, ledger) -> None:
    """pair() makes ours and theirs anew: theirs keep what they saw first."""
    worst = 0.0
    for seed, (V, scale) in enumerate([(12, 1), (300, 2), (5000, 3)]):
        ours, theirs = pair()
        torch.manual_seed(seed)
        logits = torch.randn(6, V) * scale
        ids = torch.randint(0, min(V, 9), (6, 24))  # few ids, so that sequences come again
        before = logits.clone()
        got, want = ours(ids.tolist(), logits, 6), theirs(ids, logits.clone())
        assert torch.equal(logits, before), "the argument was changed"
        assert torch.equal(got == -INF, want == -INF)
        kept = want > -INF
        worst = max(worst, float((got[kept] - want[kept]).abs().max()) if kept.any() else 0.0)
    ledger(f"processor {type(ours).__name__}: logits", worst, peer="transformers", bound=1e-5)
    assert worst <= 1e-5


@pytest.mark.parametrize("case", range(len(pairs())))
def test_processor_equals_transformers(case, ledger):
    equal_processors(lambda: pairs()[case], ledger)


def test_order_equals_transformers_chain(hf, model, prompts):
    """All options at once: the processed scores of transformers' own loop, given its raw logits."""
    out = hf_generate(hf, prompts[0], do_sample=True, max_new_tokens=3, temperature=0.8, top_k=60, top_p=0.9, min_p=0.01,
                      typical_p=0.9, repetition_penalty=1.2, no_repeat_ngram_size=2, bad_words_ids=[[30], [11, 12]],
                      output_scores=True, output_logits=True)
    rules = [Typical(0.9), g.RepetitionPenalty(1.2, prompt=True), NoRepeatNGram(2), BannedWords([[30], [11, 12]])]
    options = g.Options(temperature=0.8, top_k=60, top_p=0.9, min_p=0.01, processors=rules)
    for step, (raw, want) in enumerate(zip(out.logits, out.scores)):
        ids = [out.sequences[0, :len(prompts[0]) + step].tolist()]
        got = g.process(options.chain(), ids, raw, step)
        assert torch.equal(got == -INF, want == -INF)
        assert torch.allclose(got[got > -INF], want[want > -INF], atol=1e-4)


def test_greedy_ignores_what_only_sampling_needs():
    names = [type(p).__name__ for p in g.Options(
        temperature=0, top_k=5, top_p=0.5, repetition_penalty=1.1, processors=[Typical(0.5)]).chain()]
    assert names == ["RepetitionPenalty"]


def test_no_mode_leaks_out_of_a_stream():
    tokens = g.stream(tiny(), [1], max_new_tokens=3)
    next(tokens)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    model = tiny()
    g.generate(model, [1, 2], max_new_tokens=3)
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.wpe.weight.grad is not None


# ------------------------------------------------------------------ greedy and sampling

def test_greedy_equals_transformers_on_50_prompts(model, hf, prompts, ledger):
    stop = (0, 1, 2)
    out, longest = hf_batch(hf, prompts, max_new_tokens=24, eos_token_id=list(stop))
    ours = g.generate(model, prompts, max_new_tokens=24, temperature=0, stop_ids=stop)
    assert len(prompts) == 50 and {text.finish_reason for text in ours} == {"stop", "length"}
    wrong = sum(text.ids != new_tokens(row, longest, stop) for text, row in zip(ours, out.sequences))
    ledger("greedy decoding, 50 prompts, 24 tokens: prompts with other tokens", wrong, peer="transformers", bound=0)
    assert wrong == 0


def test_logprobs_equal_transformers(model, hf, prompts):
    ids = prompts[2]
    out = hf_generate(hf, ids, max_new_tokens=6, output_logits=True)
    want = hf.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)[0]
    got = g.generate(model, ids, max_new_tokens=6, temperature=0).logprobs
    assert torch.allclose(torch.tensor(got), want, atol=1e-4)


def test_draws_follow_the_distribution():
    model, counts = tiny(vocab_size=6, spread=8.0), torch.zeros(6)
    p = g.process(g.Options(temperature=1.5, top_k=4).chain(), [[1]], model(torch.tensor([[1]]))[:, -1].detach(), 0)
    p = p.softmax(-1)[0]
    for text in g.generate(model, [[1]] * 3000, temperature=1.5, top_k=4, max_new_tokens=1, seed=0):
        counts[text.ids[0]] += 1
    seen = p > 0
    assert counts[~seen].sum() == 0 and seen.sum() == 4
    chi2 = ((counts - 3000 * p)[seen] ** 2 / (3000 * p[seen])).sum()
    assert chi2 < 16.27  # 3 degrees of freedom, one in a thousand


def test_pick_never_takes_a_forbidden_token():
    class Edge(random.Random):
        def __init__(self, value):
            super().__init__(0)
            self.value = value

        def random(self):
            return self.value

    logits = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]])
    assert g.pick(logits, [Edge(0.0)]) == [1]
    assert g.pick(logits, [Edge(0.5)]) == [3]
    assert g.pick(logits, [Edge(1 - 2**-53)]) == [3]
    assert g.pick_best(logits) == [1]                      # of equal ones, the first
    for forbidden in (torch.full((1, 5), -INF), torch.tensor([[0.0, 1.0], [-INF, -INF]])):
        with pytest.raises(ValueError, match="no token is left"):
            g.pick_best(forbidden)
    with pytest.raises(ValueError, match="no token is left"):
        g.pick(torch.full((1, 5), -INF), [Edge(0.3)])
    with pytest.raises(ValueError, match="no token is left"):
        g.generate(tiny(), [1], temperature=0, processors=[BannedTokens(range(50))], max_new_tokens=5)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95}])
def test_batch_equals_one_by_one(model, prompts, options, ledger):
    rows = prompts[:6] + [prompts[0]]
    together = g.generate(model, rows, max_new_tokens=10, stop_ids=[0, 1, 2], seed=7, **options)
    wrong = 0
    for i, (ids, got) in enumerate(zip(rows, together)):
        alone = g.generate(model, ids, max_new_tokens=10, stop_ids=[0, 1, 2], seed=7 + i, **options)
        wrong += got.ids != alone.ids or got.finish_reason != alone.finish_reason
        assert torch.allclose(torch.tensor(got.logprobs), torch.tensor(alone.logprobs), atol=1e-3)
    ledger(f"a batch of unequal prompts = one by one ({options}): rows with other tokens", wrong, bound=0)
    assert wrong == 0


def test_a_row_does_not_depend_on_its_neighbours():
    model, options = tiny(), dict(max_new_tokens=12, stop_ids=[3, 7], temperature=1.3)
    one = g.generate(model, [[1, 2], [5], [9, 9, 9]], seed=[11, 12, 13], **options)
    two = g.generate(model, [[4] * 10, [5], [1]], seed=[1, 12, 2], **options)
    assert one[1].ids == two[1].ids
    assert g.generate(model, [5], seed=12, **options).ids == one[1].ids
    assert g.generate(model, [5], seed=13, **options).ids != one[1].ids


def test_finished_rows_leave_the_batch():
    model, sizes = tiny(), []
    decoder = Decoder(model, "live")
    model.blocks[0].attn.c_attn.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[0]))
    texts = g.generate(model, [[i] for i in range(8)], temperature=2.0, seed=1, max_new_tokens=20,
                       stop_ids=range(0, 50, 5), decoder=decoder)
    ends = [len(text.ids) for text in texts]
    # a row is fed as long as it goes on: once for the prompt, then for each token but its last
    want = [sum(end > step for end in ends) for step in range(max(ends))]
    assert sizes == [8, *want][:len(sizes)] and sizes[-1] < 8
    assert {t.finish_reason for t in texts} <= {"stop", "length"}
    assert not any(i in range(0, 50, 5) for t in texts for i in t.ids)


def test_without_a_seed_torchs_generator_decides():
    model = tiny()
    torch.manual_seed(5)
    a = g.generate(model, [1], max_new_tokens=9)
    torch.manual_seed(5)
    assert g.generate(model, [1], max_new_tokens=9) == a
    assert g.generate(model, [1], max_new_tokens=9) != a


def test_stream_is_generate(model, prompts):
    options = dict(temperature=0.8, top_k=30, max_new_tokens=9, seed=3)
    tokens = g.stream(model, prompts[1], **options)
    assert tokens.finish_reason is None
    assert list(tokens) == g.generate(model, prompts[1], **options).ids
    assert tokens.finish_reason in ("stop", "length")
    assert list(g.stream(model, torch.tensor(prompts[1]), **options)) == tokens.result.ids


# ------------------------------------------------------------------ the context's end

def test_overflow_error_names_what_would_fit():
    model = tiny()
    with pytest.raises(ValueError, match=r"40 prompt tokens .*context of 32"):
        g.generate(model, [1] * 40)
    with pytest.raises(ValueError, match="ask for 12 tokens at most"):
        g.generate(model, [1] * 20, max_new_tokens=13)
    assert len(g.generate(model, [1] * 20, max_new_tokens=12).ids) == 12
    assert len(g.generate(model, [1] * 20, max_new_tokens=None).ids) == 12


def test_overflow_truncate_keeps_the_end():
    model, ids = tiny(), list(range(40))
    got = g.generate(model, ids, max_new_tokens=12, temperature=0, overflow="truncate")
    assert got == g.generate(model, ids[-20:], max_new_tokens=12, temperature=0)
    with pytest.raises(ValueError, match="max_new_tokens=32"):
        g.generate(model, ids, max_new_tokens=32, overflow="truncate")


@pytest.mark.parametrize("length", [5, 31, 32, 45])
def test_overflow_slide_equals_reading_the_window_anew(length):
    model, ids = tiny(), list(range(length))
    got = g.generate(model, ids, max_new_tokens=60, temperature=0, overflow="slide")
    window, want = ids if length < 32 else ids[-24:], []
    for _ in range(60):
        want.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        window = (window + want[-1:])[-24:] if len(window) == 32 else window + want[-1:]
    assert got.ids == want
    both = g.generate(model, [[3], ids], max_new_tokens=60, temperature=0, overflow="slide")
    assert both[1].ids == want


# ------------------------------------------------------------------ bad input

@pytest.mark.parametrize("options, message", [
    ({"temperature": -0.1}, "temperature=-0.1 must be 0"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_p": 0}, "top_p=0 must"), ({"top_p": 1.01}, "top_p=1.01 must"), ({"top_k": 0}, "top_k=0 must"),
    ({"min_p": -1}, "min_p=-1"), ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"overflow": "wrap"}, "overflow='wrap'"), ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ({"top_p": 2, "temperature": 0}, "top_p=2")])
def test_bad_options(options, message):
    with pytest.raises(ValueError) as error:
        g.generate(tiny(), [1], **{"max_new_tokens": 5} | options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, value, message", [
    (Typical, 2, "typical_p=2"), (NoRepeatNGram, 0, "no_repeat_ngram_size=0"), (BannedWords, [[]], "banned_words"),
    (FrequencyPenalty, float("inf"), "frequency_penalty=inf"), (g.TopK, 0, "top_k=0"), (g.RepetitionPenalty, 0, "repetition_penalty=0")])
def test_bad_processors(kind, value, message):
    with pytest.raises(ValueError) as error:
        kind(value)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_options_that_there_are_not():
    model = tiny()
    for call in (g.generate, g.stream):
        with pytest.raises(TypeError, match="there is no option 'typical_p', there are max_new_tokens, .*processors"):
            call(model, [1], typical_p=0.9)
        with pytest.raises(TypeError, match="options=5 must be an Options: give single settings by name"):
            call(model, [1], 5)
        with pytest.raises(TypeError, match="multiple values for argument 'options'"):
            call(model, [1], g.Options(), options=g.Options())
        with pytest.raises(TypeError, match="positional"):
            call(model, [1], g.Options(), g.Options())
    with pytest.raises(TypeError, match="positional"):
        g.Options(12)


def test_settings_change_an_options_value():
    model, options = tiny(), g.Options(max_new_tokens=9, temperature=0.7, seed=4)
    assert g.generate(model, [1], options) == g.generate(model, [1], max_new_tokens=9, temperature=0.7, seed=4)
    assert g.generate(model, [1], options, seed=5) == g.generate(model, [1], max_new_tokens=9, temperature=0.7, seed=5)
    assert options.seed == 4


# ------------------------------------------------------------------ stages, the end of a text, broken logits

def test_processors_are_sorted_by_their_stage():
    class Warp:
        stage = "warp"

        def __call__(self, ids, logits, step):
            return logits

    def plain(ids, logits, step):
        return logits

    given = [Warp(), ForcedTokens([1]), plain, BannedTokens([1]), PresencePenalty(1)]
    made = g.Options(temperature=0.5, top_p=0.9, repetition_penalty=1.2, processors=given).chain()
    assert [getattr(p, "__name__", type(p).__name__) for p in made] == [
        "RepetitionPenalty", "PresencePenalty", "BannedTokens", "plain", "ForcedTokens", "Temperature", "TopP", "Warp"]
    Warp.stage = "last"
    with pytest.raises(ValueError, match="stage='last' must be one of \['penalty', 'ban'"):
        g.Options(processors=given)


def test_a_text_ends_at_the_models_own_end_token():
    """As in transformers: unless stop_ids names others, or none."""
    end = 7
    model, free = tiny(eos_token_id=end), tiny()
    ended = 0
    for first in range(12):
        whole = g.generate(free, [first], max_new_tokens=20, temperature=1.5, seed=first)
        got = g.generate(model, [first], max_new_tokens=20, temperature=1.5, seed=first)
        cut = whole.ids.index(end) if end in whole.ids else 20
        assert got.ids == whole.ids[:cut] and got.finish_reason == ("stop" if cut < 20 else "length")
        assert list(g.stream(model, [first], max_new_tokens=20, temperature=1.5, seed=first)) == got.ids
        assert g.generate(model, [first], max_new_tokens=20, temperature=1.5, seed=first, stop_ids=()).ids == whole.ids
        ended += cut < 20
    assert 0 < ended < 12


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 3, "top_p": 0.5}, {"processors": [ForcedTokens([3])]}])
def test_broken_logits_are_an_error(bad, options):
    model = tiny()
    with torch.no_grad():
        model.ln_f.bias[3] = bad
    with pytest.raises(ValueError, match="the logits hold NaN or infinity"):
        g.generate(model, [1, 2], max_new_tokens=3, **options)
    for call in (lambda logits: g.pick(logits, [random.Random(0)]), g.pick_best):
        with pytest.raises(ValueError, match="the logits hold NaN or infinity"):
            call(torch.tensor([[0.0, bad, 1.0]]))


def test_the_penalty_counts_new_tokens_unless_told():
    """The prompt's words may come again; by hand, over the loop's own logits."""
    model, prompt, new = tiny(), [1, 2, 3], []
    for _ in range(10):
        logits = model(torch.tensor([prompt + new]))[0, -1].detach()
        for token in set(new):
            logits[token] = logits[token] * 1.8 if logits[token] < 0 else logits[token] / 1.8
        new.append(int(logits.argmax()))
    assert g.generate(model, prompt, max_new_tokens=10, temperature=0, repetition_penalty=1.8).ids == new


@pytest.mark.parametrize("ids, message", [
    ([], "the prompt is empty"), ([[1], []], "the prompt is empty"), ([50], "token id 50 is out of range"),
    ([3, -1], "token id -1 is out of range"), (torch.empty(0, dtype=torch.long), "the prompt is empty")])
def test_bad_prompts(ids, message):
    for call in (g.generate, beam_search):
        with pytest.raises(ValueError, match=message):
            call(tiny(), ids)


def test_stream_takes_one_prompt():
    model = tiny()
    with pytest.raises(ValueError, match="2 prompts were given where only one is taken"):
        g.stream(model, [[1], [2]])
