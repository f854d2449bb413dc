"""The model against transformers: logits, folders both ways, the cache, the int8 asset, bad input."""
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from minigpt.engine.tokenizer import Tokenizer
from minigpt.deeper.hooks import trace
from minigpt.engine.files import ASSETS
from minigpt.engine.hub import save_int8
from minigpt.engine.weights import dequantize_rows, quantize_rows
from minigpt.engine.cache import KVCache
from minigpt.gpt2 import GPT2, GPT2Config

transformers = pytest.importorskip("transformers", reason="the peer is part of the dev extra")
CHAT = ASSETS / "minigpt-chat"
SIZES = {"gpt2": (768, 12), "gpt2-medium": (1024, 16), "gpt2-large": (1280, 20), "gpt2-xl": (1600, 25)}


def their_model(width: int, heads: int, layers: int = 2, vocab: int = 1000, positions: int = 128, **more):
    config = transformers.GPT2Config(vocab_size=vocab, n_positions=positions, n_embd=width, n_head=heads,
                                     n_layer=layers, bos_token_id=0, eos_token_id=0, **more)
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():                      # not the tame initial weights: every tensor random, biases too
        for name, p in model.named_parameters():
            spread = 0.1 if p.dim() < 2 else 0.05
            p.add_(torch.randn(p.shape, generator=generator) * spread)
    return model


def ids_of(vocab: int, batch: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def shipped() -> GPT2:
    return GPT2.from_pretrained(device="cpu")


@pytest.mark.parametrize("name", SIZES)
def test_logits_equal_transformers(name, tmp_path, ledger):
    width, heads = SIZES[name]
    theirs = their_model(width, heads, layers=12 if name == "gpt2" else 2)
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path, device="cpu")
    assert (ours.config.n_embd, ours.config.n_head) == (width, heads)
    preset = GPT2Config.preset(name)
    assert (preset.n_embd, preset.n_head) == (width, heads)
    ids = ids_of(1000)
    with torch.no_grad():
        difference = (ours(ids) - theirs(ids).logits).abs().max().item()
    ledger(f"logits at the width of {name}", difference, peer="transformers", bound=1e-4)
    assert difference <= 1e-4


