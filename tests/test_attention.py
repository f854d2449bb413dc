"""minigpt.attention against values computed another way: plain loops, torch, transformers."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exercise_cells import exercises, said
from minigpt.attention import (BlockwiseAttention, CausalSelfAttention, attend, attention, attention_backward, causal_mask,
                               merge_heads, minus_columns, plot_pattern, split_heads)

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
            (attention(q, k, v, free)[0], F.scaled_dot_product_attention(q, k, v, attn_mask=free)),
            (attention(q, k, v, free, causal=True)[0],
             F.scaled_dot_product_attention(q, k, v, attn_mask=free & causal_mask(T)))):
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
    (lambda x: attend(x[None], x[None], x[None], torch.zeros(5, 5), tap=print), TypeError, "bool mask"),
    (lambda x: causal_mask(3, 2), ValueError, "not 2"),
    (lambda x: split_heads(x, 3), ValueError, "8 channels"),
    (lambda x: split_heads(x, 0), ValueError, "0 heads"),
    (lambda x: CausalSelfAttention(10, 3), ValueError, "n_head=3"),
    (lambda x: CausalSelfAttention(10, 0), ValueError, "n_head=0"),
    (lambda x: plot_pattern(x, list("abcde")), ValueError, "(2, 5, 8)"),
    (lambda x: plot_pattern(x[0], list("abc")), ValueError, "3 labels"),
])
def test_bad_input_names_the_value(call, error, words):
    with pytest.raises(error) as caught:
        call(torch.randn(2, 5, 8))
    assert words in str(caught.value)


# ------------------------------------------------------------------ the way back in blocks

def gradients(function, q, k, v, g, dtype):
    """The result and the gradients of q, k and v, computed in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    z = function(*leaves)
    return z, torch.autograd.grad(z, leaves, g.to(dtype))


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("rows", [1, 7, 128])
@pytest.mark.parametrize("B, H, T, D", [(1, 1, 1, 8), (2, 3, 20, 16), (1, 2, 300, 64)])
def test_way_back_in_blocks_equals_torchs(B, H, T, D, rows, ledger):
    q, k, v, g = torch.randn(4, B, H, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(T + rows))
    z, wanted = gradients(sdpa, q, k, v, g, torch.float64)
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(~causal_mask(T), -math.inf)
    found = attention_backward(*(t.flatten(0, 1) for t in (q, k, v, z, scores.logsumexp(-1), g)), rows)
    error = max((a.view(B, H, T, D) - b).abs().max().item() for a, b in zip(found, wanted))
    ledger(f"way back of attention in blocks of {rows} = SDPA's, {B}x{H}x{T}x{D}, float64", error, peer="torch", bound=1e-12)
    assert error < 1e-12


def off(found, wanted):
    """How far the gradients of q, k and v are from the right ones, each as a share of its length."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]


@pytest.mark.parametrize("size, factor", [(1, 3.8), (3, 1.5), (10, 1.5), (100, 1.5)])
@pytest.mark.parametrize("B, H, T, D", [(2, 4, 256, 64), (3, 2, 45, 16), (1, 4, 500, 32)])
def test_bfloat16_gradients_against_torchs_own(B, H, T, D, size, factor, ledger):
    """Scores of about 1 to 10,000: off by up to 3.8 times as much as torch's bfloat16 where patterns are even, else alike."""
    q, k, v, g = torch.randn(4, B, H, T, D, generator=torch.Generator().manual_seed(D)).bfloat16()
    q, k = size * q, size * k
    z, found = gradients(BlockwiseAttention.apply, q, k, v, g, torch.bfloat16)
    same, torchs = gradients(sdpa, q, k, v, g, torch.bfloat16)
    assert torch.equal(z, same)
    _, wanted = gradients(sdpa, q, k, v, g, torch.float64)
    ours, theirs = off(found, wanted), off(torchs, wanted)
    if wanted[0].norm() < 1e-3:          # each query looks at one key alone: nothing but rounding is left for q and k
        assert max(t.float().norm() for t in found[:2]) < 0.01
        ours, theirs = ours[2:], theirs[2:]
    worst = max(a / b for a, b in zip(ours, theirs))
    ledger(f"bfloat16 gradients of attention, {B}x{H}x{T}x{D}, scores x {size * size}: error over SDPA's", worst, peer="torch",
           bound=factor)
    assert worst < factor
    assert max(ours) < 0.02


