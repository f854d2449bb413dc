"""deeper/architecture_ablation: each change computed another way, both ends of the way, counts by hand, the recorded table."""
import ast
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from exercise_cells import exercises, said
from minigpt import generate
from minigpt.attention import set_attn_implementation, sdpa_attention
from minigpt.deeper.architecture_ablation import CHANGES, LLAMA, build_variant
from minigpt.gpt2 import GPT2
from minigpt.llama import Llama, LlamaConfig, rope_speeds, rotate

ROOT = Path(__file__).resolve().parent.parent
SHAPE = LlamaConfig(vocab_size=40, block_size=32, n_layer=2, n_embd=24, n_head=6, n_kv_head=2, bos_token_id=0, eos_token_id=0)
IDS = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(1))
EVERY = [(), *((name,) for name in CHANGES), LLAMA, tuple(CHANGES)]


def build(*changes: str) -> GPT2:
    torch.manual_seed(0)
    return build_variant(SHAPE, changes)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """With norms and biases that are not 1 and 0, the same for the same parameters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


# ------------------------------------------------------------------ both ends

def test_no_change_is_gpt2():
    variant = shaken(build())
    torch.manual_seed(0)
    plain = shaken(GPT2(variant.config))
    assert type(variant) is GPT2 and variant.config.activation == "gelu_new"
    assert list(variant.state_dict()) == list(plain.state_dict())
    assert torch.equal(variant(IDS), plain(IDS))


@pytest.mark.parametrize("order", [LLAMA, LLAMA[::-1]])
def test_all_five_are_llama(order):
    variant, llama = shaken(build(*order)), Llama(SHAPE)
    llama.load_state_dict(variant.state_dict())             # strict: the same names and sizes
    assert torch.equal(variant(IDS), llama(IDS))


# ------------------------------------------------------------------ each change, computed another way

def test_rmsnorm_is_layernorm_of_what_has_no_mean():
    plain, variant = build(), build("RMSNorm")
    norms = [(block.ln_1, block.ln_2) for block in variant.blocks]
    x = torch.randn(3, 24)
    x = x - x.mean(-1, keepdim=True)
    for norm in [*norms[0], *norms[1], variant.ln_f]:
        assert close(norm(x), plain.ln_f(x)) and not close(norm(x + 1), plain.ln_f(x + 1))
    assert torch.equal(variant.blocks[0].attn.c_attn.weight, plain.blocks[0].attn.c_attn.weight)


def test_swiglu_by_hand():
    mlp, x = shaken(build("SwiGLU")).blocks[1].mlp, torch.randn(3, 24)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    assert close(mlp(x), (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T)
    assert mlp.gate_proj.weight.shape == (64, 24)           # 8/3 of 24


def test_the_gates_weights_are_as_wide_as_gpt2s():
    torch.manual_seed(0)
    mlp = build_variant(LlamaConfig(vocab_size=40, n_layer=2, n_embd=192, n_head=6), ["SwiGLU"]).blocks[0].mlp
    for layer, std in ((mlp.gate_proj, 0.02), (mlp.up_proj, 0.02), (mlp.down_proj, 0.01)):  # 0.02 / sqrt(2 * 2)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)


def test_rope_is_gpt2_without_a_table_that_turns_where_it_attends():
    variant, plain = build("RoPE"), build()
    torch.nn.init.zeros_(plain.wpe.weight)

    def attend(q, k, v, mask=None):
        q, k = (rotate(t, torch.arange(t.shape[2]), rope_speeds(SHAPE)) for t in (q, k))
        return sdpa_attention(q, k, v, mask)

    assert not close(variant(IDS), plain(IDS))
    set_attn_implementation(plain, attend)
    assert close(variant(IDS), plain(IDS))


def test_grouped_queries_are_gpt2_with_copied_heads():
    variant, plain = build("grouped queries"), build()
    assert not close(variant(IDS), plain(IDS))
    with torch.no_grad():
        for block in plain.blocks:
            q, k, v = block.attn.c_attn.weight.chunk(3)
            k, v = (t.view(6, 4, 24)[:2].repeat_interleave(3, 0).flatten(0, 1) for t in (k, v))
            block.attn.c_attn.weight.copy_(torch.cat([q, k, v]))
    assert close(variant(IDS), plain(IDS))


def test_without_biases_is_gpt2_with_zeros():
    variant = build("no biases")
    assert torch.equal(variant(IDS), build()(IDS))          # GPT-2's begin at 0
    assert not [name for name, _ in variant.named_parameters() if "bias" in name]


def test_an_untied_head_is_a_matrix_of_its_own():
    variant, plain = build("untied head"), build()
    x = plain.ln_f(plain.hidden_states(IDS))
    assert torch.equal(variant(IDS), F.linear(x, variant.lm_head.weight))
    assert not close(variant.lm_head.weight, variant.wte.weight)


# ------------------------------------------------------------------ all of them

@pytest.mark.parametrize("changes", EVERY, ids=" ".join)
def test_the_same_seed_gives_the_same_weights_where_both_have_them(changes):
    plain, variant = build().state_dict(), build(*changes).state_dict()
    for name, weight in plain.items():
        for there in {name, name.replace("attn.c_proj", "attn.o_proj")} & set(variant):
            assert torch.equal(variant[there], weight)
    assert torch.equal(variant["wte.weight"], plain["wte.weight"])


@pytest.mark.parametrize("changes", EVERY, ids=" ".join)
def test_parameters_by_hand(changes):
    V, S, L, C, H, G = 40, 32, 2, 24, 6, 2
    count = V * C + S * C + L * (4 * C * C + 4 * C + 8 * C * C + 5 * C) + (2 * L + 1) * 2 * C
    rope, gqa, swiglu = (name in changes for name in ("RoPE", "grouped queries", "SwiGLU"))
    count -= rope * S * C
    narrow = gqa * 2 * (C - C * G // H)                     # rows of k and v that are gone
    count -= L * narrow * (C + 1)
    count -= swiglu * L * 5 * C                             # 3 * C * 8/3 C are the 8 C C of before
    if "no biases" in changes:
        count -= L * (4 * C - narrow + (not swiglu) * 5 * C)
    norms = ("RMSNorm" in changes) + ("no biases" in changes)
    count -= min(1, norms) * (2 * L + 1) * C
    count += ("untied head" in changes) * V * C
    assert sum(p.numel() for p in build(*changes).parameters()) == count


@pytest.mark.parametrize("changes", EVERY, ids=" ".join)
def test_all_weights_learn_and_the_future_is_not_seen(changes):
    model = shaken(build(*changes))
    logits = model(IDS)
    later = IDS.clone()
    later[:, 8] = (later[:, 8] + 1) % 40
    assert torch.equal(model(later)[:, :8], logits[:, :8])
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():                # a key's bias shifts all scores alike, unless it is turned
        assert p.grad is not None and (p.grad.abs().sum() > 0 or name.endswith("k_proj.bias"))


@pytest.mark.parametrize("changes", EVERY, ids=" ".join)
def test_a_cache_changes_nothing(changes):
    model, ids = shaken(build(*changes)).eval(), [5, 3, 8]
    fast = generate(model, ids, temperature=0, max_new_tokens=8, stop_ids=()).ids
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert fast == ids[3:]


def test_a_change_that_is_not_there():
    with pytest.raises(ValueError, match="unknown change 'ALiBi'; there are: RMSNorm, SwiGLU"):
        build_variant(SHAPE, ["RoPE", "ALiBi"])


# ------------------------------------------------------------------ the notebook

CELLS = {cell["id"]: "".join(cell["source"]) for cell in json.loads(
    (ROOT / "nbs" / "deeper" / "architecture_ablation.ipynb").read_text(encoding="utf-8"))["cells"]}


def literal(name: str, cell: str):
    return ast.literal_eval(re.search(rf"(?s){name} = (\{{.*\}})", CELLS[cell])[1])


def held_of(network: str, lr: float = 0.005, steps: int = 400, wider: float = 3.0) -> list[float]:
    """What the benchmark has recorded of a network, by seed."""
    path = ROOT / "benchmarks" / "results" / "architecture_ablation.json"
    runs = [run for run in json.loads(path.read_text(encoding="utf-8"))["result"]["runs"]
            if (run["network"], run["lr"], run["steps"], run["wider"]) == (network, lr, steps, wider)]
    assert [run["seed"] for run in runs] == list(range(len(runs)))
    assert all(run["curve"][-1] == [steps, run["held"]] for run in runs)
    return [round(run["held"], 3) for run in runs]


def test_the_recorded_numbers_are_the_benchmarks():
    recorded = literal("recorded", "recorded")
    assert list(recorded) == ["GPT-2", *CHANGES, "all five"]
    for name, losses in recorded.items():
        assert len(losses) == 5 and losses == held_of(name)
    for name, losses in literal("narrow", "narrow").items():
        assert len(losses) == 3 and losses == held_of(name, wider=1.0)
    for lr, losses in literal("rates", "rates").items():
        assert losses == {name: held_of(name, lr)[0] for name in losses}
    for name, losses in literal("longer", "longer").items():
        assert len(losses) == 8 and losses[-1:] == held_of(name, steps=800)


@pytest.fixture(scope="module")
def names():
    """What the notebook has defined by the time of its exercises."""
    from minigpt.deeper.architecture_ablation import _NoTable
    return {"torch": torch, "build_variant": build_variant, "_NoTable": _NoTable,
            "shape": LlamaConfig(vocab_size=512, block_size=64, n_layer=2, n_embd=96, n_head=6, n_kv_head=2)}


@pytest.mark.parametrize("number, empty, check, solution", exercises("deeper/architecture_ablation"), ids=lambda v: v[-1])
def test_exercise(number, empty, check, solution, names, capsys):
    assert said(empty, check, names, capsys).startswith("not solved yet")
    assert said(solution, check, names, capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def seeds_needed(s, half): return round(2 * s / half)", "for s=0.01, half=0.01 it is 4"),
    (2, "def share_as_extreme(d): return 2 / 2 ** len(d)", "for [1.0, -1.0] it is 1.0"),
    (3, "def no_positions(model, llama): model.wpe.weight.data.zero_()", "the table of positions still has weights")])
def test_what_a_check_says_of_a_wrong_solution(number, wrong, words, names, capsys):
    [check] = [check for n, _, check, _ in exercises("deeper/architecture_ablation") if n.endswith(f".{number}")]
    assert words in said(wrong, check, names, capsys)