def test_exact_gelu_is_kept_apart_from_tanh(tmp_path):
    theirs = their_model(64, 4, activation_function="gelu")
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path, device="cpu")
    ids = ids_of(1000)
    with torch.no_grad():
        exact = theirs(ids).logits
        assert torch.allclose(ours(ids), exact, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_function": "gelu_new"}), encoding="utf-8")
    with torch.no_grad():
        assert (GPT2.from_pretrained(tmp_path, device="cpu")(ids) - exact).abs().max() > 1e-5


def test_our_folder_opens_in_transformers(tmp_path, shipped, ledger):
    tokenizer = Tokenizer.from_pretrained()
    shipped.save_pretrained(tmp_path / "out", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    text = "Tell me a short story about a fox and a kite."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        difference = (shipped(ids) - theirs(ids).logits).abs().max().item()
    ledger("logits of the shipped model, exported", difference, peer="transformers", bound=1e-4)
    assert difference <= 1e-4
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert their_tokenizer(text)["input_ids"] == ids[0].tolist()
    assert their_tokenizer.decode(ids[0]) == text
    again = GPT2.from_pretrained(tmp_path / "out", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(shipped.state_dict().values(), again.state_dict().values()))


def test_the_int8_folder_is_refused_by_transformers_and_opened_here(tmp_path, shipped):
    save_int8(shipped, tmp_path / "small")
    for folder in (CHAT, tmp_path / "small"):
        with pytest.raises(ValueError, match="minigpt_int8"):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
    again = GPT2.from_pretrained(tmp_path / "small", device="cpu")
    ids = ids_of(20000, 1, 10)
    with torch.no_grad():
        assert torch.allclose(again(ids), shipped(ids), atol=0.05)


def test_an_exported_folder_says_how_the_session_draws(tmp_path, shipped):
    from minigpt.chat import ChatSession
    tokenizer = Tokenizer.from_pretrained()
    shipped.save_pretrained(tmp_path / "out", tokenizer)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    session = ChatSession(shipped, tokenizer)
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(theirs, name) == getattr(session, name), name
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == shipped.config.block_size
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and front["language"] == "en"


def test_generate_of_transformers_draws_as_the_session_does(tmp_path, shipped):
    """Told nothing of how to draw, it draws from our logits under the session's settings, worked out here by hand."""
    from minigpt.chat import ChatSession
    tokenizer = Tokenizer.from_pretrained()
    shipped.save_pretrained(tmp_path / "out", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    asked = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": "What is a whale?"}], add_generation_prompt=True,
        return_tensors="pt", return_dict=True)
    torch.manual_seed(0)
    drawn = theirs.generate(**asked, max_new_tokens=6, return_dict_in_generate=True, output_scores=True)
    session, length = ChatSession(shipped, tokenizer), asked["input_ids"].shape[1]
    for n, (scores,) in enumerate(drawn.scores):
        ids = drawn.sequences[0, :length + n]
        with torch.no_grad():
            logits = shipped(ids[None])[0, -1]
        for i in set(ids.tolist()):            # transformers' penalty counts the prompt's tokens too
            logits[i] *= session.repetition_penalty ** (1 if logits[i] < 0 else -1)
        best = (logits / session.temperature).topk(session.top_k)
        above = best.values.softmax(0).cumsum(0) - best.values.softmax(0)
        kept = best.indices[above < session.top_p]
        assert scores.isfinite().nonzero().flatten().tolist() == sorted(kept.tolist())
        assert torch.allclose(scores[kept], best.values[:len(kept)], atol=1e-3)
    ends = {tokenizer.special_tokens[name] for name in ("<|endoftext|>", "<|im_end|>")}
    assert set(theirs.generation_config.eos_token_id) == ends


@pytest.mark.parametrize("layout", ["sharded", "no prefix"])
def test_other_layouts_of_the_hub(tmp_path, layout):
    from safetensors.torch import load_file, save_file
    theirs = their_model(64, 4)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if layout == "sharded" else "5GB")
    if layout == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    else:
        weights = load_file(tmp_path / "model.safetensors")
        save_file({k.removeprefix("transformer."): v for k, v in weights.items()}, tmp_path / "model.safetensors")
    ids = ids_of(1000)
    with torch.no_grad():
        assert torch.allclose(GPT2.from_pretrained(tmp_path, device="cpu")(ids), theirs(ids).logits, atol=1e-5)


@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (7, 1, 20, 12)])
def test_cache_equals_no_cache(shipped, pieces, ledger):
    ids = ids_of(20000)
    cache = KVCache(shipped.config, 2, 64)
    with torch.inference_mode():
        whole = shipped(ids)
        parts = [shipped(part, cache) for part in ids.split(pieces, dim=1)]
    difference = (torch.cat(parts, 1) - whole).abs().max().item()
    ledger(f"KV cache in {len(pieces)} pieces", difference, bound=1e-4)
    assert difference <= 1e-4


def test_unequal_prompts_equal_one_by_one(shipped, ledger):
    lengths = [3, 17, 9]
    prompts = [ids_of(20000, 1, n, seed=n)[0] for n in lengths]
    more = ids_of(20000, 3, 6, seed=99)
    pad = torch.tensor([max(lengths) - n for n in lengths])
    left = torch.stack([torch.cat([torch.zeros(p, dtype=torch.long), ids]) for p, ids in zip(pad.tolist(), prompts)])
    worst = 0.0
    with torch.inference_mode():
        cache = KVCache(shipped.config, 3, 64, pad=pad)
        last = [shipped(left, cache)[:, -1]] + [shipped(more[:, i:i + 1], cache)[:, -1] for i in range(6)]
        for row, ids in enumerate(prompts):
            alone = shipped(torch.cat([ids, more[row]])[None])[0, len(ids) - 1:]
            worst = max(worst, (torch.stack([x[row] for x in last]) - alone).abs().max().item())
    ledger("batch of unequal prompts against one by one", worst, bound=1e-4)
    assert worst <= 1e-4


