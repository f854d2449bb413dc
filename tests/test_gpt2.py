"""GPT-2's parts, shapes, names and files; the parity with transformers is in test_gpt2_parity.py, hooks in test_hooks.py."""
import json
import math
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from exercise_cells import exercises, said
from minigpt import gpt2
from minigpt.engine.files import ASSETS
from minigpt.engine.tokenizer import Tokenizer
from minigpt.engine.hub import HUB_NAMES, config_from_hf, config_to_hf, find_model, read_config, save_int8
from minigpt.engine.weights import dequantize_rows, quantize_rows
from minigpt.engine.cache import KVCache
from minigpt.gpt2 import GPT2, PRESETS, Block, GPT2Config, count_parts, init_weights
from small_models import TINY, ids_of, tiny  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------ shapes

@pytest.mark.parametrize("name, millions", [("gpt2", 124.439808), ("gpt2-medium", 354.823168), ("gpt2-large", 774.03008),
                                            ("gpt2-xl", 1557.6112), ("mini", 35.984384), ("nano", 1.088256)])
def test_parameters_of_the_presets(name, millions):
    """OpenAI's counts are those of the released checkpoints; every count equals what torch allocates."""
    config = GPT2Config.preset(name)
    assert sum(count_parts(config).values()) == round(millions * 1e6)
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT2(config).parameters()) == round(millions * 1e6)


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("n_layer", -1), ("n_head", 2.0), ("n_embd", "64"), ("dropout", 1.0), ("dropout", -0.1),
    ("activation", "relu"), ("layer_norm_epsilon", 0.0), ("layer_norm_epsilon", math.nan), ("n_head", 7),
    ("n_layer", 10**9), ("vocab_size", 2**24 + 1), ("n_head", True), ("eos_token_id", [0, 1])])
def test_shapes_that_cannot_be_built(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{value}")):
        GPT2Config(**{field: value})


def test_unknown_preset_lists_them():
    with pytest.raises(ValueError, match="gpt3.*nano"):
        GPT2Config.preset("gpt3")
    with pytest.raises(TypeError, match="layers"):
        GPT2Config.preset("nano", layers=3)


def test_config_there_and_back():
    config = GPT2Config.preset("mini", dropout=0.1, activation="gelu", layer_norm_epsilon=1e-6, eos_token_id=None)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
    assert config_to_hf(GPT2Config(vocab_size=100))["eos_token_id"] is None  # 50256 would lie outside


@pytest.mark.parametrize("change", [
    {"model_type": "gpt_neox"}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"n_inner": 100},
    {"add_cross_attention": True}, {"tie_word_embeddings": False}, {"activation_function": "relu"}, {"n_embd": None}])
def test_variants_are_refused(change):
    name, = change
    with pytest.raises(ValueError, match="activation" if name == "activation_function" else name):
        config_from_hf(config_to_hf(TINY) | change)


# ------------------------------------------------------------------ parts

def test_block_equals_torchs_encoder_layer(ledger):
    torch.manual_seed(0)
    config = GPT2Config.preset("nano")
    block = Block(config)
    peer = torch.nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, norm_first=True, batch_first=True,
                                            activation=lambda x: F.gelu(x, approximate="tanh"))
    names = {"self_attn.in_proj_": "attn.c_attn.", "self_attn.out_proj.": "attn.c_proj.", "linear1.": "mlp.c_fc.",
             "linear2.": "mlp.c_proj.", "norm1.": "ln_1.", "norm2.": "ln_2."}
    ours = block.state_dict()
    peer.load_state_dict({a + end: ours[b + end] for a, b in names.items() for end in ("weight", "bias")})
    x = torch.randn(3, 20, 128)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(20)
    difference = (block(x) - peer(x, src_mask=mask)).abs().max().item()
    ledger("a block", difference, peer="torch", bound=1e-5)
    assert difference <= 1e-5


def test_tied_table_gets_both_gradients():
    """The look-up's gradient plus the head's, against a model whose two tables are apart."""
    torch.manual_seed(0)
    model = GPT2(TINY).train()
    ids = ids_of()
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    both = model.wte.weight.grad
    hidden = {}
    model.ln_f.register_forward_hook(lambda m, a, out: hidden.update(out=out))
    logits = model(ids)
    looked_up, = torch.autograd.grad(F.cross_entropy((hidden["out"] @ model.wte.weight.detach().T).flatten(0, 1),
                                                     ids.flatten()), model.wte.weight, retain_graph=True)
    whole, = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), ids.flatten()), model.wte.weight)
    assert torch.allclose(both, whole, atol=1e-7) and not torch.allclose(both, looked_up, atol=1e-5)


