"""minigpt.engine.kernels against the plain forms, and one changed block through every path that reads a model."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minigpt.attention import CausalSelfAttention, causal_mask, sdpa_attention, set_attn_implementation
from minigpt.deeper.hooks import trace
from minigpt.engine import kernels
from minigpt.engine.kernels import (BlockwiseAttention, FastLinear, attention_backward, blockwise_attention, for_inference,
                                    minus_columns, shallow_copy, summed_rows_loss, use_kernels)
from minigpt.engine.stepper import Stepper
from minigpt.engine.train_config import TrainConfig
from minigpt.deeper.fast_decoding import Decoder
from minigpt.engine.cache import KVCache
from minigpt.generation import Options, generate
from minigpt.gpt2 import GPT2, Block, GPT2Config
from minigpt.training import summed_loss


def a_layer(n_embd=32, n_head=4):
    torch.manual_seed(1)
    layer = CausalSelfAttention(n_embd, n_head)
    set_attn_implementation(layer, "blockwise")
    return layer


def a_model(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=90, block_size=32, n_layer=3, n_head=4, n_embd=64, bos_token_id=0, eos_token_id=0) | changes
    model = GPT2(GPT2Config(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.wte.weight.mul_(3)
    return model


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
    """It goes back in blocks for bfloat16 of one shape, causal and with gradients; all else is left to SDPA."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    wide_cpu = capability == "AVX512"
    q, k, v = torch.randn(3, 2, 4, 64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = causal_mask(64)

    def taken(q, k, v, **options):
        with Meter(F.scaled_dot_product_attention) as meter:
            blockwise_attention(q, k, v, **options)
        return not meter.calls

    def leaf(t):
        return t.detach().clone().requires_grad_()
    for own in ((leaf(q), k, v), (q, leaf(k), v), (q, k, leaf(v))):
        assert taken(*own) == wide_cpu
    three = [leaf(t) for t in (q, k, v)]
    assert not taken(q, k, v) and not taken(*three, mask=mask) and not taken(*(t.float() for t in three))
    assert not taken(three[0][:, :, 3:], three[1], three[2])                     # more keys than queries
    assert not taken(*(leaf(t[:, :, :9]) for t in (q, k, v)))                    # tiny
    assert "Blockwise" not in type(torch.compile(blockwise_attention, backend="eager")(*three).grad_fn).__name__
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


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2 ** -5), (torch.float16, 2 ** -7)])
@pytest.mark.parametrize("threads", [1, 2])
def test_gelu_in_pieces_and_its_slope(threads, dtype, bound, ledger):
    """Against torch's in float64; the bounds are one unit of the last digit at 9."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.linspace(-9, 9, kernels.TanhGELU.PIECE * 2 + 77).to(dtype).requires_grad_()
        y, slope = kernels.PieceGELU()(x), torch.autograd.grad(kernels.PieceGELU()(x).sum(), x)[0]
    finally:
        torch.set_num_threads(before)
    wide = x.detach().double().requires_grad_()
    right = F.gelu(wide, approximate="tanh")
    right_slope, = torch.autograd.grad(right.sum(), wide)
    assert y.dtype == slope.dtype == dtype
    for name, mine, exact in (("value", y, right), ("slope", slope, right_slope)):
        off = (mine.double() - exact.to(dtype).double()).abs().max().item()
        ledger(f"GELU by sigmoid, {name}, {dtype}", off, peer="torch", bound=bound)
        assert off <= bound


def test_second_derivatives_of_gelu_are_refused():
    x = torch.randn(kernels.TanhGELU.PIECE, dtype=torch.bfloat16, requires_grad=True)
    for loss in (kernels.PieceGELU()(x).square().sum(), kernels.PieceGELU()(x).sum()):
        with pytest.raises(RuntimeError, match="TanhGELU has no gradients of gradients"):
            torch.autograd.grad(loss, x, create_graph=True)


# ------------------------------------------------------------------ the loss in rows

@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2 ** -7)])
@pytest.mark.parametrize("piece", [1, 700, 2 ** 18])
def test_loss_in_rows_is_cross_entropy(dtype, bound, piece, monkeypatch, ledger):
    monkeypatch.setattr(kernels.RowsLoss, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(40, 300, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(300, (40,), generator=generator)
    targets[::3] = -100
    ours = kernels.RowsLoss.apply(logits.clone(), targets)            # a copy, for it writes over what it gets
    peer = F.cross_entropy(logits.double(), targets, reduction="sum")
    one, two = (torch.autograd.grad(loss / 7, logits)[0].double() for loss in (ours, peer))
    scaled = kernels.RowsLoss.apply(logits.clone(), targets, 1 / 7)
    assert abs(7 * scaled.item() / peer.item() - 1) < bound
    assert (torch.autograd.grad(scaled, logits)[0].double() - two).abs().max() < bound
    assert ours.dtype == torch.promote_types(dtype, torch.float32) and (one[::3] == 0).all()
    apart = max((one - two).abs().max().item(), abs(ours.item() / peer.item() - 1))
    ledger(f"loss and gradient in rows = cross_entropy, {str(dtype)[6:]}", apart, peer="torch", bound=bound)
    assert apart < bound
    with torch.no_grad():
        assert kernels.RowsLoss.apply(logits, targets) == ours
    assert kernels.RowsLoss.apply(logits, torch.full_like(targets, -100)) == 0


def test_loss_in_rows_refuses_what_would_be_wrong():
    logits = torch.randn(4, 10, requires_grad=True)
    for bad in (10, -5):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            kernels.RowsLoss.apply(logits, torch.tensor([0, 1, 2, bad]))
    loss = kernels.RowsLoss.apply(logits.clone(), torch.tensor([0, 1, 2, 3])) / 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="in-?place"):                # not silently with a gradient scaled twice
        loss.backward()


def test_nothing_counted_gives_zero():
    model, ids = a_model(), torch.randint(90, (2, 8))
    loss = summed_rows_loss(model, ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0 and not model.wte.weight.grad.any()


# ------------------------------------------------------------------ what a training step uses

@pytest.mark.parametrize("dtype, on", [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
def test_use_kernels_changes_no_result(dtype, on, ledger):
    """A step of the model set to the kernels against one that nobody touched."""
    model, plain = a_model().train(), a_model().train()
    loss = use_kernels(model, dtype)
    assert (loss is not None) == on
    assert {b.attn.attend for b in model.blocks} == {blockwise_attention if on else sdpa_attention}
    if not on:
        return
    ids, targets = torch.randint(90, (2, 2, 32), generator=torch.Generator().manual_seed(5))
    targets[0, :7] = -100
    for one, function in ((model, loss), (plain, summed_loss)):
        function(one, ids, targets, dtype, 1 / 57).backward()
    apart = [((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in zip(model.parameters(), plain.parameters())]
    bound = 1e-5 if dtype == torch.float32 else 0.03
    ledger(f"gradients of a step with the kernels and without, {str(dtype)[6:]}", max(apart), bound=bound)
    assert max(apart) < bound


def test_kernels_are_for_cpus_alone():
    with torch.device("meta"):
        model = GPT2(a_model().config)
    assert use_kernels(model) is None and model.blocks[0].attn.attend is sdpa_attention


def test_a_run_asks_the_rule_unless_it_compiles():
    assert Stepper(a_model(), TrainConfig()).loss is summed_rows_loss
    compiled = Stepper(model := a_model(), TrainConfig(compile=True))
    assert compiled.loss is not summed_rows_loss and model.blocks[0].attn.attend is sdpa_attention
    compiled.uncompiled()
    assert compiled.loss is summed_rows_loss and model.blocks[0].attn.attend is blockwise_attention
    own = Stepper(model := a_model(), TrainConfig(), loss=summed_loss)
    assert own.loss is summed_loss and model.blocks[0].attn.attend is blockwise_attention


# ------------------------------------------------------------------ layouts

class Unchosen:
    """torch.backends.quantized as on Apple Silicon: qnnpack is there but not chosen; what is set goes to the real one."""

    supported_engines, real, chosen = ["qnnpack", "none"], torch.backends.quantized, "none"
    engine = property(lambda self: self.chosen)

    @engine.setter
    def engine(self, name):
        self.chosen = self.real.engine = name


def test_int8_where_torch_has_chosen_no_engine(monkeypatch):
    real = torch.backends.quantized
    if "qnnpack" not in real.supported_engines:
        pytest.skip("this torch has no qnnpack")
    before, x, weight, ours = real.engine, torch.randn(2, 16), torch.randn(8, 16), Unchosen()
    monkeypatch.setattr(torch.backends, "quantized", ours)
    try:
        got = kernels.Int8Linear(weight, None)(x)
        assert ours.engine == real.engine == "qnnpack"
    finally:
        real.engine = before
    want = x @ weight.T
    assert 0 < (got - want).norm() / want.norm() < 0.05
    ours.chosen, ours.supported_engines = "none", ["none"]
    with pytest.raises(ValueError, match="weights='int8'"):
        for_inference(a_model(), "int8")


@pytest.mark.parametrize("bias", [None, 3 * torch.ones(24)])
def test_int8_rounds_each_token_by_its_own_largest_number(bias):
    """One token a thousand times as large as the others, as Llama's first one is, costs them nothing."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64), torch.randn(24, 64)
    x[2] *= 1000
    x[4] = 0
    layer, shift = kernels.Int8Linear(weight, bias), 0 if bias is None else bias
    got, want = layer(x) - shift, x @ weight.T
    assert ((got - want).norm(dim=1)[:4] < 0.02 * want.norm(dim=1)[:4]).all()
    assert got[4].abs().max() == 0
    alone = torch.cat([layer(row[None]) for row in x]) - shift
    assert ((got - alone).norm(dim=1)[:4] < 0.02 * want.norm(dim=1)[:4]).all()
    assert torch.equal(layer(x.view(1, 5, 64))[0], layer(x))


