"""minigpt.attention against values computed another way: plain loops, torch, transformers."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exercise_cells import exercises, said
from minigpt.attention import (ATTENTION, CausalSelfAttention, attention, causal_mask, eager_attention, merge_heads,
                               plot_weights, sdpa_attention, set_attn_implementation, split_heads)

torch.manual_seed(0)


def by_loops(q, k, v, allowed):
    """Attention of one head in float64, number by number; allowed[t][s] says where query t may look."""
    out, pattern = np.zeros((len(q), v.shape[1])), np.zeros((len(q), len(k)))
    for t in range(len(q)):
        seen = [s for s in range(len(k)) if allowed[t][s]]
        scores = [sum(a * b for a, b in zip(q[t], k[s])) / math.sqrt(q.shape[1]) for s in seen]
        top = max(scores, default=0.0)
        exps = [math.exp(score - top) for score in scores]
        for s, e in zip(seen, exps):
            pattern[t, s] = e / sum(exps)
            out[t] += pattern[t, s] * v[s]
    return out, pattern


# ------------------------------------------------------------------ the function

@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (3, 7), (1, 6)])
def test_equals_plain_loops(T, S, ledger):
    rng = np.random.default_rng(T * 10 + S)
    q, k, v = rng.normal(size=(T, 4)), rng.normal(size=(S, 4)), rng.normal(size=(S, 3))
    allowed = [[s <= t + S - T for s in range(S)] for t in range(T)]
    want, weights = by_loops(q, k, v, allowed)
    out, pattern = attention(*(torch.tensor(a, dtype=torch.float64) for a in (q, k, v)))
    error = max(np.abs(out.numpy() - want).max(), np.abs(pattern.numpy() - weights).max())
    ledger(f"attention = plain loops, T={T} S={S}, float64", float(error), peer="numpy", bound=1e-12)
    assert error < 1e-12


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("B, H, T, D", [(1, 1, 1, 8), (2, 4, 33, 16), (1, 12, 128, 64), (2, 25, 17, 64)])
def test_equals_sdpa(B, H, T, D, dtype, bound, ledger):
    q, k, v = torch.randn(3, B, H, T, D, generator=torch.Generator().manual_seed(D + T)).to(dtype)
    free = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(T)) < 0.6
    free |= torch.eye(T, dtype=torch.bool)
    worst = 0.0
    for ours, theirs in (
            (attention(q, k, v)[0], F.scaled_dot_product_attention(q, k, v, is_causal=True)),
            (attention(q, k, v, causal=False)[0], F.scaled_dot_product_attention(q, k, v)),
            (attention(q, k, v, free, causal=False)[0], F.scaled_dot_product_attention(q, k, v, attn_mask=free)),
            (attention(q, k, v, free)[0], F.scaled_dot_product_attention(q, k, v, attn_mask=free & causal_mask(T)))):
        assert ours.dtype == dtype
        worst = max(worst, (ours - theirs).abs().max().item())
    ledger(f"manual attention = SDPA, {B}x{H}x{T}x{D} {str(dtype)[6:]}", worst, peer="torch", bound=bound)
    assert worst < bound


def test_gradients_equal_sdpa_and_differences():
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 3, 6, 8).double())
    weight = torch.randn(2, 3, 6, 8).double()
    ours = torch.autograd.grad((attention(q, k, v)[0] * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((F.scaled_dot_product_attention(q, k, v, is_causal=True) * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-12)
    small = [t[0, 0, :3, :2].detach().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv)[0], small)


def test_a_row_masked_whole_is_zero_and_has_finite_gradients():
    mask = causal_mask(4)
    mask[0] = False
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 4, 8))
    out, pattern = attention(q, k, v, mask)
    assert (pattern[:, 0] == 0).all() and (out[:, 0] == 0).all()
    assert torch.allclose(pattern[:, 1:].sum(-1), torch.ones(2, 3))
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad.isfinite().all()
    sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(out, sdpa, atol=1e-6)


def test_causal_mask():
    for T in range(1, 5):
        for S in range(T, 7):
            want = [[s <= S - T + t for s in range(S)] for t in range(T)]
            assert causal_mask(T, S).tolist() == want


@pytest.mark.parametrize("call, error, words", [
    (lambda x: attention(x, x[..., :3], x), ValueError, "(2, 5, 3)"),
    (lambda x: attention(x, x, x[:, :4]), ValueError, "(2, 4, 8)"),
    (lambda x: attention(x, x[:, :3], x[:, :3]), ValueError, "5 queries"),
    (lambda x: attention(x, x, x, torch.ones(5, 5)), TypeError, "torch.float32"),
    (lambda x: eager_attention(x, x, x, torch.zeros(5, 5)), TypeError, "bool mask"),
    (lambda x: set_attn_implementation(CausalSelfAttention(8, 2), "flash"), ValueError, "flash'; there are: eager, sdpa"),
    (lambda x: causal_mask(3, 2), ValueError, "not 2"),
    (lambda x: split_heads(x, 3), ValueError, "8 channels"),
    (lambda x: split_heads(x, 0), ValueError, "0 heads"),
    (lambda x: CausalSelfAttention(10, 3), ValueError, "n_head=3"),
    (lambda x: CausalSelfAttention(10, 0), ValueError, "n_head=0"),
    (lambda x: plot_weights(x, list("abcde")), ValueError, "(2, 5, 8)"),
    (lambda x: plot_weights(x[0], list("abc")), ValueError, "3 labels"),
])
def test_bad_input_names_the_value(call, error, words):
    with pytest.raises(error) as caught:
        call(torch.randn(2, 5, 8))
    assert words in str(caught.value)


# ------------------------------------------------------------------ heads

def test_heads_are_slices_of_the_channels():
    x = torch.randn(2, 5, 12)
    heads = split_heads(x, 3)
    for h in range(3):
        assert torch.equal(heads[:, h], x[:, :, 4 * h:4 * h + 4])
    assert heads.data_ptr() == x.data_ptr()  # no copy
    assert torch.equal(merge_heads(heads), x)


# ------------------------------------------------------------------ the layer

def a_layer(n_embd=32, n_head=4, **options):
    torch.manual_seed(1)
    return CausalSelfAttention(n_embd, n_head, **options)


def watcher(seen):
    """An implementation of attention that keeps what it is given and what it makes."""
    def watch(q, k, v, mask=None):
        z, pattern = attention(q, k, v, mask)
        seen.update(q=q, k=k, v=v, pattern=pattern, z=z)
        return z
    return watch


def test_names_in_the_state_dict():
    shapes = {name: tuple(t.shape) for name, t in a_layer().state_dict().items()}
    assert shapes == {"c_attn.weight": (96, 32), "c_attn.bias": (96,), "c_proj.weight": (32, 32), "c_proj.bias": (32,)}


def test_equals_multihead_attention_of_torch(ledger):
    layer, x = a_layer(), torch.randn(3, 9, 32)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = layer.c_attn.weight, layer.c_attn.bias
    theirs.out_proj = layer.c_proj
    want, weights = theirs(x, x, x, attn_mask=~causal_mask(9), average_attn_weights=False)
    seen = {}
    set_attn_implementation(layer, watcher(seen))
    tapped = layer(x)
    set_attn_implementation(layer, "sdpa")
    error = max((layer(x) - want).abs().max().item(), (tapped - want).abs().max().item(),
                (seen["pattern"] - weights).abs().max().item())
    ledger("CausalSelfAttention = nn.MultiheadAttention, output and pattern", error, peer="torch", bound=1e-5)
    assert error < 1e-5


@pytest.mark.parametrize("n_embd, n_head", [(768, 12), (1600, 25)])
def test_equals_gpt2_attention_of_transformers(n_embd, n_head, ledger):
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
    theirs = GPT2Attention(GPT2Config(n_embd=n_embd, n_head=n_head, attn_implementation="sdpa"), layer_idx=0).eval()
    layer = a_layer(n_embd, n_head).eval()
    with torch.no_grad():
        for ours, other in ((layer.c_attn, theirs.c_attn), (layer.c_proj, theirs.c_proj)):
            ours.weight.copy_(other.weight.t())
            ours.bias.copy_(other.bias.normal_())
        x = torch.randn(2, 40, n_embd)
        error = (layer(x) - theirs(x)[0]).abs().max().item()
    ledger(f"CausalSelfAttention = GPT2Attention, {n_embd} wide", error, peer="transformers", bound=1e-4)
    assert error < 1e-4


def test_no_gradient_comes_from_a_later_token():
    layer, x = a_layer(), torch.randn(1, 6, 32, requires_grad=True)
    for name in ("eager", "sdpa"):
        set_attn_implementation(layer, name)
        for t in range(6):
            grad, = torch.autograd.grad(layer(x)[0, t].sum(), x)
            reached = grad[0].abs().amax(-1) > 0
            assert reached.tolist() == [s <= t for s in range(6)]


@pytest.mark.parametrize("name", ["eager", "sdpa", "blockwise"])
@pytest.mark.parametrize("free", [torch.ones(6, 6), torch.ones(6, 6).triu(), torch.tensor([0, 1, 1, 1, 1, 1])])
def test_a_mask_never_lifts_the_causal_one(free, name):
    """Whatever a mask allows, no gradient comes from a later token, nor from one that it forbids."""
    from minigpt.engine import kernels  # noqa: F401  registers "blockwise"
    free = free.bool().expand(6, 6)
    layer, x = a_layer(), torch.randn(1, 6, 32, requires_grad=True)
    set_attn_implementation(layer, name)
    whole, cache = layer(x, free[None, None]), Keep()
    for t in range(6):
        grad, = torch.autograd.grad(whole[0, t].sum(), x, retain_graph=True)
        seen = [s <= t and bool(free[t, s]) for s in range(6)]
        assert [s for s in range(6) if s != t and grad[0, s].abs().max() > 0] == [s for s in range(t) if seen[s]]
    pieces = [layer(x[:, a:b], free[None, None, a:b, :b], cache) for a, b in ((0, 3), (3, 5), (5, 6))]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-6)


class Keep:
    """The smallest cache: all keys and values so far."""

    def __init__(self):
        self.kv = {}

    def append(self, layer_idx, k, v):
        old = self.kv.get(layer_idx, (k[:, :, :0], v[:, :, :0]))
        self.kv[layer_idx] = tuple(torch.cat(pair, dim=2) for pair in zip(old, (k, v)))
        return self.kv[layer_idx]


@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 3, 1], [1, 6], [2, 5]])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_in_pieces_through_a_cache_equals_at_once(pieces, name, ledger):
    layer, x = a_layer(layer_idx=3), torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(7))
    want, cache = layer(x), Keep()
    set_attn_implementation(layer, name)
    got = torch.cat([layer(piece, cache=cache) for piece in x.split(pieces, dim=1)], dim=1)
    error = (got - want).abs().max().item()
    ledger(f"attention layer in pieces {pieces} = at once, {name}", error, bound=1e-6)
    assert error < 1e-6 and list(cache.kv) == [3]  # its own number, among the layers of a model


def test_padded_batch_equals_one_by_one():
    layer = a_layer()
    long, short = torch.randn(1, 6, 32), torch.randn(1, 4, 32)
    batch = torch.cat([long, torch.cat([torch.full((1, 2, 32), 9.0), short], dim=1)])
    mask = causal_mask(6).repeat(2, 1, 1, 1)  # (B, 1, T, S)
    mask[1, :, :, :2] = False
    for own in (False, True):  # rows of pads: masked whole, or seeing themselves
        got = layer(batch, mask | torch.eye(6, dtype=torch.bool) if own else mask)
        assert torch.allclose(got[:1], layer(long), atol=1e-6)
        assert torch.allclose(got[1:, 2:], layer(short), atol=1e-6)


def test_dropout_only_while_training():
    layer, x = a_layer(dropout=0.5), torch.randn(1, 200, 32)
    want = a_layer()(x)
    dropped = layer.train()(x)
    zeros = dropped == 0
    assert 0.4 < zeros.float().mean() < 0.6
    assert torch.allclose(dropped[~zeros], 2 * want[~zeros], atol=1e-5)
    assert torch.equal(layer.eval()(x), want)


def test_half_precision_stays_close():
    layer, x = a_layer(64, 4), torch.randn(2, 20, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16 and (got - layer(x)).abs().max() < 0.03


def kept(layer, T):
    """Bytes that a forward pass keeps for the backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = layer(torch.randn(1, T, 32, requires_grad=True))
    assert out.requires_grad
    return sum(found.values())