def test_gradients_add_up_over_two_backwards():
    torch.manual_seed(0)
    model = GPT2(TINY).train()
    ids = ids_of(4)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    once = model.wte.weight.grad.clone()
    model.zero_grad()
    for half in ids.chunk(2):
        (F.cross_entropy(model(half).flatten(0, 1), half.flatten()) / 2).backward()
    assert torch.allclose(model.wte.weight.grad, once, atol=1e-6)


def test_initial_weights_and_loss():
    torch.manual_seed(0)
    config = GPT2Config.preset("nano", n_layer=8)
    model = GPT2(config).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
        elif name.endswith("bias"):
            assert not p.any()
    ids = ids_of(4, 64, 2048)
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(2048), abs=0.15)
    before = model.blocks[0].attn.c_proj.weight.clone()
    init_weights(model, 8)
    assert not torch.equal(before, model.blocks[0].attn.c_proj.weight)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=8, dropout=0.5))
    ids = ids_of()
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


# ------------------------------------------------------------------ bad ids, the cache

@pytest.mark.parametrize("ids, error, said", [
    (torch.tensor([[3, 50]]), ValueError, "id 50 .*0...49"), (torch.tensor([[-1]]), ValueError, "id -1"),
    (torch.zeros(1, 17).long(), ValueError, "17 tokens.*block_size=16"), (torch.zeros(4).long(), ValueError, r"\(B, T\)"),
    (torch.zeros(1, 0).long(), ValueError, "one token or more"), (torch.zeros(1, 3), TypeError, "whole numbers")])
def test_bad_ids(tiny, ids, error, said):
    with pytest.raises(error, match=said):
        tiny(ids)


def test_cache_in_pieces_equals_one_pass(tiny):
    ids, whole = ids_of(), tiny(ids_of())
    for sizes in ([1] * 10, [4, 1, 5], [10]):
        cache = KVCache(TINY, 2, 12)
        parts = [tiny(part, cache) for part in ids.split(sizes, dim=1)]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
        assert cache.length == 10
    assert torch.allclose(tiny(ids, last_only=True), whole[:, -1:], atol=1e-6)


def test_cut_and_reordered_cache_goes_on_rightly(tiny):
    ids = ids_of(3, 9)
    cache = KVCache(TINY, 3)
    tiny(ids, cache)
    cache.truncate(5)
    assert torch.allclose(tiny(ids[:, 5:], cache), tiny(ids)[:, 5:], atol=1e-5)
    cache.reorder(torch.tensor([2, 0]))
    more = ids_of(2, 1)
    expected = tiny(torch.cat([ids[[2, 0]], more], 1))[:, -1:]
    assert torch.allclose(tiny(more, cache), expected, atol=1e-5)
    with pytest.raises(ValueError, match="cannot cut 10"):
        cache.truncate(11)


def test_padded_rows_equal_single_ones_in_every_piece(tiny):
    rows = [ids_of(1, n)[0] for n in (3, 8, 1)]
    pad = torch.tensor([8 - len(r) for r in rows])
    left = torch.stack([F.pad(r, (8 - len(r), 0)) for r in rows])
    cache = KVCache(TINY, 3, pad=pad)
    tiny(left[:, :4], cache)
    logits = tiny(left[:, 4:], cache)[:, -1]
    step = tiny(ids_of(3, 1), cache)[:, -1]
    for i, row in enumerate(rows):
        assert torch.allclose(logits[i], tiny(row[None])[0, -1], atol=1e-5)
        longer = torch.cat([row, ids_of(3, 1)[i]])
        assert torch.allclose(step[i], tiny(longer[None])[0, -1], atol=1e-5)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("options, said", [
    (dict(max_length=17), "max_length=17"), (dict(max_length=0), "max_length=0"), (dict(pad=torch.zeros(2).long()), "pad")])
def test_caches_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        KVCache(TINY, 3, **options)


