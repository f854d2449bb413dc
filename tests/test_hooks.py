"""Hooks: any tensor of a pass by its name, and the logit lens."""
import pytest
import torch
import torch.nn.functional as F

from exercise_cells import exercises, said
from minigpt.attention import attention, sdpa_attention
from minigpt.deeper import hooks
from minigpt.deeper.hooks import logit_lens, plot_lens, trace, trace_names
from minigpt.engine.tokenizer import Tokenizer
from minigpt.gpt2 import GPT2, GPT2Config
from small_models import TINY, ids_of, tiny  # noqa: F401 (a fixture)


def test_every_name_is_traced_and_true(tiny):
    ids = ids_of()
    with torch.no_grad():
        seen, logits = trace(tiny, ids), tiny(ids)
    assert list(seen) == trace_names(TINY) and len(seen) == 4 + 2 * 14
    assert torch.allclose(seen["logits"], logits, atol=1e-5)
    assert torch.equal(seen["embed"], tiny.wte.weight[ids]) and torch.equal(seen["pos_embed"], tiny.wpe.weight[:10])
    for n, block in enumerate(tiny.blocks):
        got = {name.removeprefix(f"blocks.{n}."): t for name, t in seen.items()}
        assert torch.allclose(got["attn.out"], block.attn(block.ln_1(got["resid_pre"])), atol=1e-5)
        assert torch.allclose(got["resid_mid"], got["resid_pre"] + got["attn.out"], atol=1e-6)
        assert torch.allclose(got["mlp.act"], F.gelu(got["mlp.pre"], approximate="tanh"), atol=1e-5)
        assert torch.allclose(got["resid_post"], got["resid_mid"] + got["mlp.out"], atol=1e-6)
        z, pattern = attention(got["attn.q"], got["attn.k"], got["attn.v"])
        assert torch.allclose(got["attn.z"], z, atol=1e-6) and torch.allclose(got["attn.pattern"], pattern, atol=1e-6)
    assert torch.equal(seen["blocks.0.resid_pre"], seen["embed"] + seen["pos_embed"])
    assert torch.allclose(seen["ln_f"] @ tiny.wte.weight.T, seen["logits"], atol=1e-5)


def test_tracing_leaves_no_trace(tiny):
    calls = []

    def mine(q, k, v, mask=None):                                        # somebody else's
        calls.append(2 * sdpa_attention(q, k, v, mask))
        return calls[-1]
    tiny.blocks[1].attn.attend = mine
    seen = trace(tiny, ids_of(), ["blocks.1.attn.q", "blocks.1.attn.z", "ln_f"])
    assert [z.shape for z in calls] == [(2, 2, 10, 4)] and tiny.blocks[1].attn.attend is mine
    assert torch.equal(seen["blocks.1.attn.z"], calls[0])                # what flowed, not what lesson 02 would give
    with pytest.raises(ValueError, match="id 99"):
        trace(tiny, torch.tensor([[99]]))
    for module in tiny.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert getattr(module, "attend", mine) in (sdpa_attention, mine)


def test_a_traced_pass_is_the_ordinary_pass(tiny):
    with torch.no_grad():
        for names in (["*.resid_post", "logits"], "*"):
            assert torch.equal(trace(tiny, ids_of(), names)["logits"], tiny(ids_of()))


@pytest.mark.parametrize("pattern", ["blocks.9.ln_1", "blocks.0.attn.patern", "", "*.nothing"])
def test_unknown_names_suggest_one(tiny, pattern):
    with pytest.raises(ValueError, match="did you mean"):
        trace(tiny, ids_of(), pattern)


def test_logit_lens_ends_in_the_logits(tiny):
    lens = logit_lens(tiny, ids_of())
    assert lens.shape == (3, 2, 10, 50) and torch.allclose(lens[-1], tiny(ids_of()), atol=1e-5)
    start = tiny.ln_f(tiny.wte.weight[ids_of()] + tiny.wpe.weight[:10]) @ tiny.wte.weight.T
    assert torch.allclose(lens[0], start, atol=1e-5)


def test_plot_lens_shows_each_layers_guess(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained()
    model = GPT2(GPT2Config.preset("nano", vocab_size=20000, n_layer=2, n_embd=16, n_head=2, block_size=32)).eval()
    text = "Tom said: $5 for\nthe red kite"
    ids = torch.tensor([tokenizer.encode(text)])
    ax = plot_lens(model, tokenizer, text)
    ax.figure.canvas.draw()
    guesses = [t.get_text() for t in ax.texts]
    assert len(guesses) == 3 * ids.shape[1] and "\n" not in "".join(guesses)
    last = [tokenizer.decode([i]).replace("\n", "\\n") for i in model(ids)[0].argmax(-1).tolist()]
    assert guesses[-len(last):] == last
    first = model.ln_f(model.wte(ids) + model.wpe(torch.arange(ids.shape[1]))) @ model.wte.weight.T
    assert torch.allclose(torch.tensor(ax.images[0].get_array()[0]), first[0].softmax(-1).max(-1).values, atol=1e-5)
    matplotlib.pyplot.close(ax.figure)
    for bad in ("", "word " * 25):
        with pytest.raises(ValueError, match="1 to 24 fit"):
            plot_lens(model, tokenizer, bad)


# ------------------------------------------------------------------ the exercises

@pytest.fixture(scope="module")
def names():
    """What the checks of the notebook look at, with a small model in place of the shipped one."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=50, block_size=16, n_layer=8, n_head=8, n_embd=64)).eval()
    for block in model.blocks:                                          # patterns that differ from head to head
        torch.nn.init.normal_(block.attn.c_attn.weight, std=0.5)
        torch.nn.init.normal_(block.mlp.c_proj.weight, std=0.2)
    ids = ids_of(1, 12)
    with torch.no_grad():
        seen = trace(model, ids)
    return vars(hooks) | dict(shipped=model, ids=ids, seen=seen)


@pytest.mark.parametrize("number, empty, check, solution", exercises("deeper/hooks"), ids=lambda v: v if len(v) == 7 else "")
def test_exercise(number, empty, check, solution, names, capsys):
    assert said(empty, check, names, capsys) == "not solved yet"
    assert said(solution, check, names, capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def longest_mlp(model, ids): return min(range(8), key=lambda n: seen[f'blocks.{n}.mlp.out'].norm(dim=-1).mean())",
     "writes least"),
    (1, "def longest_mlp(model, ids): return 99", "is not the one"),
    (2, "def previous_token_head(model, ids): return 99, 0", "not a pair"),
    (2, "def previous_token_head(model, ids): return min((w[0, h].diagonal(-1).mean().item(), (n, h)) for n in range(8) "
        "for w in [seen[f'blocks.{n}.attn.pattern']] for h in range(8))[1]", "there is a higher one"),
    (3, "def silenced(model, ids, n): return model(ids)", "of the whole model"),
    (3, "def silenced(model, ids, n): return model.head(model.ln_f(model.hidden_states(ids, n_layer=n)))", "are others"),
    (3, "def silenced(model, ids, n):\n    model.blocks[n].mlp.register_forward_hook(lambda m, a, o: o)\n    return model(ids)",
     "still a hook"),
])
def test_a_wrong_solution_is_told_why(number, wrong, words, names, capsys):
    try:
        assert words in said(wrong, exercises("deeper/hooks")[number - 1][2], names, capsys)
    finally:
        for module in names["shipped"].modules():
            module._forward_hooks.clear()
