"""Models written as GGUF: read again by us, and by llama.cpp where node-llama-cpp is installed."""
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minigpt import ChatRenderer, GPT2, GPT2Config, LoraConfig, apply_lora, generate
from minigpt.engine.cli import app
from minigpt.engine.export import save_gguf
from minigpt.engine.gguf import GGUF, quantize, dequantize
from minigpt.engine.hub import load_pair
from minigpt.engine.tokenizer import Tokenizer
from minigpt.llama import Llama, LlamaConfig, rope_speeds

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
SMALL = dict(vocab_size=20000, block_size=64, n_layer=2, n_head=4, n_embd=64, bos_token_id=0, eos_token_id=0)
SHAPES = {"gpt2": {}, "llama": dict(n_kv_head=2), "llama own head": dict(tie_word_embeddings=False, head_dim=32),
          "llama llama3": dict(rope_scaling=LLAMA3), "llama linear": dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
          "qwen2": dict(qkv_bias=True, n_kv_head=1), "qwen3": dict(qk_norm=True, head_dim=32)}
ASK = [{"role": "user", "content": "What is a whale?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained()


def random_model(name: str) -> GPT2:
    torch.manual_seed(0)
    kind = name.split()[0]
    model = GPT2(GPT2Config(**SMALL)) if kind == "gpt2" else Llama(LlamaConfig(**SMALL, n_inner=96, model_type=kind, **SHAPES[name]))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_what_is_written_is_read_again(name, tokenizer, tmp_path):
    model, ids = random_model(name), torch.randint(20000, (2, 40))
    save_gguf(model, tokenizer, tmp_path, "float32")
    again, theirs = load_pair(tmp_path / "model.gguf")
    torch.testing.assert_close(again(ids), model(ids), atol=1e-4 if "llama3" in name else 0, rtol=0)
    same = replace(again.config, layer_norm_epsilon=1e-5, **(
        {"rope_scaling": model.config.rope_scaling} if "llama3" in name else {}))
    assert same == model.config and again.config.layer_norm_epsilon == pytest.approx(1e-5)
    if "llama3" in name:
        torch.testing.assert_close(rope_speeds(again.config), rope_speeds(model.config))
    assert theirs.merges == tokenizer.merges and theirs.special_tokens == tokenizer.special_tokens
    assert ChatRenderer(theirs).render([*ASK, {"role": "assistant", "content": "A mammal."}]) == ChatRenderer(
        tokenizer).render([*ASK, {"role": "assistant", "content": "A mammal."}])


def test_names_and_kinds_are_those_of_llama_cpp(tokenizer, tmp_path):
    """Against the table in the package of llama.cpp's authors."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    for name, arch in (("gpt2", "GPT2"), ("llama", "LLAMA"), ("qwen2", "QWEN2"), ("qwen3", "QWEN3")):
        save_gguf(random_model(name), tokenizer, tmp_path / name, "q8_0")
        read, kind = gguf.GGUFReader(tmp_path / name / "model.gguf"), gguf.MODEL_ARCH[arch]
        known = {gguf.TENSOR_NAMES[part].format(bid=n) for part in gguf.MODEL_TENSORS[kind] for n in range(2)}
        for tensor in read.tensors:
            assert tensor.name.rpartition(".")[0] in known
            wide = len(tensor.shape) == 2 and not tensor.name.startswith("position")
            assert tensor.tensor_type.name == ("Q8_0" if wide else "F32")
        keys = gguf.Keys
        fields = {value.replace("{arch}", name)
                  for part in (keys.General, keys.LLM, keys.Attention, keys.Rope, keys.Tokenizer)
                  for value in vars(part).values() if isinstance(value, str)}
        assert {field for field in read.fields if not field.startswith("GGUF.")} <= fields


@torch.no_grad()
def test_rounded_matrices_and_a_table_that_is_longer(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SMALL | {"vocab_size": 20010}, n_inner=48)).eval()
    save_gguf(model, tokenizer, tmp_path, "q8_0")
    file = GGUF(tmp_path / "model.gguf")
    rows = model.blocks[0].mlp.up_proj.weight.numpy()
    want = dequantize(quantize(rows, "Q8_0"), "Q8_0").reshape(rows.shape)
    assert (file.tensor("blk.0.ffn_up.weight") == want).all()
    assert file.tensors["blk.0.ffn_down.weight"].kind == "F16"                     # 48 is no multiple of 32
    assert file.metadata["tokenizer.ggml.tokens"][-1] == "[PAD20009]"
    assert list(file.metadata["tokenizer.ggml.token_type"][-11:]) == [1] + 10 * [5]
    assert load_pair(tmp_path / "model.gguf")[0].config.vocab_size == 20010


@torch.no_grad()
def test_a_lora_layer_is_written_as_the_matrix_that_it_stands_for(tokenizer, tmp_path):
    model, ids = apply_lora(random_model("gpt2"), LoraConfig(r=2)).eval(), torch.randint(20000, (1, 9))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.normal_()
    save_gguf(model, tokenizer, tmp_path, "float32")
    torch.testing.assert_close(GPT2.from_pretrained(tmp_path / "model.gguf")(ids), model(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, change, said", [
    ("gpt2", {"activation": "gelu"}, "activation='gelu'"), ("llama", {"sliding_window": 9}, "sliding_window=9"),
    ("qwen2", {"rope_scaling": LLAMA3}, "rope_scaling='llama3'")])
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, change, said, tokenizer, tmp_path):
    model = random_model(name)
    model.config = replace(model.config, **change)
    with pytest.raises(ValueError, match=said):
        save_gguf(model, tokenizer, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_unknown_kind_and_files_that_are_there(tokenizer, tmp_path):
    model = random_model("gpt2")
    with pytest.raises(ValueError, match="unknown dtype 'int8'.*q8_0"):
        save_gguf(model, tokenizer, tmp_path, "int8")
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(FileExistsError):
        save_gguf(model, tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["Modelfile"]
    assert (tmp_path / "Modelfile").read_text() == "mine"
    save_gguf(model, tokenizer, tmp_path, overwrite=True)
    assert "FROM ./model.gguf" in (tmp_path / "Modelfile").read_text()


def test_a_head_stored_twice_is_read_and_another_head_refused(tokenizer, tmp_path):
    from minigpt.engine.gguf import write_gguf
    model = random_model("gpt2")
    save_gguf(model, tokenizer, tmp_path, "float32")
    file = GGUF(tmp_path / "model.gguf")
    tensors = {name: (file.tensor(name), "F32") for name in file.tensors}
    for head, ok in ((tensors["token_embd.weight"][0], True), (tensors["token_embd.weight"][0] + 1, False)):
        write_gguf(tmp_path / "b.gguf", file.metadata, tensors | {"output.weight": (head, "F32")}, overwrite=True)
        if ok:
            assert torch.equal(GPT2.from_pretrained(tmp_path / "b.gguf").wte.weight, model.wte.weight)
        else:
            with pytest.raises(ValueError, match="output head of its own"):
                GPT2.from_pretrained(tmp_path / "b.gguf")


# ------------------------------------------------------------------ the Modelfile

def modelfile_of(template: str | None, tokenizer, folder: Path) -> str:
    other = tokenizer if template is None else Tokenizer(
        tokenizer.token_bytes, tokenizer.merges, tokenizer.special_tokens, "gpt2", {"chat_template": template})
    save_gguf(random_model("gpt2"), other, folder, overwrite=True)
    return (folder / "Modelfile").read_text()


CHATML = ("{% for message in messages %}DEFAULT{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
          "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
KIND = ("{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}")


def test_templates_that_ollama_is_given(tokenizer, tmp_path):
    ours = modelfile_of(None, tokenizer, tmp_path)
    assert 'TEMPLATE """<|endoftext|>' in ours and 'PARAMETER stop "<|im_end|>"' in ours and "num_ctx 64" in ours
    plain = modelfile_of(CHATML.replace("DEFAULT", ""), tokenizer, tmp_path)
    assert "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>" in plain and "SYSTEM" not in plain
    kind = modelfile_of(CHATML.replace("DEFAULT", KIND), tokenizer, tmp_path)
    assert plain.replace("PARAMETER stop", 'SYSTEM """Be kind."""\nPARAMETER stop', 1) == kind
    assert "TEMPLATE" not in modelfile_of("{% for m in messages %}{{ m.content }}{% endfor %}", tokenizer, tmp_path)


# ------------------------------------------------------------------ the command, and llama.cpp itself

def test_the_command(tmp_path, capsys):
    app(["export", str(tmp_path / "x"), "--gguf", "--dtype", "q8_0"], standalone_mode=False)
    assert "saved in" in capsys.readouterr().out
    assert GGUF(tmp_path / "x/model.gguf").tensors["token_embd.weight"].kind == "Q8_0"
    with pytest.raises(FileExistsError, match="model.gguf"):
        app(["export", str(tmp_path / "x"), "--gguf"], standalone_mode=False)


LLAMA_CPP = """
import {getLlama} from "node-llama-cpp";
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath: process.argv[2]});
const context = await model.createContext({contextSize: 128, threads: 1}), found = [];
for (const text of JSON.parse(process.argv[3])) {
  const sequence = context.getSequence(), ids = model.tokenize(text, true), answer = [];
  for await (const token of sequence.evaluate(ids, {temperature: 0})) {
    if (model.isEogToken(token) || answer.length >= 30) break;
    answer.push(token);
  }
  sequence.dispose();
  found.push([ids, answer]);
}
console.log("FOUND" + JSON.stringify(found));
process.exit(0);
"""


def llama_cpp(path: Path, texts: list[str], folder: Path) -> list:
    """The ids of texts, and what llama.cpp writes after them."""
    where = os.environ.get("NODE_LLAMA_CPP")                   # the folder in which `npm i node-llama-cpp` was called
    if not where or not shutil.which("node") or not (Path(where) / "node_modules/node-llama-cpp").is_dir():
        pytest.skip("NODE_LLAMA_CPP names no folder with `npm i node-llama-cpp`")
    (folder / "node_modules").symlink_to(Path(where).resolve() / "node_modules")
    (folder / "ask.mjs").write_text(LLAMA_CPP)
    done = subprocess.run(["node", "ask.mjs", str(path.resolve()), json.dumps(texts)], cwd=folder, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.rpartition("FOUND")[2])


def greedy(model, ids: list[int], stop: set[int]) -> list[int]:
    out = generate(model, ids, temperature=0, max_new_tokens=30).ids
    return out[:next((n for n, i in enumerate(out) if i in stop), 30)]


QUESTIONS = ["What is a whale?", "Tell me a story about a cat.", "Is the sun hot?", "It's 2024, naïve café\n\n  日本"]


@pytest.mark.parametrize("name, dtype", [("minigpt-chat", "float32"), ("minigpt-chat", "float16"), ("smollm2", "float32")])
def test_llama_cpp_writes_the_same_text(name, dtype, tmp_path):
    try:
        model, tokenizer = load_pair(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    renderer = ChatRenderer(tokenizer)
    prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in QUESTIONS]
    save_gguf(model, tokenizer, tmp_path / "out", dtype)
    found = llama_cpp(tmp_path / "out/model.gguf", [tokenizer.decode(ids) for ids in prompts], tmp_path)
    assert [ids for ids, _ in found] == prompts
    assert [ids for _, ids in found] == [greedy(model, ids, renderer.stop_ids) for ids in prompts]


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama llama3", "llama own head"])
def test_llama_cpp_opens_other_shapes(name, tokenizer, tmp_path):
    """Random weights: the likeliest token stands out only by chance, so the first one is asked for."""
    model = random_model(name)
    save_gguf(model, tokenizer, tmp_path / "out", "float32")
    [(ids, answer)] = llama_cpp(tmp_path / "out/model.gguf", ["It is the same model."], tmp_path)
    assert ids == tokenizer.encode_ordinary("It is the same model.")
    assert answer[:1] == generate(model, ids, temperature=0, max_new_tokens=1).ids