def test_a_pattern_is_made_only_where_it_is_asked_for():
    layer = a_layer()
    assert kept(layer, 512) <= 2.01 * kept(layer, 256)  # linear: no (T, T) anywhere
    set_attn_implementation(layer, "eager")
    assert kept(layer, 512) > 3.5 * kept(layer, 256)


def test_an_implementation_of_ones_own_sees_what_the_result_is_made_of():
    layer, x, seen = a_layer(), torch.randn(2, 5, 32), {}
    set_attn_implementation(layer, watcher(seen))
    result = layer(x)
    assert torch.allclose(seen["pattern"] @ seen["v"], seen["z"], atol=1e-6)
    assert torch.allclose(layer.c_proj(merge_heads(seen["z"])), result, atol=1e-6)
    assert a_layer().attend is sdpa_attention  # the choice belongs to one layer
    assert list(layer.state_dict()) == list(a_layer().state_dict())


def test_one_call_sets_all_layers_of_a_model():
    layers = nn.Sequential(a_layer(), nn.Sequential(a_layer()), nn.Linear(32, 32))
    set_attn_implementation(layers, "eager")
    assert [m.attend for m in layers.modules() if hasattr(m, "attend")] == 2 * [ATTENTION["eager"]]


# ------------------------------------------------------------------ pictures