def test_many_blocks_are_summed_in_32_bits():
    q, k, v, g = torch.randn(4, 1, 2, 1000, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    wide = [t[0].double().requires_grad_() for t in (q, k, v)]
    z = sdpa(*wide)
    wanted = torch.autograd.grad(z, wide, g[0].double())
    scores = (wide[0] @ wide[1].mT / math.sqrt(32)).masked_fill(~causal_mask(1000), -math.inf).detach()
    given = [t[0] for t in (q, k, v)] + [z.detach().bfloat16(), scores.logsumexp(-1).float(), g[0]]
    few, many = (off(attention_backward(*given, rows), wanted) for rows in (500, 8))
    for a, b in zip(few, many):
        assert b < 1.3 * a                        # 125 sums in bfloat16 would be off by several times as much


class Meter(torch.overrides.TorchFunctionMode):
    """Counts the calls of a function."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function is self.function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_which_way_back_is_taken(capability, monkeypatch):
    """attend() goes back in blocks for bfloat16 of one shape, causal and with gradients; all else is left to SDPA."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    wide_cpu = capability == "AVX512"
    q, k, v = torch.randn(3, 2, 4, 64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = causal_mask(64)

    def taken(q, k, v, **options):
        with Meter(F.scaled_dot_product_attention) as meter:
            attend(q, k, v, **options)
        return not meter.calls

    def leaf(t):
        return t.detach().clone().requires_grad_()
    for own in ((leaf(q), k, v), (q, leaf(k), v), (q, k, leaf(v))):
        assert taken(*own) == wide_cpu
    three = [leaf(t) for t in (q, k, v)]
    assert not taken(q, k, v) and not taken(*three, mask=mask) and not taken(*(t.float() for t in three))
    assert not taken(three[0][:, :, 3:], three[1], three[2])                     # more keys than queries
    assert not taken(*(leaf(t[:, :, :9]) for t in (q, k, v)))                    # tiny
    assert "Blockwise" not in type(torch.compile(attend, backend="eager")(*three).grad_fn).__name__
    with torch.no_grad():
        assert not taken(*three)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not taken(*three)

    odd = [  # what the inner kernel would read wrongly, or not at all
        [t.mT.contiguous().mT for t in (q, k, v)],                               # another order in memory
        [q, k[:1].expand(2, -1, -1, -1), v[:1]], [q, k[:, :1], v[:, :1]],        # broadcast
        [q, k, v[..., :4]], [q[:, :0], k[:, :0], v[:, :0]], [q[:, :, :0]] + [t[:, :, :0] for t in (k, v)]]
    for tensors in odd:
        leaves = [leaf(t) if t.is_contiguous() else t.detach().requires_grad_() for t in tensors]
        assert not taken(*leaves)


def test_no_gradient_comes_from_a_later_token_in_bfloat16():
    layer, x = a_layer(), torch.randn(1, 300, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    for t in (0, 1, 127, 128, 299):
        grad, = torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)
        assert (grad[0].abs().amax(-1) > 0).tolist() == [s <= t for s in range(300)]


def test_layer_learns_the_same_in_bfloat16():
    """Weights' gradients of the layer by autocast, over three blocks of queries, against float64's."""
    layer, x = a_layer(64, 2), torch.randn(2, 300, 64)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().sum().backward()
    exact = a_layer(64, 2).double()
    exact(x.double()).square().sum().backward()
    assert max(off([p.grad for p in layer.parameters()], [p.grad for p in exact.parameters()])) < 0.02


def test_second_derivatives_are_refused_and_not_wrong():
    """Also after a sum, where the incoming gradient is a constant and torch's once_differentiable would pass zeros."""
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 2, 6, 8).bfloat16())
    for lose in (torch.Tensor.sum, lambda z: z.square().sum()):
        with pytest.raises(RuntimeError, match="BlockwiseAttention has no gradients of gradients"):
            torch.autograd.grad(lose(BlockwiseAttention.apply(q, k, v)), q, create_graph=True)
    one, = torch.autograd.grad(BlockwiseAttention.apply(q, k, v).sum(), q)
    assert one.isfinite().all()