def test_full_or_foreign_cache(tiny):
    cache = KVCache(TINY, 1, 4)
    tiny(ids_of(1, 4), cache)
    with pytest.raises(ValueError, match="room=4"):
        tiny(ids_of(1, 1), cache)
    with pytest.raises(ValueError, match="2 rows.*cache of 1"):
        tiny(ids_of(2, 1), cache)


# ------------------------------------------------------------------ names and files

def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model() == find_model("minigpt-chat") == ASSETS / "minigpt-chat"
    with pytest.raises(ValueError, match="'gpt5'.*minigpt-chat.*gpt2-xl.*owner/name"):
        find_model("gpt5")
    with pytest.raises(ValueError, match="nowhere"):
        find_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="~nobody-of-this-name"):
        find_model("~nobody-of-this-name/model")
    with pytest.raises(FileNotFoundError, match="~nobody-of-this-name"):
        Tokenizer.from_pretrained("~nobody-of-this-name/model")
    with pytest.raises(ValueError, match="no/such/folder"):
        GPT2.from_pretrained("no/such/folder")
    (tmp_path / "gpt2").mkdir()
    assert find_model("gpt2") == Path("gpt2")  # what lies here comes first
    assert set(HUB_NAMES) == {name for name in PRESETS if name.startswith("gpt2")}


@pytest.mark.parametrize("name", ["gpt2", "somebody/some-model"])
def test_hub_name_offline_says_what_to_do(name):
    code = (f"from minigpt.gpt2 import GPT2\ntry:\n    GPT2.from_pretrained({name!r}, revision='v1')\n"
            "except FileNotFoundError as error:\n    print(error)")
    with_cache = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(ROOT / "tests" / "no-such-cache")}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=with_cache)
    assert HUB_NAMES.get(name, name) in out.stdout and "HF_HUB_OFFLINE" in out.stdout and "'v1'" in out.stdout, out.stderr
    assert len(out.stdout.strip().splitlines()) == 1


