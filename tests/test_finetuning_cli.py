"""`minigpt finetune`: every reader of chapter 01, pairs, resume, errors in one line and with exit code 2."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import minigpt
from safetensors.torch import load_file

from minigpt.engine.adapters import adapted
from minigpt.engine.tokenizer import Tokenizer
from minigpt.engine.dataset_readers import load_chats
from minigpt.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--quiet", "--text", "", "--too-long", "cut", "--set", "max_steps=2", "--set", "batch_size=2"]


def run(*arguments, code=0):
    """The command within this process; what a terminal would show, or the line of its error."""
    return minigpt("finetune", *arguments, code=code)[0 if code == 0 else 1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([m["content"] for c in load_chats("chats", limit=200) for m in c["messages"]], 400,
                                   ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], progress=False)
    folder = tmp_path_factory.mktemp("models") / "base"
    GPT2(GPT2Config(vocab_size=400, block_size=192, n_layer=1, n_head=2, n_embd=16, bos_token_id=0, eos_token_id=0)
         ).save_pretrained(folder, tokenizer)
    return folder


def rows(n=12):
    return [[f"Is {i} a number?", f"Yes, {i} is a number."] for i in range(n)]


def written(folder: Path, layout: str) -> str:
    """Conversations on disk in one of the layouts that chapter 01 reads."""
    folder.mkdir()
    if layout == "hub":                                               # a dataset's repository, laid out as on the hub
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data.jsonl\n---\n")
        (folder / "data.jsonl").write_text("".join(json.dumps({"messages": [
            {"role": "user", "content": a}, {"role": "assistant", "content": b}]}) + "\n" for a, b in rows()))
        return str(folder)
    if layout == "csv":
        path = folder / "a.csv"
        path.write_text("instruction,output\n" + "".join(f'"{a}","{b}"\n' for a, b in rows()))
        return str(path)
    made = {"pairs.jsonl": "".join(json.dumps(["kind", [a, b]]) + "\n" for a, b in rows()),
            "alpaca.json": json.dumps([{"instruction": a, "output": b} for a, b in rows()]),
            "sharegpt.jsonl": "".join(json.dumps({"conversations": [
                {"from": "human", "value": a}, {"from": "gpt", "value": b}]}) + "\n" for a, b in rows())}
    if layout == "folder":
        for name, text in made.items():
            (folder / name).write_text(text)
        return str(folder)
    (folder / layout).write_text(made[layout])
    return str(folder / layout)


@pytest.mark.parametrize("layout", ["pairs.jsonl", "alpaca.json", "sharegpt.jsonl", "csv", "folder", "hub"])
def test_every_reader(base, tmp_path, layout):
    said = run(base, "--data", written(tmp_path / "data", layout), "--out", tmp_path / "run", *FAST)
    assert said.splitlines()[-1] == f"saved in {tmp_path / 'run' / 'model'}"
    assert GPT2.from_pretrained(tmp_path / "run" / "model").config.vocab_size == 400


def test_a_folder_called_stories_is_not_the_default_text(base, tmp_path, monkeypatch):
    data = written(tmp_path / "data", "pairs.jsonl")
    options = ["--data", data, "--quiet", "--too-long", "cut", "--set", "max_steps=1"]
    usual = run(base, *options, "--out", tmp_path / "usual")
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "cover.svg").write_text("<svg/>", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    again = run(base, *options, "--out", tmp_path / "again")
    assert "text_perplexity" in usual and again == usual.replace("usual", "again")


def test_it_learns_measures_and_can_be_chatted_with(base, tmp_path):
    said = run(base, "--data", written(tmp_path / "data", "pairs.jsonl"), "--held", written(tmp_path / "held", "alpaca.json"),
               "--out", tmp_path / "run", "--quiet", "--set", "max_steps=120", "--set", "lr=0.02", "--set", "batch_size=2")
    table = {line.split()[0]: line.split()[1:] for line in said.splitlines()}
    assert set(table) >= {"answers_perplexity", "first_guesses", "stops", "text_perplexity"}
    before, after = map(float, table["answers_perplexity"])
    assert after < 4 < 300 < before
    assert table["stops"] == ["0.000", "1.000"]
    before, after = map(float, table["text_perplexity"])
    assert after > before                                             # it forgot, and says so
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "minigpt", "chat", "--model", str(tmp_path / "run" / "model"),
                           "--temperature", "0", "Is 7 a number?"], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("Yes,") and done.stdout.strip().endswith("is a number.")


def test_where_nothing_is_measured_one_line_says_how_it_went(base, tmp_path):
    (tmp_path / "few.jsonl").write_text(json.dumps(["talk", rows(1)[0]]) + "\n", encoding="utf-8")
    said = run(base, "--data", tmp_path / "few.jsonl", "--out", tmp_path / "run", *FAST)
    first, last = said.splitlines()
    assert first.startswith("FinetuneResult(step 2, loss ") and last == f"saved in {tmp_path / 'run' / 'model'}"


def test_a_folder_with_a_model_or_a_file_is_refused_truly(base, tmp_path):
    data = written(tmp_path / "data", "pairs.jsonl")
    (tmp_path / "file").touch()
    (tmp_path / "other" / "model").mkdir(parents=True)
    assert "is a file" in run(base, "--data", data, "--out", tmp_path / "file", code=2)
    said = run(base, "--data", data, "--out", tmp_path / "other", code=2)
    assert "holds a model already" in said and "another folder" in said and "--resume" in said


def test_pairs_and_resume(base, tmp_path):
    steps = ["--set", "batch_size=4", "--set", "lr=0.001"]
    said = run(base, "--pairs", "preferences", "--limit", 12, "--out", tmp_path / "run", "--quiet", *steps,
               "--set", "max_steps=3")
    assert "prefers" in said and (tmp_path / "run" / "model").is_dir()
    again = run(base, "--pairs", "preferences", "--out", tmp_path / "run", "--quiet", code=2)
    assert "holds a model already" in again and "--resume" in again
    changed = run(base, "--pairs", "preferences", "--limit", 12, "--out", tmp_path / "run", "--quiet", *steps,
                  "--set", "max_steps=5", "--resume", code=2)
    assert "max_steps: 3 then, 5 now" in changed


@pytest.mark.parametrize("nf4", [False, True], ids=["", "nf4"])
def test_an_adapter_is_made_and_chatted_with(base, tmp_path, nf4):
    """The adapter alone is saved; on the model as it is, it gives the tuned answers (on NF4's weights it was trained on)."""
    said = run(base, "--data", written(tmp_path / "data", "pairs.jsonl"), "--lora", "r=4", "--lora", "target_modules=c_attn,c_fc",
               *["--nf4"] * nf4, "--out", tmp_path / "run", "--quiet", "--text", "", "--set", "max_steps=40", "--set", "lr=0.03",
               "--set", "batch_size=4")
    assert said.splitlines()[-1] == f"saved in {tmp_path / 'run' / 'adapter'}"
    assert not (tmp_path / "run" / "model").exists()
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"], config["base_model_name_or_path"]) == (4, ["c_attn", "c_fc"], str(base))
    merged = adapted(GPT2.from_pretrained(base), tmp_path / "run" / "adapter")
    merged.save_pretrained(tmp_path / "merged", Tokenizer.from_pretrained(base))
    asked = ["--temperature", 0, "--max-new-tokens", 12, "Is 7 a number?"]
    plain, tuned = (minigpt("chat", "--model", model, *asked)[0] for model in (base, tmp_path / "merged"))
    assert minigpt("chat", "--model", base, "--adapter", tmp_path / "run" / "adapter", *asked)[0] == tuned != plain
    again = run(base, "--data", "chats", "--lora", "r=4", "--out", tmp_path / "run", *FAST, code=2)
    assert "holds a model already" in again and "adapter" in again


def test_an_adapter_is_resumed_and_learns_preferences(base, tmp_path):
    steps = ["--pairs", "preferences", "--limit", 12, "--quiet", "--lora", "r=2", "--set", "batch_size=4"]
    run(base, *steps, "--out", tmp_path / "whole", "--set", "max_steps=4", "--set", "save_every=2")
    run(base, *steps, "--out", tmp_path / "cut", "--set", "max_steps=4", "--set", "save_every=2")
    for folder in [tmp_path / "cut" / "adapter", tmp_path / "cut" / "step-00000004"]:
        shutil.rmtree(folder)
    run(base, *steps, "--out", tmp_path / "cut", "--set", "max_steps=4", "--set", "save_every=2", "--resume")
    whole, cut = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert any(tensor.any() for key, tensor in whole.items() if "lora_B" in key)
    assert all(torch.equal(tensor, cut[key]) for key, tensor in whole.items())


@pytest.mark.parametrize("arguments, words", [
    (["--nf4"], "such as --lora r=8"), (["--lora", "r=0"], "r=0"), (["--lora", "r"], "such as --lora r=8"),
    (["--lora", "rank=8"], "'rank' is no field of LoraConfig; there are: r, lora_alpha"),
    (["--lora", "target_modules=q_proj"], "'q_proj'"), (["--lora", "bias=all"], "'bias' is no field"),
    (["--lora", "lora_alpha=abc"], "lora_alpha=abc: expected a number"), (["--lora", "lora_dropout=null"], "lora_dropout=None"),
    (["--lora", "target_modules=5"], "target_modules=5: expected names"),
    (["--lora", "r=8", "--add-chat-tokens"], "an adapter can't hold")])
def test_bad_adapters(base, tmp_path, arguments, words):
    assert words in run(base, "--data", "chats", "--out", tmp_path / "run", *FAST, *arguments, code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, words", [
    ([], "either --data"), (["--data", "chats", "--pairs", "preferences"], "either --data"),
    (["--data", "no-such-file.jsonl"], "no such file"), (["--data", "chats"], "tokens, the model reads 192"), (["--data", "chats"], "--too-long cut"),
    (["--data", "chats", "--too-long", "drop", "--set", "betas=5"], "betas=5"),
    (["--data", "chats", "--too-long", "drop", "--set", "seed=-1"], "seed=-1"),
    *((["--data", "chats", "--set", wrong], wrong.partition("=")[0] + "=") for wrong in (
        "batch_size=0", "batch_size=abc", "max_steps=abc", "block_size=abc")),
    (["--pairs", "preferences", "--set", "block_size=abc"], "block_size='abc'"),
    (["--data", "chats", "--too-long", "maybe"], "too_long='maybe'"), (["--data", "chats", "--set", "lr"], "name=value"),
    (["--data", "chats", "--too-long", "drop", "--set", "speed=3"], "speed")])
def test_bad_input(base, tmp_path, arguments, words):
    assert words in run(base, "--out", tmp_path / "run", *arguments, code=2)
    assert not (tmp_path / "run").exists()


def test_gpt2s_tokenizer_needs_the_flag(tmp_path):
    tokenizer = Tokenizer.from_pretrained("gpt2")
    GPT2(GPT2Config(block_size=64, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path / "gpt2", tokenizer)
    data = written(tmp_path / "data", "alpaca.json")
    said = run(tmp_path / "gpt2", "--data", data, "--out", tmp_path / "run", *FAST, code=2)
    assert "<|im_start|>" in said and "add_chat_tokens" in said
    run(tmp_path / "gpt2", "--data", data, "--out", tmp_path / "run", *FAST, "--add-chat-tokens")
    assert GPT2.from_pretrained(tmp_path / "run" / "model").config.vocab_size == 50259


def test_errors_are_one_line_with_code_2(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "minigpt", "finetune", str(tmp_path / "nothing"), "--data", "chats"],
                          capture_output=True, text=True, env=env, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("minigpt: unknown model") and done.stderr.count("\n") == 1