@pytest.mark.parametrize("D", [1, 2, 3])
def test_narrow_heads(D):
    q, k, v, g = torch.randn(4, 2, 3, 50, D, generator=torch.Generator().manual_seed(D)).bfloat16()
    _, found = gradients(BlockwiseAttention.apply, q, k, v, g, torch.bfloat16)
    _, wanted = gradients(sdpa, q, k, v, g, torch.float64)
    assert max(off(found, wanted)) < 0.02


def test_huge_scores_give_weights_of_one_at_most():
    q, k, v, g = torch.randn(4, 1, 2, 64, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    _, found = gradients(BlockwiseAttention.apply, 1e5 * q, 1e4 * k, v, g, torch.bfloat16)
    assert all(t.isfinite().all() for t in found)
    assert found[2].float().norm() <= 64 * g.float().norm()                      # p.T @ g with 0 <= p <= 1


def test_sentences_in_parts_are_as_all_at_once():
    """A batch whose patterns are too large for one part of the work: each sentence as if it were alone."""
    q, k, v, g = torch.randn(4, 5, 4, 1024, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    _, found = gradients(BlockwiseAttention.apply, q, k, v, g, torch.bfloat16)
    for b in (0, 1, 4):
        _, alone = gradients(BlockwiseAttention.apply, *(t[b:b + 1] for t in (q, k, v, g)), torch.bfloat16)
        for whole, part in zip(found, alone):
            assert (whole[b:b + 1] - part).norm() < 1e-3 * part.norm()


def test_torch_func_still_works_on_the_layer():
    layer, x = a_layer(64, 2).bfloat16(), torch.randn(1, 128, 64).bfloat16()
    parameters = dict(layer.named_parameters())

    def lose(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).float().square().sum()
    found = torch.func.grad(lose)(parameters)
    lose(parameters).backward()
    for name, parameter in layer.named_parameters():
        assert (found[name] - parameter.grad).norm() < 0.03 * parameter.grad.norm()


def test_columns_subtract_in_the_product():
    x, amount = torch.randn(7, 5).bfloat16(), 1000 * torch.randn(7, 1)
    other = torch.cat([torch.randn(5, 4).bfloat16(), torch.ones(3, 4).bfloat16()])
    want = x.double() @ other[:5].double() - amount.double()
    got = minus_columns(x, amount).double() @ other.double()
    assert (got - want).abs().max() < 1e-3 * 2 ** -10         # three columns hold 24 bits of the amount


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
    layer.tap = seen.__setitem__
    tapped = layer(x)
    layer.tap = None
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
    for tap in (None, lambda name, tensor: None):
        layer.tap = tap
        for t in range(6):
            grad, = torch.autograd.grad(layer(x)[0, t].sum(), x)
            reached = grad[0].abs().amax(-1) > 0
            assert reached.tolist() == [s <= t for s in range(6)]


class Keep:
    """The smallest cache: all keys and values so far."""

    def __init__(self):
        self.kv = {}

    def append(self, layer, k, v):
        old = self.kv.get(layer, (k[:, :, :0], v[:, :, :0]))
        self.kv[layer] = tuple(torch.cat(pair, dim=2) for pair in zip(old, (k, v)))
        return self.kv[layer]


@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 3, 1], [1, 6], [2, 5]])
@pytest.mark.parametrize("tapped", [False, True])
def test_in_pieces_through_a_cache_equals_at_once(pieces, tapped, ledger):
    layer, x = a_layer(), torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(7))
    want, cache = layer(x), Keep()
    layer.tap = (lambda name, tensor: None) if tapped else None
    got = torch.cat([layer(piece, cache=cache, layer=3) for piece in x.split(pieces, dim=1)], dim=1)
    error = (got - want).abs().max().item()
    ledger(f"attention layer in pieces {pieces} = at once{', tapped' * tapped}", error, bound=1e-6)
    assert error < 1e-6


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