def test_a_model_in_the_hubs_cache_opens_offline(tiny, tmp_path):
    """The layout of huggingface_hub's cache, built by hand: refs/main names a snapshot."""
    repo = tmp_path / "hub" / "models--openai-community--gpt2"
    tiny.save_pretrained(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    code = "from minigpt.gpt2 import GPT2\nprint(GPT2.from_pretrained('gpt2').config.n_embd)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                         env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert out.stdout.strip() == "8", out.stderr


def test_opening_a_model_does_not_import_torchs_compiler():
    """It takes over a second, and an empty model on "meta" has it imported as soon as a number is drawn for it."""
    code = "import sys\nfrom minigpt.gpt2 import GPT2\nGPT2.from_pretrained()\nprint('torch._dynamo' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "False", out.stderr


def test_folder_there_and_back(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "a" / "model")
    again = GPT2.from_pretrained(str(tmp_path / "a" / "model"))
    assert again.config == TINY and not again.training
    assert all(torch.equal(p, q) for p, q in zip(tiny.parameters(), again.parameters()))
    half = GPT2.from_pretrained(tmp_path / "a" / "model", dtype="bfloat16", dropout=0.2)
    assert half.dtype == torch.bfloat16 and half.config.dropout == 0.2
    half.save_pretrained(tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text(encoding="utf-8"))
    assert config["torch_dtype"] == "bfloat16"
    card = (tmp_path / "half" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and f"{sum(count_parts(TINY).values()):,} parameters" in card
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_saving_keeps_what_is_there(tiny, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("mine", encoding="utf-8")
    (folder / "notes.txt").write_text("mine too", encoding="utf-8")
    tiny.save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    other = GPT2(TINY)
    for save in (other.save_pretrained, lambda f: save_int8(other, f)):
        with pytest.raises(FileExistsError, match="overwrite=True"):
            save(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    other.save_pretrained(folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() != before
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine" and (folder / "notes.txt").exists()
    with pytest.raises(FileExistsError, match="is a file"):
        tiny.save_pretrained(folder / "notes.txt")


@pytest.mark.parametrize("error", [PermissionError, KeyboardInterrupt])
def test_an_error_while_files_are_moved_leaves_everything(tiny, tmp_path, monkeypatch, error):
    """Save over a model and let each move in turn fail: every time all is as before; without failure all is new."""
    tiny.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()  # so that one file is new and the others replace
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    move, other, moves = os.replace, GPT2(TINY), []

    def failing(at):
        def replace(source, target):
            moves.append(target)
            if len(moves) == at:
                raise error("in use")
            move(source, target)
        return replace
    for at in range(1, 100):
        moves.clear()
        monkeypatch.setattr(os, "replace", failing(at))
        try:
            other.save_pretrained(tmp_path / "model", overwrite=True)
            break
        except error:
            assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert at > 3 and (tmp_path / "model" / "generation_config.json").exists()
    assert torch.equal(GPT2.from_pretrained(tmp_path / "model").wte.weight, other.wte.weight)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_files_that_cannot_be_put_back_are_not_lost(tiny, tmp_path, monkeypatch, error):
    """From some move on all of them fail, those that put the old files back too: they stay in a folder of their own."""
    tiny.save_pretrained(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    move, moves = os.replace, []

    def failing(source, target):
        moves.append(target)
        if len(moves) > 2:
            raise error("no longer")
        move(source, target)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        with pytest.warns(UserWarning, match="could not be put back are in .*replaced"), pytest.raises(error):
            GPT2(TINY).save_pretrained(tmp_path / "model", overwrite=True)
    kept, = [p for p in (tmp_path / "model").iterdir() if p.is_dir()]
    assert "replaced" in kept.name and [p.name for p in tmp_path.iterdir()] == ["model"]
    left = {p.name: p.read_bytes() for folder in (tmp_path / "model", kept) for p in folder.iterdir() if p.is_file()}
    assert left == before and "model.safetensors" in left


def test_files_of_two_models_are_never_taken_for_one(tiny, tmp_path, monkeypatch):
    """Whenever weights are there, all files beside them are of the same save: a kill in between shows."""
    tokenizer = Tokenizer.train("low lower lowest " * 3, 262)
    config = replace(TINY, vocab_size=300)
    GPT2(config).save_pretrained(tmp_path / "model", Tokenizer.train("new newer newest " * 3, 262))
    GPT2(config).save_pretrained(tmp_path / "other", tokenizer)

    def files(folder):                             # without the lock, and what is written aside
        return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}
    first, move, seen = files(tmp_path / "model"), os.replace, []

    def watched(source, target):
        seen.append(files(tmp_path / "model"))
        move(source, target)
    monkeypatch.setattr(os, "replace", watched)
    model = GPT2.from_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model", tokenizer, overwrite=True)
    last = files(tmp_path / "model")
    assert last["model.safetensors"] != first["model.safetensors"]
    assert last["tokenizer.json"] != first["tokenizer.json"]
    whole = [now for now in [*seen, last] if "model.safetensors" in now]
    assert all(now in (first, last) for now in whole) and len(seen) > 4


def test_loaded_weights_do_not_hang_on_the_file(tiny, tmp_path):
    """A mapped file cannot be replaced on Windows, and a change of it would change the model."""
    tiny.save_pretrained(tmp_path / "model")
    model = GPT2.from_pretrained(tmp_path / "model")
    if sys.platform.startswith("linux"):
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    path = tmp_path / "model" / "model.safetensors"
    with path.open("r+b") as file:  # in place, not by a new file
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(p, q) for p, q in zip(tiny.parameters(), model.parameters()))


@pytest.mark.skipif(os.name == "nt", reason="permissions of Unix")
@pytest.mark.parametrize("save", [lambda m, f: m.save_pretrained(f), save_int8])
def test_weights_are_as_readable_as_the_config(tiny, tmp_path, save):
    save(tiny, tmp_path / "m")
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "m").iterdir()}
    assert len(modes) == 1


def test_tokenizer_with_more_ids_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="20000 ids.*only 50"):
        tiny.save_pretrained(tmp_path / "m", Tokenizer.from_pretrained())
    assert not (tmp_path / "m").exists()


def change_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def change_weights(change):
    def act(folder: Path) -> None:
        from safetensors.torch import load_file, save_file
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return act


def write_index(content: str):
    def act(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    return act


def set_numbers(name: str, value: float):
    return change_weights(lambda w: w[name].view(-1)[3:4].fill_(value))


def set_config(**values):
    def act(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")
    return act


@pytest.mark.parametrize("damage, error, said", [
    (write_index("{}"), ValueError, "index.json does not hold.*weight_map"),
    (write_index('{"weight_map": "x"}'), ValueError, "index.json does not hold"),
    (write_index('{"weight_map": {"wte.weight": "../other.safetensors"}}'), ValueError, "no file of this folder"),
    (write_index('{"weight_map": {}}'), ValueError, "lacks the tensor 'wte.weight'"),
    (set_numbers("transformer.wte.weight", math.nan), ValueError, "model.safetensors: transformer.wte.weight holds NaN"),
    (set_numbers("transformer.h.1.mlp.c_fc.bias", -math.inf), ValueError, "h.1.mlp.c_fc.bias holds NaN or infinite"),
    (set_config(n_layer=10**9), ValueError, "config.json: n_layer=1000000000 must be a whole number from 1 to"),
    (set_config(n_layer=10**7), ValueError, "lacks the tensor 'blocks.2.*n_layer=10000000"),
    (set_config(n_positions=2**24), ValueError, "wpe.weight is .16, 8.* says .16777216, 8"),
    (set_config(n_embd=2**23, n_head=2), ValueError, "wte.weight is .50, 8. in the weights"),
    (set_config(vocab_size=10**30), ValueError, "vocab_size=1000000000000000000000000000000"),
    (set_config(layer_norm_epsilon="x"), ValueError, "config.json"),
    (set_config(activation_function=["gelu"]), ValueError, "config.json"),
    (set_config(eos_token_id=[0, 1]), ValueError, r"config.json: eos_token_id=\[0, 1\] must be one id"),
    (change_index, FileNotFoundError, "model-00001-of-00002.safetensors is missing"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), FileNotFoundError, "they can run code"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), ValueError, "damaged or cut short"),
    (lambda f: (f / "config.json").write_text("{", encoding="utf-8"), ValueError, "config.json"),
    (lambda f: (f / "config.json").write_text("[1]", encoding="utf-8"), ValueError, "config.json"),
    (change_weights(lambda w: w.pop("transformer.ln_f.bias")), ValueError, "lacks the tensor 'ln_f.bias'"),
    (change_weights(lambda w: w.update({"transformer.h.2.ln_1.bias": torch.zeros(8)})), ValueError, "blocks.2.ln_1.bias"),
    (change_weights(lambda w: w.update({"lm_head.weight": torch.zeros(50, 8)})), ValueError, "output head of its own"),
    (change_weights(lambda w: w.update({"transformer.wte.weight": torch.zeros(51, 8)})), ValueError, "vocabulary mismatch"),
])
def test_damaged_folders(tiny, tmp_path, damage, error, said):
    tiny.save_pretrained(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(error, match=said):
        GPT2.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("scale", [None, torch.ones(3).half(), torch.full((50,), math.inf).half()])
def test_int8_needs_a_number_for_each_row(tiny, tmp_path, scale):
    from safetensors.torch import load_file, save_file
    save_int8(tiny, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["wte.weight.scale"]
    save_file(weights | ({} if scale is None else {"wte.weight.scale": scale}), tmp_path / "m" / "model.safetensors",
              metadata={"format": "minigpt-int8"})
    with pytest.raises(ValueError, match="wte.weight.scale"):
        GPT2.from_pretrained(tmp_path / "m")


def test_an_absurd_config_is_refused_at_once(tiny, tmp_path):
    """In a process of its own that has a minute: nothing of the promised size is ever built."""
    tiny.save_pretrained(tmp_path / "m")
    set_config(n_layer=2**24, n_positions=16)(tmp_path / "m")
    code = ("from minigpt.gpt2 import GPT2\ntry:\n    GPT2.from_pretrained('m')\n"
            "except ValueError as error:\n    print(error)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "n_layer=16777216" in out.stdout, out.stderr


def test_a_missing_field_has_gpt2s_value_but_for_dropout(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    ours, theirs = read_config(tmp_path), transformers.GPT2Config()
    for name in ("vocab_size", "n_layer", "n_head", "n_embd", "layer_norm_epsilon", "eos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.block_size == theirs.n_positions and ours.dropout == 0.0 != theirs.resid_pdrop


def test_stored_masks_and_a_tied_head_are_taken(tiny, tmp_path):
    """Old files hold the causal mask as a buffer, others the head once more."""
    def add(weights: dict) -> None:
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    tiny.save_pretrained(tmp_path / "m")
    change_weights(add)(tmp_path / "m")
    assert torch.equal(GPT2.from_pretrained(tmp_path / "m")(ids_of()), tiny(ids_of()))


def test_int8_folder(tiny, tmp_path):
    save_int8(tiny, tmp_path / "m")
    small = GPT2.from_pretrained(tmp_path / "m")
    for (name, p), q in zip(tiny.named_parameters(), small.parameters()):
        step = p.abs().amax(-1, keepdim=True) / 127 if p.dim() == 2 and "wpe" not in name else p.abs() * 2e-3
        assert ((p - q).abs() <= step * 0.51 + 1e-6).all(), name
    again, scale = quantize_rows(small.wte.weight.detach())
    assert torch.equal(dequantize_rows(again, scale), small.wte.weight)  # nothing is lost a second time


def test_rows_of_zeros_and_of_tiny_numbers():
    weight = torch.tensor([[0.0, 0.0], [1e-9, -1e-9], [1e-3, -2e-4], [60.0, -3.0]])
    steps, scale = quantize_rows(weight)
    back = dequantize_rows(steps, scale)
    assert torch.isfinite(back).all() and not back[0].any()
    assert torch.allclose(back, weight, atol=0.25, rtol=0) and torch.allclose(back[2], weight[2], atol=1e-5)


def test_loading_reads_no_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = GPT2.from_pretrained()
    assert torch.equal(torch.rand(3), expected)
    assert model.config == GPT2Config.preset("mini") and model.dtype == torch.float32
    assert all(p.is_contiguous() and p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------ the exercises

@pytest.fixture(scope="module")
def names():
    """What the checks of lesson 03 look at; its own helpers come from its cells."""
    cells = json.loads((ROOT / "nbs" / "03_gpt2.ipynb").read_text(encoding="utf-8"))["cells"]
    code = {cell["id"]: "".join(cell["source"]) for cell in cells}
    space = vars(gpt2) | dict(nano=GPT2Config.preset("nano", block_size=32))
    for name in ("peerblock", "firstloss"):
        exec(code[name], space)
    torch.manual_seed(0)
    return space | dict(causal=torch.nn.Transformer.generate_square_subsequent_mask(5))


@pytest.mark.parametrize("number, empty, check, solution", exercises("03"), ids=lambda v: v if len(v) == 4 else "")
def test_exercise(number, empty, check, solution, names, capsys):
    assert said(empty, check, names, capsys) == "not solved yet"
    assert said(solution, check, names, capsys) == "correct"


def glu(forward: str, bias: bool = False, width: str = "width") -> str:
    return ("class SwiGLU(nn.Module):\n    def __init__(self, C, width):\n        super().__init__()\n"
            f"        self.gate, self.up = (nn.Linear(C, {width}, bias={bias}) for _ in range(2))\n"
            f"        self.c_proj = nn.Linear({width}, C, bias={bias})\n    def forward(self, x): return {forward}")


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def llama_block(C, H, G, W): return C * (H + 2 * G) * C // H + C * C + 3 * C * W", "the two norms are missing"),
    (1, "def llama_block(C, H, G, W): return 4 * C * C + 3 * C * W + 2 * C", "you have 194816"),
    (2, glu("self.c_proj(F.gelu(self.gate(x)) * self.up(x))"), "the numbers differ"),
    (2, glu("self.c_proj(F.silu(self.up(x)) * self.gate(x))"), "the numbers differ"),
    (2, glu("self.c_proj(F.silu(self.gate(x)) * self.up(x))", bias=True), "gate.bias"),
    (2, glu("self.c_proj(F.silu(self.gate(x)) * self.up(x))", width="4 * C"), "(512, 128)"),
    (3, "class PostNormBlock(Block): pass", "still pre-norm"),
    (3, "class PostNormBlock(Block):\n    def forward(self, x, mask=None, cache=None):\n"
        "        return self.ln_2(x + self.mlp(x))", "the numbers differ"),
])
def test_a_wrong_solution_is_told_why(number, wrong, words, names, capsys):
    assert words in said(wrong, exercises("03")[number - 1][2], names, capsys)