def test_int8_engine():
    assert kernels.int8_engine("fbgemm", ["qnnpack", "none", "fbgemm"]) == "fbgemm"
    assert kernels.int8_engine("none", ["qnnpack", "none"]) == "qnnpack"
    with pytest.raises(ValueError, match="weights='int8'") as error:
        kernels.int8_engine("none", ["none"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows, n_out", [(1, 200), (2, 200), (8, 32), (17, 200), (100, 48)])
def test_fast_linear_is_linear(dtype, bound, rows, n_out):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, n_out).to(dtype), torch.randn(2, rows, 48).to(dtype)
    if not kernels.has_onednn(layer.weight):
        pytest.skip("this torch has no oneDNN for the type")
    for bias in (layer.bias, None):
        want = F.linear(x.double(), layer.weight.double(), None if bias is None else bias.double())
        fast = FastLinear(layer.weight, bias, single=True)
        got, one = fast(x), fast(x[:1, :1])
        assert got.dtype == one.dtype == dtype and (got - want).norm() < bound * want.norm()
        assert one.shape == (1, 1, n_out) and (one - want[:1, :1]).norm() < bound * want[:1, :1].norm()


@pytest.mark.parametrize("seconds, kind, single", [     # eight rows plain, in blocks; one row in blocks, by its own copy, plain
    ([2.0, 1.5, 1.0, 1.1, 2.0], FastLinear, False), ([2.0, 1.5, 1.0, 0.9, 2.0], FastLinear, True),
    ([1.0, 0.9, 2.0, 2.1, 1.0], nn.Linear, False), ([1.0, 1.1, 2.0, 0.8, 1.0], FastLinear, True)])
def test_auto_takes_the_layout_that_was_measured_faster(seconds, kind, single, monkeypatch):
    times = iter(seconds)
    monkeypatch.setattr(kernels, "_faster", {})
    monkeypatch.setattr(kernels, "best_time", lambda function, x: next(times))
    monkeypatch.setattr(kernels, "has_onednn", lambda weight: True)
    for _ in range(2):                                                             # the second time nothing is measured
        mlp = for_inference(a_model()).blocks[0].mlp
        assert isinstance(mlp.c_fc, kind)
        if kind is FastLinear:
            assert (mlp.c_fc.single is not None) is (mlp.c_proj.single is not None) is single
        if single:                                                                 # transposed: where there are more outputs
            assert mlp.c_fc.single.is_contiguous() and mlp.c_proj.single.t().is_contiguous()
            assert mlp.c_proj.single.data_ptr() != mlp.c_proj.weight.data_ptr()


@pytest.mark.parametrize("where, name, none", [
    (kernels, "has_onednn", lambda weight: False), (torch.ops, "mkldnn", SimpleNamespace())], ids=["no oneDNN", "another torch"])
def test_auto_is_the_plain_layout_where_there_are_no_blocks(where, name, none, monkeypatch):
    monkeypatch.setattr(where, name, none)
    for weights in ("auto", "fast"):
        assert isinstance(for_inference(a_model(), weights).blocks[0].mlp.c_fc, nn.Linear)


def test_a_copy_for_inference_shares_all_but_its_linear_layers():
    model = a_model().train()
    model.blocks[1].mlp.c_proj.register_forward_hook(lambda module, args, out: out)
    before = [(name, type(module)) for name, module in model.named_modules()]
    twin = for_inference(model, "int8")
    assert [(name, type(module)) for name, module in model.named_modules()] == before and model.lm_head is None
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert not any(module.training for module in twin.modules()) and all(module.training for module in model.modules())
    swapped = {name for name, module in twin.named_modules() if isinstance(module, kernels.Int8Linear)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert swapped == linear - {"blocks.1.mlp.c_proj"} | {"lm_head"}               # a layer with a hook stays itself
    set_attn_implementation(twin, "eager")
    assert model.blocks[0].attn.attend is sdpa_attention
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.zero_()
        assert not twin.ln_f(twin.hidden_states(torch.tensor([[1, 2]]))).any()       # the same norm


def test_a_shallow_copy_may_be_changed_alone():
    model = a_model()
    twin, ids = shallow_copy(model), torch.tensor([[1, 2, 3]])
    want = model(ids)
    twin.blocks[0].mlp.c_fc = nn.Linear(64, 256)
    assert torch.equal(model(ids), want) and not torch.equal(twin(ids), want)


# ------------------------------------------------------------------ one forward pass

class OtherBlock(Block):
    """Another architecture: RMSNorm, a squared ReLU, and both branches in parallel."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.ln_1 = nn.RMSNorm(config.n_embd)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, mask=None, cache=None):
        h = self.ln_1(x)
        return x + self.gain * self.attn(h, mask, cache) + self.mlp.c_proj(F.relu(self.mlp.c_fc(h)).square())


@pytest.fixture(scope="module")
def other():
    model = a_model()
    torch.manual_seed(2)
    model.blocks = nn.ModuleList(OtherBlock(model.config, n) for n in range(3))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.lm_head = nn.Linear(64, 90)                                              # and a head of its own
    return model


def by_hand(model, ids):
    """The logits of one text, in float64, number for number by the formulas."""
    model = copy.deepcopy(model).double()
    T = len(ids)
    x = model.wte.weight[ids] + model.wpe.weight[:T]
    for block in model.blocks:
        h = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt() * block.ln_1.weight
        q, k, v = (h @ block.attn.c_attn.weight.T + block.attn.c_attn.bias).view(T, 3, 4, 16).permute(1, 2, 0, 3)
        scores = (q @ k.mT / 4).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        z = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, 64)
        branch = torch.relu(h @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias).square()
        x = (x + block.gain * (z @ block.attn.c_proj.weight.T + block.attn.c_proj.bias)
             + branch @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias)
    x = F.layer_norm(x, (64,), model.ln_f.weight, model.ln_f.bias)
    return (x @ model.lm_head.weight.T + model.lm_head.bias).detach()


TEXT = [3, 1, 4, 1, 5, 9, 2, 6]


def test_a_changed_block_is_what_training_sees(other):
    want = by_hand(other, TEXT)
    assert torch.allclose(other(torch.tensor([TEXT]))[0].double(), want, atol=1e-4)
    loss = Stepper(copy.deepcopy(other), TrainConfig()).gradients(np.array([TEXT[:-1]]), np.array([TEXT[1:]]))
    assert loss.item() == pytest.approx(F.cross_entropy(want[:-1], torch.tensor(TEXT[1:])).item(), abs=1e-4)


@pytest.mark.parametrize("weights, bound", [("auto", 1e-4), ("fast", 1e-4), ("live", 1e-4), ("int8", 0.1)])
def test_a_changed_block_is_what_decoders_read(other, weights, bound):
    decoder, want = Decoder(other, weights), by_hand(other, TEXT)
    got = [decoder.start([TEXT[:4], TEXT[:2]], room=8)[0, -1]]                     # beside a shorter text, padded
    got += [decoder.feed([[TEXT[i]], [7]])[0, -1] for i in range(4, 8)]
    assert (torch.stack(got) - want[3:]).norm() < bound * want[3:].norm()


def test_a_changed_block_is_what_the_server_computes(other):
    from minigpt.server import SlotCache, row_model, step_rows
    reader = for_inference(other)
    stepper, want = row_model(reader), by_hand(other, TEXT)
    for company in ([TEXT], [[5, 5, 5], TEXT, [8]]):
        slots = SlotCache(other.config, len(company))
        for text in company:
            one = KVCache(other.config)
            with torch.inference_mode():
                reader(torch.tensor([text[:4]]), one)
            slots.join(one)
        me = company.index(TEXT)
        got = torch.stack([step_rows(stepper, slots, [row[i] if row is TEXT else 7 for row in company])[me] for i in range(4, 8)])
        assert (got - want[4:]).abs().max() < 1e-4 * want.abs().max()


def test_a_changed_block_is_what_texts_are_drawn_with(other):
    """Drawn in the server's batch and by generate(), greedy, against the formulas asked again for each token."""
    from minigpt.bpe import BPETokenizer
    from minigpt.engine.sequence import Request, Sequence
    from minigpt.server import Batch
    ids = list(TEXT)
    for _ in range(6):
        ids.append(int(by_hand(other, ids)[-1].argmax()))
    assert generate(other, TEXT, max_new_tokens=6, temperature=0).ids == ids[8:]
    tokenizer = BPETokenizer.from_pretrained()
    batch, asks = Batch(other, 4, chunk=3), []
    for text in (TEXT, [9, 9], TEXT):
        asks.append(Request(text, [Sequence(tokenizer, text, Options(temperature=0, seed=0), 6)]))
        while asks[-1].read < len(text):
            batch.read(asks[-1])
    while batch.rows:
        batch.step()
    assert asks[0].sequences[0].result.ids == asks[2].sequences[0].result.ids == ids[8:]


def test_a_changed_block_is_what_embeddings_and_traces_see(other):
    from minigpt.engine.embedders import mean_states
    rows = [TEXT, TEXT[:3]]
    for layer in (1, 2, 3):
        for row, found in zip(rows, mean_states(other, rows, layer)):
            want = trace(other, torch.tensor([row]), "*.resid_post")[f"blocks.{layer - 1}.resid_post"][0].mean(0)
            assert np.allclose(found, want.detach().numpy(), atol=1e-5)
    seen = trace(other, torch.tensor([TEXT]), ["logits", "blocks.2.attn.pattern"])
    assert torch.allclose(seen["logits"][0].double(), by_hand(other, TEXT), atol=1e-4)
    assert torch.allclose(seen["blocks.2.attn.pattern"].sum(-1), torch.ones(1, 4, 8))


@pytest.mark.parametrize("weights", ["auto", "fast", "live", "int8"])
def test_a_changed_block_learns_and_is_read_with_lora(other, weights):
    """An adapter on the changed model, active and not merged: through the decoder as through the whole matrices."""
    from minigpt.lora import LoraConfig, apply_lora
    model = apply_lora(copy.deepcopy(other), LoraConfig(4, 8, target_modules=["c_attn", "c_fc"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    plain = copy.deepcopy(other)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            plain.get_submodule(name).weight.data = module.weight.detach()
    want = by_hand(plain, TEXT)
    assert not torch.allclose(want, by_hand(other, TEXT), atol=0.01)
    decoder = Decoder(model, weights)
    decoder.start([TEXT[:4]])
    got = decoder.feed([TEXT[4:]])[0]
    assert (got - want[4:]).norm() < (0.1 if weights == "int8" else 1e-4) * want[4:].norm()