def test_a_pattern_is_made_only_for_a_tap():
    layer = a_layer()
    assert kept(layer, 512) <= 2.01 * kept(layer, 256)  # linear: no (T, T) anywhere
    layer.tap = lambda name, tensor: None
    assert kept(layer, 512) > 3.5 * kept(layer, 256)


def test_tap_sees_what_the_result_is_made_of():
    layer, x, seen = a_layer(), torch.randn(2, 5, 32), {}
    layer.tap = seen.__setitem__
    result = layer(x)
    assert list(seen) == ["q", "k", "v", "pattern", "z"]
    assert torch.allclose(seen["pattern"] @ seen["v"], seen["z"], atol=1e-6)
    assert torch.allclose(layer.c_proj(merge_heads(seen["z"])), result, atol=1e-6)
    assert a_layer().tap is None  # a tap belongs to one layer
    assert "tap" not in layer.state_dict()


# ------------------------------------------------------------------ pictures

@pytest.fixture
def pyplot():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    yield plt
    plt.close("all")


def test_plot_pattern_shows_the_numbers(pyplot):
    pattern = torch.tensor([[0.25, 0.75, 0.0], [0.1, 0.2, 0.7]], requires_grad=True)
    ax = plot_pattern(pattern, ["a$x$", "b", "c"], "title", values=True)
    assert np.allclose(ax.images[0].get_array(), pattern.detach())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a$x$", "b", "c"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "c"]  # queries are the last tokens
    assert [t.get_text() for t in ax.texts] == ["0.25", "0.75", "0", "0.1", "0.2", "0.7"]
    ax.figure.canvas.draw()  # a label with dollar signs is no formula


def test_plot_pattern_leaves_infinite_cells_grey(pyplot):
    table = torch.tensor([[0.0, -math.inf], [math.nan, 1.0]])
    ax = plot_pattern(table, ["a", "b"], limits=(-1, 1))
    assert ax.images[0].get_array().mask.tolist() == [[False, True], [True, False]]


# ------------------------------------------------------------------ the exercises

def names():
    return dict(torch=torch, math=math, Tensor=torch.Tensor, attention=attention, causal_mask=causal_mask,
                sdpa=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("number, empty, check, solution", exercises("02"), ids=lambda v: v if len(v) == 4 else "")
def test_exercise(number, empty, check, solution, capsys):
    assert said(empty, check, names(), capsys) == "not solved yet"
    assert said(solution, check, names(), capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def window_mask(T, W): return causal_mask(T)", "window_mask(5, 2)[2]"),
    (1, "def window_mask(T, W): return causal_mask(T).float()", "bool mask"),
    (2, "def multi_query(q, k, v): return attention(q, k[:, None], v[:, None], causal=False)[0]", "sentence 0, head 0"),
    (3, "def one_pass(s, v):\n    e = s.exp()\n    return (e[:, None] * v).sum(0) / e.sum()", "subtract the largest"),
])
def test_a_wrong_solution_is_told_why(number, wrong, words, capsys):
    assert words in said(wrong, exercises("02")[number - 1][2], names(), capsys)