@pytest.fixture
def pyplot():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


def test_plot_weights_shows_the_numbers(pyplot):
    pattern = torch.tensor([[0.25, 0.75, 0.0], [0.1, 0.2, 0.7]], requires_grad=True)
    ax = plot_weights(pattern, ["a$x$", "b", "c"], "title", values=True)
    assert np.allclose(ax.images[0].get_array(), pattern.detach())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a$x$", "b", "c"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "c"]  # queries are the last tokens
    assert [t.get_text() for t in ax.texts] == ["0.25", "0.75", "0", "0.1", "0.2", "0.7"]
    ax.figure.canvas.draw()  # a label with dollar signs is no formula


def test_plot_weights_leaves_infinite_cells_grey(pyplot):
    table = torch.tensor([[0.0, -math.inf], [math.nan, 1.0]])
    ax = plot_weights(table, ["a", "b"], limits=(-1, 1))
    assert ax.images[0].get_array().mask.tolist() == [[False, True], [True, False]]


# ------------------------------------------------------------------ the exercises

def names():
    return dict(torch=torch, math=math, Tensor=torch.Tensor, F=F, attention=attention, causal_mask=causal_mask)


@pytest.mark.parametrize("number, empty, check, solution", exercises("02"), ids=lambda v: v if len(v) == 4 else "")
def test_exercise(number, empty, check, solution, capsys):
    assert said(empty, check, names(), capsys) == "not solved yet"
    assert said(solution, check, names(), capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def window_mask(T, W): return causal_mask(T)", "window_mask(5, 2)[2]"),
    (1, "def window_mask(T, W): return causal_mask(T).float()", "bool mask"),
    (2, "def cross_attention(x, y, q, k, v): return attention(y @ q, x @ k, x @ v, causal=False)[0]", "shape (7, 4)"),
    (2, "def cross_attention(x, y, q, k, v): return attention(x @ q, y @ k, y @ v)[0]", "may every token"),
    (3, "def multi_query(q, k, v): return attention(q, k[:, None], v[:, None], causal=False)[0]", "sentence 0, head 0"),
    (4, "def one_pass(s, v):\n    e = s.exp()\n    return (e[:, None] * v).sum(0) / e.sum()", "subtract the largest"),
])
def test_a_wrong_solution_is_told_why(number, wrong, words, capsys):
    assert words in said(wrong, exercises("02")[number - 1][2], names(), capsys)
