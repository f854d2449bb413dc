"""The decoder that keeps its prefix: equal to the model's forward pass, whatever it keeps, forks or takes back."""
import copy

import pytest
import torch
import torch.nn as nn
from exercise_cells import exercises, said
from test_generation import model, prompts, tiny, tokenizer  # noqa: F401

from minigpt.deeper.fast_decoding import Decoder, Move, run_strategy
from minigpt.engine.cache import CachedDecoder
from minigpt.generation import generate, stream

pytestmark = pytest.mark.usefixtures("one_thread")  # single tokens: threads would mostly wait for each other


class Doubled(nn.Module):
    """Stands in for LoRA: a module in the place of an nn.Linear that does more."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.extra = linear, nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x):
        return self.linear(x) + self.extra(x)


@pytest.mark.parametrize("weights", ["live", "fast", "auto"])
@pytest.mark.parametrize("change", ["plain", "gelu", "wrapped", "hook"])
def test_decoder_equals_forward(weights, change, ledger):
    model = tiny(n_layer=3, n_head=4, n_embd=64, vocab_size=90,  # noqa: F811
                 activation="gelu" if change == "gelu" else "gelu_new")
    if change == "wrapped":
        torch.manual_seed(1)
        model.blocks[1].mlp.c_fc = Doubled(model.blocks[1].mlp.c_fc)
        model.blocks[0].attn.c_attn = Doubled(model.blocks[0].attn.c_attn)
    if change == "hook":
        model.blocks[2].mlp.c_proj.register_forward_hook(lambda module, args, out: out * 0.5)
    decoder, worst = Decoder(model, weights), 0.0
    rows = [[3, 1, 4, 1, 5], [9, 2], [6]]
    with torch.no_grad():
        got = decoder.start(rows, room=8)[:, 0]
        for fed in ([[7], [8], [9]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[0], [0], [0]]):
            want = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
            worst = max(worst, float((got - want).abs().max()))
            got = decoder.feed(fed)[:, -1]
            rows = [row + new for row, new in zip(rows, fed)]
    ledger(f"decoder ({weights} weights) = GPT2.forward: logits", worst, bound=1e-4)
    assert worst < 1e-4


def test_decoder_of_the_shipped_model(model, prompts, ledger):  # noqa: F811
    worst, decoder = 0.0, Decoder(model)
    with torch.no_grad():
        for ids in prompts[:8:2]:
            decoder.start([ids[:-2]], 2)
            got = torch.cat([decoder.feed([[token]]) for token in ids[-2:]], 1)
            worst = max(worst, float((got - model(torch.tensor([ids]))[:, -2:]).abs().max()))
    ledger("decoder = GPT2.forward, shipped model: logits", worst, bound=1e-3)
    assert worst < 1e-3


def test_bfloat16_and_int8_stay_near():
    model = tiny(n_embd=64, vocab_size=90)  # noqa: F811
    want = model(torch.tensor([[3, 1, 4, 1]]))[0, -1]
    half = Decoder(copy.deepcopy(model).bfloat16()).start([[3, 1, 4, 1]])[0, -1].float()
    int8 = Decoder(model, "int8").start([[3, 1, 4, 1]])[0, -1]
    for got, bound in ((half, 0.03), (int8, 0.06)):
        assert 0 < (got - want).norm() / want.norm() < bound


def test_int8_weights_of_a_bfloat16_model():
    model = tiny(n_embd=64, vocab_size=90)  # noqa: F811
    want = model(torch.tensor([[3, 1, 4, 1]]))[0, -1]
    decoder = Decoder(copy.deepcopy(model).bfloat16(), "int8")
    decoder.start([[3, 1]])
    got = decoder.feed([[4, 1]])[0, -1]
    assert got.dtype == torch.bfloat16 and 0 < (got.float() - want).norm() / want.norm() < 0.08


def test_live_weights_are_live_and_fast_ones_a_snapshot():
    model = tiny()  # noqa: F811
    live, fast = Decoder(model, "live"), Decoder(model, "fast")
    before = [d.start([[1, 2]])[0, 0].clone() for d in (live, fast)]
    with torch.no_grad():
        model.blocks[0].mlp.c_fc.weight.mul_(2)
    live.ids = fast.ids = []
    after = [d.start([[1, 2]])[0, 0] for d in (live, fast)]
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert torch.allclose(after[0], model(torch.tensor([[1, 2]]))[0, -1], atol=1e-4)


def test_live_weights_keep_no_columns_of_old_ones():
    model = tiny()  # noqa: F811
    decoder = Decoder(model, "live")
    decoder.start([[1, 2, 3]])
    with torch.no_grad():
        model.blocks[0].mlp.c_fc.weight.mul_(2)
    got = decoder.start([[1, 2, 3, 4]])[0, 0]
    assert torch.allclose(got, model(torch.tensor([[1, 2, 3, 4]]))[0, -1], atol=1e-4)


def test_a_padded_row_is_not_gone_on_from():
    """A batch that shrank to its shorter prompt, in a cache as long as the context."""
    model = tiny()  # noqa: F811
    decoder = Decoder(model)
    decoder.start([[1, 2, 3, 4, 5], [6, 7]], room=32)
    decoder.feed([[8]], rows=[1])
    got = decoder.start([[6, 7, 8, 9]])[0, 0]
    assert torch.allclose(got, model(torch.tensor([[6, 7, 8, 9]]))[0, -1], atol=1e-4)


@pytest.mark.parametrize("rows, shared", [([0, 1, 2, 3], 0), ([3, 3, 1, 0], 2), ([1, 0], 0), ([2, 2, 2, 2, 0, 1], 0)])
def test_cache_rows_follow(rows, shared):
    model = tiny()  # noqa: F811
    decoder = Decoder(model)
    common = [5, 6][:shared]
    texts = [common + [i, i + 1, i + 2][:3] for i in range(4)]
    decoder.start(texts, room=4)
    fed = [[10 + i] for i in range(len(rows))]
    got = decoder.feed(fed, rows, shared=shared)[:, -1]
    for logits, row, new in zip(got, rows, fed):
        assert torch.allclose(logits, model(torch.tensor([texts[row] + new]))[0, -1], atol=1e-4)


def test_a_fork_takes_only_the_memory_that_it_needs():
    model = tiny()  # noqa: F811
    decoder = Decoder(model)
    decoder.start([[1, 2, 3]], room=5)
    assert decoder.cache.room == 32  # a single text may grow
    decoder.feed([[4]] * 6, rows=[0] * 6)
    assert (decoder.cache.rows, decoder.cache.room) == (6, 8)


def test_conversation_reads_only_what_is_new():
    model, reads = tiny(), []  # noqa: F811
    model.blocks[0].attn.c_attn.register_forward_hook(lambda module, args, out: reads.append(args[0].shape[1]))
    decoder = Decoder(model)
    first = generate(model, [1, 2, 3, 4], max_new_tokens=3, temperature=0, stop_ids=(), decoder=decoder)
    reads.clear()
    follow_up = [1, 2, 3, 4, *first.ids, 9, 8]
    second = generate(model, follow_up, max_new_tokens=3, temperature=0, stop_ids=(), decoder=decoder)
    assert reads[0] == 3  # the last drawn token was never read, and two are new
    assert second.ids == generate(model, follow_up, max_new_tokens=3, temperature=0, stop_ids=()).ids
    reads.clear()
    generate(model, follow_up, max_new_tokens=1, temperature=0, stop_ids=(), decoder=decoder)
    assert reads == [1]  # the same prompt again: its last token alone
    elsewhere = [1, 2, 7, 7]
    third = generate(model, elsewhere, max_new_tokens=3, temperature=0, stop_ids=(), decoder=decoder)
    assert third.ids == generate(model, elsewhere, max_new_tokens=3, temperature=0, stop_ids=()).ids


def test_reuse_after_an_abandoned_stream():
    model = tiny()  # noqa: F811
    decoder = Decoder(model)
    tokens = stream(model, [1, 2, 3], temperature=0, max_new_tokens=8, stop_ids=(), decoder=decoder)
    next(tokens), next(tokens)
    tokens.pairs.close()
    again = generate(model, [1, 2, 3], temperature=0, max_new_tokens=8, stop_ids=(), decoder=decoder)
    assert again.ids == generate(model, [1, 2, 3], temperature=0, max_new_tokens=8, stop_ids=()).ids


@pytest.mark.parametrize("rows", [[[1, 2, 3]], [[1, 2], [5], [9, 9, 9, 9]]])
@pytest.mark.parametrize("weights", ["live", "fast"])
def test_it_draws_what_the_plain_decoder_draws(rows, weights):
    model = tiny()  # noqa: F811
    options = dict(max_new_tokens=20, temperature=1.2, seed=3, stop_ids=[7, 9])
    want = generate(model, rows, decoder=CachedDecoder(model), **options)
    assert [text.ids for text in generate(model, rows, decoder=Decoder(model, weights), **options)] == [
        text.ids for text in want]


def test_a_full_context_slides_as_the_plain_decoders_does():
    model = tiny()  # noqa: F811
    options = dict(max_new_tokens=60, temperature=0, overflow="slide", stop_ids=())
    for length in (5, 32, 45):
        want = generate(model, range(length), decoder=CachedDecoder(model), **options)
        assert generate(model, range(length), decoder=Decoder(model), **options).ids == want.ids


def test_one_loop_for_a_strategy_that_forks_and_takes_back():
    """Two rows from one, then a token taken back: the logits are those of the texts that are left."""
    model, seen = tiny(), []  # noqa: F811
    moves = iter([Move([], [[3], [4]], rows=[0, 0]), Move([(0, 4)], [[5], [6]], rows=[1, 1]),
                  Move([], [[7], [8]], forget=1), Move([(0, 8)])])

    def strategy(logits):
        seen.append(logits[:, -1].clone())
        return next(moves)

    assert list(run_strategy(Decoder(model), [[1, 2]], strategy, 8)) == [(0, 4), (0, 8)]
    texts = [[[1, 2]], [[1, 2, 3], [1, 2, 4]], [[1, 2, 4, 5], [1, 2, 4, 6]], [[1, 2, 4, 7], [1, 2, 4, 8]]]
    for logits, rows in zip(seen, texts, strict=True):
        assert torch.allclose(logits, model(torch.tensor(rows))[:, -1], atol=1e-4)


def test_bad_weights():
    with pytest.raises(ValueError, match="weights='slow'"):
        Decoder(tiny(), "slow")


# ------------------------------------------------------------------ the exercises

@pytest.fixture(scope="module")
def names():
    """What the notebook has defined by the time of its exercises."""
    from minigpt.deeper import fast_decoding
    model = tiny(spread=1.0, n_layer=8, n_embd=512, block_size=64)  # noqa: F811

    class CountingDecoder(Decoder):
        def __init__(self, model):
            super().__init__(model)
            self.counts = []

        def _read(self, tokens, last_only):
            self.counts.append(len(tokens[0]))
            return super()._read(tokens, last_only)

    def truth(ids):
        with torch.no_grad():
            return model(torch.tensor([ids]))[0, -1]
    return {"torch": torch, "model": model, "weights": 35_000_000, "CountingDecoder": CountingDecoder, "truth": truth,
            "_shared_prefix": fast_decoding._shared_prefix}


@pytest.mark.parametrize("number, empty, check, solution", exercises("deeper/fast_decoding"), ids=lambda v: v[-1])
def test_exercise(number, empty, check, solution, names, capsys):
    assert said(empty, check, names, capsys) == "not solved yet"
    assert said(solution, check, names, capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def most_tokens(w, b, g): return w * b / (g * 1e9)", "how many seconds"),
    (2, "def rows_until(c, w, t): return w // (c.n_layer * c.n_embd * t) + 1", "twice as many"),
    (3, "class TwoTexts(CountingDecoder):\n    pass", "it read [20, 30, 22, 33, 25]")])
def test_wrong_answers_are_told(number, wrong, words, names, capsys):
    assert words in said(wrong, exercises("deeper/fast_decoding")[number - 1][2], names, capsys)
