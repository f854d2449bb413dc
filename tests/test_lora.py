"""LoRA and NF4 against plain products, peft over transformers' GPT2, and bitsandbytes."""
import copy
import inspect
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exercise_cells import exercises, said
from safetensors.torch import load_file, save_file

from minigpt.chat import ChatSession
from minigpt.deeper.fast_decoding import Decoder
from minigpt.deeper.quantization import NF4, NF4Linear, dynamic_code, nf4_code, quantize_model, quantize_nf4
from minigpt.engine.adapters import (adapted, adapters_by_row, linear_layers, load_adapter, lora_product, save_adapter,
                                     trainable_report)
from minigpt.engine.kernels import use_kernels
from minigpt.engine.weights import plain_weights
from minigpt.generation import generate
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.lora import LoraConfig, LoraLinear, apply_lora, lora_layers, merge_lora, set_adapter, unmerge_lora
from minigpt.engine.train_config import TrainConfig
from minigpt.engine.trainer import train
from minigpt.training import summed_loss

SHAPE = GPT2Config(vocab_size=300, block_size=64, n_layer=2, n_head=4, n_embd=64, bos_token_id=0, eos_token_id=0)
IDS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(3))
ALL = ("c_attn", "c_proj", "c_fc")


def new_model(seed: int = 0) -> GPT2:
    torch.manual_seed(seed)
    model = GPT2(SHAPE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # biases and LayerNorms too
    return model


def shaken(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """The model with what is trainable moved at random, as if trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ------------------------------------------------------------------ the layer

@pytest.mark.parametrize("wrong, word", [
    (dict(r=0), "r=0"), (dict(r=-2), "r=-2"), (dict(r=2.5), "r=2.5"), (dict(lora_alpha=0), "lora_alpha=0"),
    (dict(lora_dropout=1.0), "lora_dropout=1.0"), (dict(target_modules=()), "target_modules")])
def test_config_refuses(wrong, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        LoraConfig(**wrong)


@pytest.mark.parametrize("kernels", [False, True])
def test_step_equals_the_plain_product(kernels, ledger, monkeypatch):
    """Logits and gradients against W + s B A built whole and differentiated by autograd."""
    model = shaken(apply_lora(new_model(), LoraConfig(4, 8, use_rslora=True)))
    if kernels:
        use_kernels(model)
        assert all(layer.product is lora_product for layer in lora_layers(model).values())
    summed_loss(model, IDS, IDS).backward()
    fast = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    logits = model(IDS)
    model.zero_grad()
    monkeypatch.setattr(LoraLinear, "forward", lambda self, x: F.linear(x, self.weight, self.bias))
    summed_loss(model, IDS, IDS).backward()
    assert len(fast) == 16
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (name in fast)
        if p.requires_grad:
            assert far(p.grad, fast[name]) < 2e-5 * p.grad.abs().max()
    ledger("LoRA step = W + s B A written out (logits)", far(logits, model(IDS)), bound=1e-5)
    assert far(logits, model(IDS)) < 1e-5


@pytest.mark.parametrize("kernels", [False, True])
def test_dropout_only_where_a_reads(kernels):
    layer = LoraLinear(torch.nn.Linear(16, 8))
    if kernels:
        layer.product = lora_product
    layer.add("default", LoraConfig(2, 2, lora_dropout=0.5))
    layer.active = "default"
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(5, 16)
    torch.manual_seed(7)
    out = layer.train()(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    want = layer.base(x) + dropped @ layer.delta("default").T
    assert torch.allclose(out, want, atol=1e-5)
    assert torch.allclose(layer.eval()(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)


def test_the_layer_merges_by_itself_and_stays_short():
    """merge() adds W + s B A into the base and takes it out again; the class has the forty lines that its chapter promises."""
    layer = LoraLinear(torch.nn.Linear(6, 4))
    layer.add("one", LoraConfig(2, 4))
    layer.add("two", LoraConfig(1, 3))
    for B in layer.lora_B.values():
        torch.nn.init.normal_(B)
    old, x = layer.base.weight.clone(), torch.randn(5, 6)
    want = old + 2 * layer.lora_B["one"] @ layer.lora_A["one"]
    layer.active = "one"
    layer.merge("one")
    assert layer.active is None and torch.allclose(layer.base.weight, want, atol=1e-6)
    assert layer.base.weight.is_leaf and not layer.base.weight.requires_grad
    assert torch.allclose(layer(x), F.linear(x, want, layer.bias), atol=1e-5)
    layer.merge("one", -1)
    assert far(layer.base.weight, old) < 1e-6
    assert len(inspect.getsource(LoraLinear).strip().splitlines()) <= 40


@pytest.mark.parametrize("kernels", [False, True])
def test_a_frozen_layer_keeps_only_its_input(kernels):
    """What autograd keeps for the way back: x, x A^T, A and B; never y or W."""
    layer = LoraLinear(torch.nn.Linear(32, 96))
    if kernels:
        layer.product = lora_product
    layer.add("default", LoraConfig(2, 2))
    layer.active, kept = "default", []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(10, 32, requires_grad=True))
    sizes = {tuple(sorted(t.shape)) for t in kept} - {(32, 96)}  # some are kept turned
    assert sizes == {(10, 32), (2, 10), (2, 32), (2, 96)}
    assert all(t.data_ptr() == layer.base.weight.data_ptr() for t in kept if t.numel() == 32 * 96)  # no copy of W


# ------------------------------------------------------------------ the loss

def test_nothing_counted_gives_zero():
    model = apply_lora(new_model(), LoraConfig(2, 4))
    loss = summed_loss(model, IDS, torch.full_like(IDS, -100))
    loss.backward()
    assert loss.item() == 0


# ------------------------------------------------------------------ adapters in a model

def test_apply_starts_at_the_old_model_and_counts():
    plain = new_model()
    model = apply_lora(copy.deepcopy(plain), LoraConfig(4, 8, target_modules=("c_attn", "mlp.c_proj")))
    assert torch.allclose(model(IDS), plain(IDS), atol=1e-6)
    assert list(lora_layers(model)) == [f"blocks.{n}.{end}" for n in (0, 1) for end in ("attn.c_attn", "mlp.c_proj")]
    report = trainable_report(model)
    assert report.trainable == 2 * 4 * ((64 + 192) + (256 + 64)) and report.layers == 4
    assert report.total == sum(p.numel() for p in plain.parameters()) + report.trainable


def test_all_linear_and_expressions():
    assert len(lora_layers(apply_lora(new_model(), LoraConfig(1, target_modules="all-linear")))) == 8
    model = apply_lora(new_model(), LoraConfig(1, target_modules=r"blocks\.1\.mlp\..*"))
    assert list(lora_layers(model)) == ["blocks.1.mlp.c_fc", "blocks.1.mlp.c_proj"]
    model = apply_lora(new_model(), LoraConfig(1, target_modules=["transformer.h.0.attn.c_attn"]))
    assert list(lora_layers(model)) == ["blocks.0.attn.c_attn"]


def test_merge_and_unmerge(ledger):
    plain = new_model()
    model = shaken(apply_lora(copy.deepcopy(plain), LoraConfig(4, 8)))
    with torch.no_grad():
        apart, weight = model(IDS), model.blocks[0].mlp.c_fc.weight.clone()
        merged = merge_lora(model)(IDS)
        assert torch.equal(model.blocks[0].mlp.c_fc.base.weight, weight)
        for action in (merge_lora, lambda m: set_adapter(m, None), lambda m: apply_lora(m, LoraConfig(2), "more")):
            with pytest.raises(ValueError, match="merged"):
                action(model)
        again = unmerge_lora(model)(IDS)
    assert far(apart, plain(IDS)) > 0.01
    assert far(merged, apart) < 1e-5 and far(again, apart) < 1e-5
    assert far(model.blocks[0].mlp.c_fc.base.weight, plain.blocks[0].mlp.c_fc.weight) < 1e-6
    ledger("merged LoRA = unmerged (logits)", far(merged, apart), bound=1e-5)
    ledger("LoRA taken out again = before (logits)", far(again, apart), bound=1e-5)


def test_adapters_are_switched_and_leave_no_trace():
    plain = new_model()
    model, outs = copy.deepcopy(plain), {}
    for seed, (name, config) in enumerate([("a", LoraConfig(2)), ("b", LoraConfig(3, target_modules=["c_fc"])),
                                           ("c", LoraConfig(1, target_modules=["c_attn"]))]):
        torch.manual_seed(seed)
        shaken(apply_lora(model, config, name), seed)
        outs[name] = model(IDS).detach()
    torch.manual_seed(0)
    alone = shaken(apply_lora(copy.deepcopy(plain), LoraConfig(2), "a"), 0)(IDS)
    for name in "cabbac":
        assert torch.equal(set_adapter(model, name)(IDS), outs[name])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(n.endswith(f".{name}") for n in trained)
    assert torch.equal(outs["a"], alone)
    assert torch.equal(set_adapter(model, None)(IDS), plain(IDS))
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no adapter 'd'; there are: a, b, c"):
        set_adapter(model, "d")


def test_loop_trains_only_the_adapter_and_resumes_bit_for_bit(tmp_path):
    data = torch.randint(300, (2000,), generator=torch.Generator().manual_seed(5)).numpy()
    config = TrainConfig(max_steps=4, batch_size=4, block_size=32, lr=1e-2, warmup_steps=1, save_every=2, eval_every=0,
                         device="cpu")

    def start() -> GPT2:
        torch.manual_seed(0)
        return apply_lora(new_model(), LoraConfig(2, 4, lora_dropout=0.1))

    whole = start()
    train(whole, data, config, out=tmp_path / "whole", progress=False)
    shutil.rmtree(tmp_path / "whole" / "step-00000004")  # as if it had stopped after step 2
    resumed = start()
    train(resumed, data, config, out=tmp_path / "whole", progress=False, resume=True)
    moved = 0
    plain = dict(new_model().named_parameters())
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b)
        moved += a.requires_grad
        if not a.requires_grad:
            assert torch.equal(a, plain[name.replace(".base.", ".")])
    assert moved == 16 and far(whole(IDS), new_model()(IDS)) > 1e-3


# ------------------------------------------------------------------ peft

peft = pytest.importorskip("peft")
CASES = [dict(), dict(target_modules=("attn.c_proj",), use_rslora=True), dict(target_modules="all-linear"),
         dict(target_modules=r"blocks\.1\.mlp\..*"), dict(target_modules=("blocks.0.attn.c_attn", "c_fc"))]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    new_model().save_pretrained(folder)
    return folder


def hf_model(folder):
    from transformers import GPT2LMHeadModel
    return GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ours_in_peft(case, base_folder, tmp_path, ledger):
    model = shaken(apply_lora(GPT2.from_pretrained(base_folder), LoraConfig(4, 8, **case)))
    ours = model(IDS)
    save_adapter(model, tmp_path / "adapter", base_model=str(base_folder))
    theirs = peft.PeftModel.from_pretrained(hf_model(base_folder), tmp_path / "adapter").eval()
    worst = far(theirs(IDS).logits, ours)
    merged = far(theirs.merge_and_unload()(IDS).logits, ours)
    assert far(ours, new_model()(IDS)) > 0.01
    assert worst < 1e-4 and merged < 1e-4
    ledger("our adapter in peft (logits)", max(worst, merged), peer="peft", bound=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_theirs_in_ours(rslora, base_folder, tmp_path, ledger):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "mlp.c_proj"], use_rslora=rslora,
                             fan_in_fan_out=True, task_type="CAUSAL_LM")
    theirs = shaken(peft.get_peft_model(hf_model(base_folder), config)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    want = theirs(IDS).logits
    model = GPT2.from_pretrained(base_folder)
    worst = max(far(load_adapter(copy.deepcopy(model), tmp_path / "adapter")(IDS), want),
                far(adapted(model, tmp_path / "adapter")(IDS), want))
    assert far(want, model(IDS)) > 0.01 and worst < 1e-4
    ledger("peft's adapter in ours (logits)", worst, peer="peft", bound=1e-4)


def test_saved_and_loaded_is_the_same(tmp_path):
    model = shaken(apply_lora(new_model(), LoraConfig(4, 8, lora_dropout=0.1, use_rslora=True)))
    save_adapter(model, tmp_path / "a")
    again = load_adapter(new_model(), tmp_path / "a", "named")
    assert torch.equal(again(IDS), model(IDS))
    want, found = model.adapters.configs["default"], again.adapters.configs["named"]
    assert set(found.target_modules) == set(want.target_modules)
    assert (found.r, found.lora_alpha, found.lora_dropout, found.use_rslora) == (4, 8, 0.1, True)
    with pytest.raises(FileExistsError, match="overwrite"):
        save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "a", overwrite=True)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_peft_are_refused(bias, base_folder, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["c_fc"], bias=bias, fan_in_fan_out=True, task_type="CAUSAL_LM")
    peft.get_peft_model(hf_model(base_folder), config).save_pretrained(tmp_path / "a")
    model = GPT2.from_pretrained(base_folder)
    for read in (load_adapter, adapted):
        with pytest.raises(ValueError, match=f"bias='{bias}'"):
            read(model, tmp_path / "a")
    assert not lora_layers(model)


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64).to(torch.float32), copy.deepcopy], ids=["to", "deepcopy"])
def test_an_adapter_goes_on_after_the_model_was_moved(move, tmp_path):
    """`to` and `deepcopy` give the parameters other tensors, as a GPU would."""
    model = move(apply_lora(new_model(), LoraConfig(4, 8, target_modules=["c_fc"])))
    want = shaken(model)(IDS).detach()
    save_adapter(model, tmp_path / "a")
    assert torch.equal(load_adapter(new_model(), tmp_path / "a")(IDS), want)
    assert torch.equal(set_adapter(model, None)(IDS), new_model()(IDS))
    assert torch.equal(set_adapter(model, "default")(IDS), want)


def test_the_state_dict_holds_the_adapter(tmp_path):
    """torch.save(model.state_dict()) loses nothing; what it stands for as a plain GPT2 is plain_weights()."""
    model = shaken(apply_lora(new_model(), LoraConfig(4, 8)))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    again = apply_lora(new_model(seed=9), LoraConfig(4, 8))
    again.load_state_dict(state)
    assert torch.equal(again(IDS), model(IDS))
    with pytest.raises(RuntimeError, match="Unexpected key.*lora_A.default"):
        new_model().load_state_dict(state)
    layer, weights = model.blocks[0].mlp.c_fc, plain_weights(model)
    assert list(weights) != list(state) and set(weights) == set(new_model().state_dict())
    assert torch.equal(weights["blocks.0.mlp.c_fc.weight"], layer.base.weight + layer.delta("default"))
    assert weights["wte.weight"].data_ptr() == model.wte.weight.data_ptr()


# ------------------------------------------------------------------ several in one batch

def test_rows_with_adapters_of_their_own_are_as_one_by_one(ledger):
    model = new_model()
    for seed, (name, config) in enumerate([("a", LoraConfig(2)), ("b", LoraConfig(3, 9, target_modules=["c_fc"]))]):
        torch.manual_seed(seed)
        shaken(apply_lora(model, config, name), seed)
    names, rows = ["b", None, "a", "b"], IDS[[0, 1, 1, 1]]
    with adapters_by_row(model, names):
        together = model(rows)
    alone = torch.cat([set_adapter(model, name)(rows[i:i + 1]) for i, name in enumerate(names)])
    assert far(together, alone) < 1e-5 < 0.01 < far(together[1], together[3])
    ledger("rows of a batch with adapters of their own = one by one (logits)", far(together, alone), bound=1e-5)
    set_adapter(model, "a")
    with pytest.raises(ValueError, match="no adapter 'c'; there are: a, b"):
        adapters_by_row(model, ["c"]).__enter__()
    with pytest.raises(ValueError, match="batch has 2 rows, and 1 adapters"):
        with adapters_by_row(model, ["b"]):
            model(IDS)
    assert torch.equal(model(IDS)[0], set_adapter(model, "a")(IDS)[0])  # the active one is back, no hook is left
    assert not any(layer._forward_hooks for layer in lora_layers(model).values())


# ------------------------------------------------------------------ adapted models elsewhere

def test_adapted_shares_and_leaves_the_model_alone(tmp_path):
    plain = new_model()
    model = shaken(apply_lora(copy.deepcopy(plain), LoraConfig(4, 8, target_modules=["c_attn"])))
    save_adapter(model, tmp_path / "a")
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    for made in (adapted(plain, tmp_path / "a"), adapted(model)):
        assert type(made) is GPT2 and list(made.state_dict()) == list(before)
        assert far(made(IDS), model(IDS)) < 1e-5
    made = adapted(plain, tmp_path / "a")
    shared = {n for n, p in made.named_parameters() if p.data_ptr() == plain.get_parameter(n).data_ptr()}
    assert set(before) - shared == {f"blocks.{n}.attn.c_attn.weight" for n in (0, 1)}
    assert all(torch.equal(t, before[n]) for n, t in plain.state_dict().items())


def test_decoder_and_saved_model_see_the_adapter(tmp_path):
    """What reads weights (the fast decoder, save_pretrained, transformers) gets W + s B A."""
    model = shaken(apply_lora(new_model(), LoraConfig(8, 16)))
    prompt = IDS[0, :5].tolist()
    ids = list(prompt)
    for _ in range(12):  # the slow way: whole passes through the layers
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    for weights in ("fast", "live"):
        assert generate(model, prompt, max_new_tokens=12, temperature=0, decoder=Decoder(model, weights)).ids == ids[5:]
    assert far(model(IDS), new_model()(IDS)) > 0.01
    model.save_pretrained(tmp_path / "m")
    assert far(hf_model(tmp_path / "m")(IDS).logits, model(IDS)) < 1e-4
    with pytest.raises(RuntimeError, match="Missing key.*lora_A.default"):
        model.load_state_dict(new_model().state_dict())


def test_an_adapter_chats(tmp_path):
    torch.manual_seed(1)  # for A: not every draw changes the reply
    model = apply_lora(GPT2.from_pretrained(), LoraConfig(2, 4, target_modules=["c_fc"]))
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"], std=0.2)
    save_adapter(model, tmp_path / "a")
    assert sum(p.stat().st_size for p in (tmp_path / "a").iterdir()) < 2e6
    plain = GPT2.from_pretrained()
    replies = [ChatSession(m, temperature=0, max_new_tokens=12).reply("What is rain?")
               for m in (adapted(plain, tmp_path / "a"), model, plain)]
    assert replies[0] == replies[1] != replies[2]


# ------------------------------------------------------------------ bad input

def test_refused_in_a_model():
    with pytest.raises(ValueError, match="'q_proj'.*there are attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"):
        apply_lora(new_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="regular expression"):
        apply_lora(new_model(), LoraConfig(target_modules="("))
    model = apply_lora(new_model(), LoraConfig(2))
    with pytest.raises(ValueError, match="'default' already"):
        apply_lora(model, LoraConfig(2))
    with pytest.raises(ValueError, match="a.b"):
        apply_lora(model, LoraConfig(2), "a.b")
    with pytest.raises(ValueError, match="nothing to undo"):
        unmerge_lora(model)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        save_adapter(model, "nowhere", "other")
    with pytest.raises(ValueError, match="quantize_model first"):
        quantize_model(model)
    set_adapter(model, None)
    with pytest.raises(ValueError, match="no adapter is active"):
        merge_lora(model)
    for action in (merge_lora, unmerge_lora, lambda m: set_adapter(m, None), lambda m: save_adapter(m, "nowhere")):
        with pytest.raises(ValueError, match="has no adapter"):
            action(new_model())


def test_refused_folders(tmp_path):
    folder = tmp_path / "a"
    save_adapter(shaken(apply_lora(new_model(), LoraConfig(2))), folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    values, tensors = json.loads(config.read_text()), load_file(weights)

    def check(error, word, model=None):
        plain = model or new_model()
        before = list(plain.state_dict())
        for read in (load_adapter, adapted):
            with pytest.raises(error, match=word):
                read(plain, folder)
        assert list(plain.state_dict()) == before and not lora_layers(plain)

    check(ValueError, "another model", GPT2(GPT2Config.preset("nano", n_layer=2)))
    check(ValueError, "another model.*no such layer",
          GPT2(GPT2Config(vocab_size=300, block_size=64, n_layer=1, n_head=4, n_embd=64)))
    for change, word in (({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"r": 3}, "another model"),
                         ({"rank_pattern": {"c_attn": 2}}, "rank_pattern"), ({"init_lora_weights": "pissa"}, "pissa"),
                         ({"target_modules": ["q_proj"]}, "q_proj"), ({"modules_to_save": ["wte"]}, "modules_to_save")):
        config.write_text(json.dumps(values | change))
        check(ValueError, word)
    config.write_text("{")
    check(ValueError, "can't be read")
    config.write_text("[]")
    check(ValueError, "can't be read")
    config.write_text(json.dumps(values))
    save_file({**tensors, "base_model.model.transformer.wte.lora_embedding_A": torch.ones(2)}, weights)
    check(ValueError, "lora_embedding_A")
    save_file({k: t for k, t in tensors.items() if "h.0.attn.c_attn.lora_B" not in k}, weights)
    check(ValueError, "another model")
    save_file({k: t / 0 for k, t in tensors.items()}, weights)
    check(ValueError, "holds NaN or infinite")
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    check(ValueError, "cut short")
    weights.unlink()
    check(FileNotFoundError, "adapter_model.safetensors is missing")
    config.unlink()
    check(FileNotFoundError, "adapter_config.json is missing")


# ------------------------------------------------------------------ NF4

PAPER = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
         -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_code_is_the_papers(ledger):
    assert nf4_code().tolist() == PAPER
    ledger("NF4 code book = QLoRA's appendix E", 0, bound=0)


@pytest.mark.parametrize("shape", [(64, 128), (33, 66), (5, 7), (1, 1)])
def test_nearest_values_and_bytes(shape):
    """Against a search over all 16 values in float64."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight.view(-1)[:weight.numel() // 3 // 64 * 64] = 0  # blocks of zeros
    q = quantize_nf4(weight, double=False)
    code = torch.tensor(PAPER, dtype=torch.float64)
    flat = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).double()
    scale = flat.abs().amax(1, keepdim=True)
    best = (flat[:, :, None] / scale.clamp(min=1e-38)[:, :, None] - code).abs().argmin(-1)
    want = (code[best] * scale).flatten()[:weight.numel()].view(shape)
    assert q.dequantize().shape == weight.shape and far(q.dequantize().double(), want) < 1e-6
    double = quantize_nf4(weight)
    assert far(double.dequantize(), q.dequantize()) < 0.02 * weight.abs().max()
    if weight.numel() > 4096:
        assert q.nbytes == weight.numel() * 4.5 / 8
        assert double.nbytes == weight.numel() * (4 + 8 / 64) / 8 + 4 * math.ceil(weight.numel() / 64 / 256) + 4


def test_bytes_of_a_large_matrix(ledger):
    weight = torch.randn(512, 2048)
    each = quantize_nf4(weight).nbytes / weight.numel()
    assert each < 0.52
    ledger("NF4 with double quantisation, bytes a weight", each, bound=0.6)


def test_refuses_weights():
    with pytest.raises(ValueError, match="block_size=7"):
        quantize_nf4(torch.randn(4, 4), block_size=7)
    with pytest.raises(ValueError, match="inf or NaN"):
        quantize_nf4(torch.tensor([[1.0, float("nan")]]))


def test_equal_to_bitsandbytes(ledger):
    """Packed bytes and weights bit for bit; scales in 8 bits: each the nearest, where bitsandbytes is now and then one off."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not made for this system").functional
    torch.manual_seed(0)
    weight = torch.randn(512, 1024) * 0.02
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    ours = quantize_nf4(weight, double=False)
    assert torch.equal(packed.flatten(), ours.packed)
    assert torch.equal(bnb.dequantize_4bit(packed, state), ours.dequantize())
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours, theirs = quantize_nf4(weight), state.absmax.flatten()
    assert torch.equal(dynamic_code(), state.state2.code)
    assert torch.equal(ours.scale2, state.state2.absmax) and torch.equal(ours.offset, state.offset)
    read = NF4(weight.shape, 64, packed=packed.flatten(), scale=theirs, scale2=state.state2.absmax, offset=state.offset)
    assert torch.equal(bnb.dequantize_4bit(packed, state), read.dequantize())  # their file, our arithmetic
    other = (ours.scale != theirs).nonzero()[:, 0]
    assert len(other) < 0.01 * len(theirs)
    scale = weight.view(-1, 64).abs().amax(1) - state.offset
    unit = scale / ours.scale2.repeat_interleave(256)[:len(scale)]
    code = dynamic_code()
    mine, his = ((code[s.int()] - unit).abs()[other] for s in (ours.scale, theirs))
    assert (mine <= his).all() and ((ours.scale.int() - theirs.int()).abs()[other] == 1).all()
    ledger("NF4 weights = bitsandbytes', scales in float32", 0, peer="bitsandbytes", bound=0)
    ledger("NF4 double quantisation: share of 8-bit scales that bitsandbytes rounds to the second nearest",
           len(other) / len(theirs), peer="bitsandbytes", bound=0.01)


def test_error_against_int8_and_bf16():
    from minigpt.engine.weights import dequantize_rows, quantize_rows
    torch.manual_seed(0)
    weight = torch.randn(512, 512) * 0.02

    def error(w):
        return ((w - weight).norm() / weight.norm()).item()

    found = [error(weight.bfloat16().float()), error(dequantize_rows(*quantize_rows(weight))),
             error(quantize_nf4(weight, double=False).dequantize()), error(quantize_nf4(weight).dequantize())]
    assert found == sorted(found) and found[0] < 0.003 < found[1] < 0.01 < 0.07 < found[2] and found[3] < 0.11


def test_nf4_linear_and_its_backward(ledger):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 64)
    four = NF4Linear(linear)
    x = torch.randn(3, 5, 96, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = four(x)
    assert all(n < 96 * 64 for n in kept)  # the unpacked weight is not kept
    grad, = torch.autograd.grad(out.square().sum(), x)
    plain = F.linear(x, four.weight, linear.bias)
    want, = torch.autograd.grad(plain.square().sum(), x)
    assert torch.equal(out, plain) and far(grad, want) < 1e-4 * want.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert four(x).dtype == torch.bfloat16
    ledger("4-bit Linear's gradient = that of its unpacked weight (relative)", far(grad, want) / want.abs().max().item(),
           bound=1e-4)


def test_qlora_equals_lora_on_the_unpacked_model():
    four = quantize_model(new_model())
    assert all(isinstance(m, NF4Linear) for m in linear_layers(four).values())
    plain = GPT2(SHAPE).eval()
    plain.load_state_dict(plain_weights(four))
    losses = []
    for model in (four, plain):
        torch.manual_seed(0)
        shaken(apply_lora(model, LoraConfig(4, 8)))
        data = IDS.flatten().repeat(20).numpy()
        config = TrainConfig(max_steps=6, batch_size=2, block_size=24, lr=3e-3, warmup_steps=1, eval_every=0, save_every=0,
                             log_every=1, device="cpu")
        result = train(model, data, config, progress=False)
        losses.append([row["loss"] for row in result.history])
    assert np.allclose(losses[0], losses[1], atol=1e-4)
    for a, b in zip(lora_layers(four).values(), lora_layers(plain).values()):
        assert far(a.delta("default"), b.delta("default")) < 1e-3 * b.delta("default").abs().max()
    assert far(adapted(four)(IDS), four(IDS)) < 1e-4
    assert trainable_report(four).total == trainable_report(plain).total
    with pytest.raises(ValueError, match="4-bit"):
        merge_lora(four)


def test_adapted_from_a_4_bit_bfloat16_model_is_bfloat16(tmp_path):
    four = quantize_model(new_model().bfloat16())
    plain = new_model()
    plain.load_state_dict(plain_weights(four))                          # float32, with the weights of the 4 bits
    for model in (four, plain):
        torch.manual_seed(0)
        shaken(apply_lora(model, LoraConfig(4, 8)))
    save_adapter(four, tmp_path / "a")
    base = quantize_model(new_model().bfloat16())
    for made in (adapted(four), adapted(base, tmp_path / "a")):
        assert {t.dtype for t in made.state_dict().values()} == {torch.bfloat16}
        assert far(made(IDS).float(), plain(IDS)) < 0.1 < far(base(IDS).float(), plain(IDS))


# ------------------------------------------------------------------ exercises

WRONG = {"09.1": ("def lora_size(shapes, r):\n    return sum(r * a * b for a, b in shapes)", "whole matrices"),
         "09.2": ("def best_adapter(delta, r):\n    return delta[:r], torch.eye(len(delta))[:, :r].to(delta)", "SVD"),
         "09.3": ("def pissa(W, r):\n    U, S, Vh = torch.linalg.svd(W, full_matrices=False)\n"
                  "    A, B = Vh[-r:], U[:, -r:] * S[-r:]\n    return W - B @ A, A, B", "largest")}


@pytest.mark.parametrize("number, empty, check, solution", exercises("09"), ids=lambda v: v if v[:2] == "09" else "")
def test_exercises(number, empty, check, solution, capsys):
    space = {"torch": torch, "math": math}
    assert said(empty, check, space, capsys) == "not solved yet"
    assert said(solution, check, space, capsys) == "correct"
    wrong, hint = WRONG[number]
    assert hint in said(wrong, check, space, capsys)