def test_int8_rows_are_within_half_a_step():
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    steps, scale = quantize_rows(weight)
    assert steps.dtype == torch.int8 and scale.dtype == torch.float16
    error = (dequantize_rows(steps, scale) - weight).abs()
    # half a step, and what rounding the scale to 16 bits moves the largest entries
    assert (error <= scale.float()[:, None] * 0.5 + weight.abs() * 2 ** -10 + 1e-7).all()


def test_int8_loses_at_most_half_a_percent(shipped, ledger):
    """The loss of the shipped weights on the bundled held-out rows against the bf16 weights' (eval.json)."""
    from minigpt.chat_format import ChatRenderer
    from minigpt.engine.dataset_readers import load_chats
    report = json.loads((CHAT / "eval.json").read_text(encoding="utf-8"))
    renderer, total, counted = ChatRenderer(Tokenizer.from_pretrained()), 0.0, 0
    for chat in load_chats("held")[:120]:
        row = renderer.render(chat["messages"])
        ids, mask = torch.tensor([row.ids]), torch.tensor(row.mask[1:], dtype=torch.bool)
        with torch.inference_mode():
            log = shipped(ids)[0, :-1].log_softmax(-1)
        total -= log.gather(1, ids[0, 1:, None])[:, 0][mask].sum().item()
        counted += int(mask.sum())
    expected = report["sample_120"]
    assert counted == expected["bf16"]["assistant_tokens"]
    loss = total / counted
    assert loss == pytest.approx(expected["int8"]["loss_assistant"], rel=1e-4)
    share = abs(loss / expected["bf16"]["loss_assistant"] - 1)
    ledger("loss of the int8 weights against bf16", share, bound=0.005)
    assert share <= 0.005
    for part in report.values():
        assert abs(part["int8"]["loss_assistant"] / part["bf16"]["loss_assistant"] - 1) <= 0.005


def broken(tmp_path: Path, **files) -> Path:
    folder = tmp_path / "model"
    their_model(64, 4).save_pretrained(folder)
    for name, change in files.items():
        path = folder / name.replace("__", ".")
        change(path)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def larger_vocabulary(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"vocab_size": 1001}), encoding="utf-8")


@pytest.mark.parametrize("files, message", [
    ({"model__safetensors": Path.unlink}, "model.safetensors"),
    ({"model__safetensors": cut}, "model.safetensors"),
    ({"config__json": Path.unlink}, "config.json"),
    ({"config__json": larger_vocabulary}, "vocab"),
])
def test_broken_folders_are_named(tmp_path, files, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GPT2.from_pretrained(broken(tmp_path, **files), device="cpu")


def test_unknown_name_says_what_there_is(monkeypatch, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="no-such-model"):
        GPT2.from_pretrained("no-such-model")


def test_ids_and_positions_out_of_range(shipped):
    with pytest.raises(ValueError, match="20000"):
        shipped(torch.tensor([[1, 20000]]))
    with pytest.raises(ValueError, match="1024|1,024"):
        shipped(torch.zeros(1, 1025, dtype=torch.long))
    cache = KVCache(shipped.config, 1, 8)
    shipped(torch.zeros(1, 8, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="8"):
        shipped(torch.zeros(1, 1, dtype=torch.long), cache)


def test_saving_does_not_overwrite_unasked(tmp_path):
    model = GPT2(GPT2Config.preset("nano", n_layer=1, n_embd=32))
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(FileExistsError, match="overwrite"):
        model.save_pretrained(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")


def test_traced_tensors_belong_to_the_same_forward(shipped):
    ids = ids_of(20000, 1, 12)
    names = ["blocks.3.attn.pattern", "blocks.3.attn.v", "blocks.3.attn.z"]
    with torch.inference_mode():
        seen = trace(shipped, ids, names)
        logits = shipped(ids)
    pattern, v, z = (seen[name] for name in names)
    assert torch.allclose(pattern.sum(-1), torch.ones(1, 8, 12), atol=1e-5)
    assert torch.equal(pattern, pattern.tril())
    assert torch.allclose(pattern @ v, z, atol=1e-5)
