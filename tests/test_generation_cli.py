"""`minigpt generate` as a process of its own: prompts in, JSON lines out, errors in one line."""
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from command_line import minigpt

from minigpt.engine.tokenizer import Tokenizer
from minigpt.engine import generate_files
from minigpt.deeper.beam_search import beam_search
from minigpt.deeper.fast_decoding import Decoder
from minigpt.generation import Generation, generate
from minigpt.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, data=b"", code=0):
    """The command within this process, quick; output and error as a terminal would show them."""
    return minigpt("generate", *arguments, given=data, code=code)


def run_process(*arguments, data=b"", code=0):
    """The command as a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "minigpt", "generate", *map(str, arguments)], input=data, env=env,
                          capture_output=True, timeout=300)
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with the shipped tokenizer: quick to start, meaningless to read."""
    import torch
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained()
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1, n_head=2, n_embd=16,
                            bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        model.wte.weight.mul_(15)
    path = tmp_path_factory.mktemp("models") / "small"
    model.save_pretrained(path, tokenizer)
    return path


@pytest.fixture(scope="module")
def small(folder):
    return GPT2.from_pretrained(folder), Tokenizer.from_pretrained(folder)


def test_arguments_file_and_pipe_give_the_same(folder, small, tmp_path):
    model, tokenizer = small
    flags = ["--model", folder, "--seed", 3, "--max-new-tokens", 6, "--temperature", 0.8, "--top-k", 20]
    (tmp_path / "in.txt").write_text("One day\nDie Müllerin\n", encoding="utf-8")
    (tmp_path / "in.jsonl").write_text('{"prompt": "One day"}\n{"prompt": "Die Müllerin"}\n', encoding="utf-8")
    outs = [run("One day", "Die Müllerin", *flags)[0], run("--file", tmp_path / "in.txt", *flags)[0],
            run("--file", tmp_path / "in.jsonl", *flags, "--batch-size", 1)[0],
            run(*flags, data="One day\nDie Müllerin\n".encode())[0]]
    rows = [json.loads(line) for line in outs[0].splitlines()]
    same = [[json.loads(line) | {"logprob": 0} for line in out.splitlines()] for out in outs]
    assert same == same[:1] * 4 and [row["prompt"] for row in rows] == ["One day", "Die Müllerin"]
    for i, row in enumerate(rows):
        want = generate(model, tokenizer.encode_ordinary(row["prompt"]), seed=3 + i, max_new_tokens=6, temperature=0.8,
                        top_k=20, stop_ids=[0, 1, 2], decoder=Decoder(model))
        assert row["tokens"] == len(want.ids) and row["finish_reason"] == want.finish_reason
        assert row["text"] == tokenizer.decode(want.ids).rstrip("\ufffd")


def test_several_texts_to_a_file(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    run("One day", "--model", folder, "--num-return", 3, "--max-new-tokens", 4, "--out", out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3 and len({row["text"] for row in rows}) > 1
    before = out.read_bytes()
    _, errors = run("One day", "--model", folder, "--out", out, code=2)
    assert "--overwrite" in errors and out.read_bytes() == before


def test_a_bad_prompt_among_good_ones_writes_nothing(folder, tmp_path):
    out, flags = tmp_path / "out.jsonl", ["--model", folder, "--max-new-tokens", 4, "--batch-size", 1, "--out"]
    _, errors = run("One day", "word " * 80, *flags, out, code=2)
    assert "exceed the context of 64" in errors and not out.exists()
    out.write_text("old", encoding="utf-8")
    run("One day", "word " * 80, *flags, out, "--overwrite", code=2)
    run("One day", *flags, out, "--overwrite", "--guesses", 0, code=2)
    assert out.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["out.jsonl"]
    run("One day", *flags, out, "--overwrite")
    assert json.loads(out.read_text(encoding="utf-8"))["prompt"] == "One day" and os.listdir(tmp_path) == ["out.jsonl"]


def test_an_interrupted_overwrite_keeps_the_old_file(tmp_path):
    def interrupted():
        yield {"text": "first"}
        raise KeyboardInterrupt

    old, link = tmp_path / "old.txt", tmp_path / "link.txt"
    old.write_text("old", encoding="utf-8")
    try:
        link.symlink_to(old)
    except OSError:                                                   # Windows, without the right to make links
        link = old
    with pytest.raises(KeyboardInterrupt):
        generate_files.write_rows(interrupted(), link, True, overwrite=True)
    assert old.read_text(encoding="utf-8") == "old"
    assert (tmp_path / "old.txt.part").read_text(encoding="utf-8") == "first\n"
    generate_files.write_rows([{"text": "a"}, {"text": "b"}], link, True, overwrite=True)
    assert old.read_text(encoding="utf-8") == "a\nb\n" and (link == old or link.is_symlink())
    # what the interrupted run has left is not touched
    assert (tmp_path / "old.txt.part").read_text(encoding="utf-8") == "first\n"
    assert set(os.listdir(tmp_path)) == {link.name, "old.txt", "old.txt.part"}
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        generate_files.write_rows((1 / 0 for _ in range(1)), tmp_path / "nowhere" / "out.txt", True)


@pytest.mark.skipif(os.name == "nt", reason="modes and /dev/stdout are Unix's")
def test_overwriting_keeps_the_mode_and_a_pipe_is_written_to(folder, tmp_path):
    old = tmp_path / "old.txt"
    old.write_text("old", encoding="utf-8")
    old.chmod(0o600)
    generate_files.write_rows([{"text": "new"}], old, True, overwrite=True)
    assert old.read_text(encoding="utf-8") == "new\n" and old.stat().st_mode & 0o777 == 0o600
    done = subprocess.run([sys.executable, "-m", "minigpt", "generate", "One day", "--model", folder, "--max-new-tokens", "4",
                           "--out", "/dev/stdout", "--overwrite"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "One day"


def test_half_a_character_at_the_limit_is_no_stop():
    tokenizer = Tokenizer.from_pretrained()
    ids = tokenizer.encode("Yes 😀")
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    row = generate_files._as_row("?", Generation(ids[:-1], [-1.0] * 3, "length"), tokenizer, ["nothing"])
    assert row["text"] == "Yes " and row["finish_reason"] == "length"
    for stop, reason in ((["es"], "stop"), ([], "length")):
        assert generate_files._as_row("?", Generation(ids, [], "length"), tokenizer, stop)["finish_reason"] == reason
    assert generate_files._as_row("?", Generation(ids, [], "stop"), tokenizer, ["no"])["finish_reason"] == "stop"


def test_lines_of_prompts():
    odd = "One\u2028two\x0cthree\x85four"
    data = "\n".join(["", json.dumps({"prompt": odd}, ensure_ascii=False), "", '{"prompt": "five"}\r', ""])
    assert generate_files._split_prompts(data, "a.jsonl") == [odd, "five"]
    assert generate_files._split_prompts(odd + "\r\nfive\rsix\n", "the pipe") == [odd, "five", "six"]
    for bad in ('{"text": 1}', '{"prompt": 1}', "[1]", "{", "[" * 100_000):
        with pytest.raises(ValueError, match="a.jsonl, line 5: "):
            generate_files._split_prompts(data + bad, "a.jsonl")


def test_a_draft_goes_where_the_model_is(folder, small):
    from minigpt.generation import Options
    draft = generate_files._make_draft(str(folder), Options(), small[1], "meta")
    assert draft.decoder.model.device.type == "meta"


def test_every_strategy(folder, small):
    model, tokenizer = small
    flags = ["One day", "--model", folder, "--max-new-tokens", 6]
    ids = tokenizer.encode_ordinary("One day")
    beams = [json.loads(line) for line in run(*flags, "--num-beams", 3, "--num-return", 2)[0].splitlines()]
    want = beam_search(model, ids, num_beams=3, num_return=2, max_new_tokens=6, stop_ids=[0, 1, 2])
    assert [row["score"] for row in beams] == pytest.approx([text.score for text in want], abs=1e-4)
    greedy = json.loads(run(*flags, "--temperature", 0)[0])
    for more in (["--draft", "ngram", "--temperature", 0], ["--num-beams", 1, "--temperature", 0],
                 ["--draft", folder, "--temperature", 0]):
        assert json.loads(run(*flags, *more)[0])["text"] == greedy["text"]
    assert greedy["tokens"] == len(generate(model, ids, temperature=0, max_new_tokens=6, stop_ids=[0, 1, 2]).ids)
    plain, _ = run(*flags, "--format", "text", "--regex", "[a-z]{3} [0-9]{2}", "--max-new-tokens", 30)
    assert len(plain) == 7 and plain[:3].isalpha() and plain[4:6].isdigit() and plain[6] == "\n"
    early = [json.loads(run(*flags, "--num-beams", 3, "--early-stopping", how)[0])["score"] for how in ("no", "yes", "never")]
    for how, score in zip((False, True, "never"), early):
        [want] = beam_search(model, ids, num_beams=3, max_new_tokens=6, stop_ids=[0, 1, 2], early_stopping=how)
        assert score == pytest.approx(want.score, abs=1e-4)
    assert json.loads(run(*flags, "--draft", "ngram", "--temperature", 0, "--guesses", 1)[0])["text"] == greedy["text"]
    begun = json.loads(run(*flags, "--begin", "So it", "--ban", "went", "--no-repeat-ngram-size", 2, "--min-p", 0.01,
                           "--typical-p", 0.9, "--presence-penalty", 0.5, "--frequency-penalty", 0.5, "--top-p", 0.9,
                           "--repetition-penalty", 1.2, "--ignore-end", "--overflow", "slide", "--int8")[0])
    assert begun["text"].startswith("So it") and begun["tokens"] == 6


@pytest.mark.parametrize("least", [0, 5])
@pytest.mark.parametrize("case", ["ids and a text", "a text with its space", "the end"])
def test_biases_and_a_least_length_equal_transformers(folder, small, case, least):
    """Greedy texts of the command, and those of transformers with its own processors."""
    import torch
    transformers = pytest.importorskip("transformers")
    model, tokenizer = small
    ids, stop = tokenizer.encode_ordinary("One day"), [0, 1, 2]
    end, cat, spaced = tokenizer.encode("<|im_end|>cat cat", allowed_special="all")
    plain = generate(model, ids, temperature=0, max_new_tokens=12, stop_ids=stop).ids
    flags, bias = {
        "ids and a text": ([f"{plain[0]}=-100", f"{plain[1]}=-1.5", "cat=+4"], {plain[0]: -100, plain[1]: -1.5, cat: 4, spaced: 4}),
        "a text with its space": ([" cat=.5", " cat=60"], {spaced: 60}), "the end": (["<|im_end|>=60"], {end: 60})}[case]
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    rules = [transformers.SequenceBiasLogitsProcessor({(i,): float(value) for i, value in bias.items()}),
             transformers.MinNewTokensLengthLogitsProcessor(len(ids), least, stop, device="cpu")]
    x = torch.tensor([ids])
    out = hf.generate(x, attention_mask=torch.ones_like(x), logits_processor=transformers.LogitsProcessorList(rules), do_sample=False,
                      max_new_tokens=12, eos_token_id=stop, pad_token_id=0, repetition_penalty=1.0)[0, len(ids):].tolist()
    want = out[:-1] if out[-1] in stop else out
    row = json.loads(run("One day", "--model", folder, "--max-new-tokens", 12, "--temperature", 0, "--min-new-tokens", least,
                         *(word for flag in flags for word in ("--logit-bias", flag)))[0])
    assert (row["tokens"], row["text"]) == (len(want), tokenizer.decode(want).rstrip("\ufffd")) and want != plain
    assert case != "the end" or len(want) == least and row["finish_reason"] == "stop"


@pytest.mark.parametrize("strategy", [["--num-beams", 2], ["--draft", "ngram"], ["--temperature", 2, "--seed", 1]])
def test_a_least_length_in_every_strategy(folder, strategy):
    row = json.loads(run("One day", "--model", folder, "--max-new-tokens", 12, "--min-new-tokens", 5, "--logit-bias", "<|im_end|>=60",
                         *strategy)[0])
    assert row["tokens"] == 5 and row["finish_reason"] == "stop"


def test_json_by_a_schema_and_choices(folder, tmp_path):
    """Several texts of a model that says anything, in little room; each ends and is valid."""
    schema = {"type": "object", "required": ["name", "tags"], "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["é", "cat"]}, "minItems": 1, "maxItems": 3}, "age": {"type": "integer"}}}
    (tmp_path / "pet.json").write_text(json.dumps(schema), encoding="utf-8")
    out, _ = run("One day", "Two", "--model", folder, "--json-schema", tmp_path / "pet.json", "--max-new-tokens", 45,
                 "--num-return", 4, "--seed", 0, "--temperature", 1.3)
    rows = [json.loads(line) for line in out.splitlines()]
    for row in rows:
        jsonschema.validate(json.loads(row["text"]), schema)
    assert len(rows) == 8 and {row["finish_reason"] for row in rows} == {"stop"} and len({row["text"] for row in rows}) == 8
    out, _ = run("One day", "--model", folder, "--max-new-tokens", 20, "--choice", "Yes (1).", "--choice", "Né\n", "--num-return", 6, "--seed", 0)
    assert {json.loads(line)["text"] for line in out.splitlines()} <= {"Yes (1).", "Né\n"}


@pytest.mark.parametrize("text, message", [
    ('{"type": "object", "properties": {"a": {"allOf": []}}}', "schema, #/properties/a: 'allOf' is not supported"),
    ('{"type": }', "line 1: not valid JSON"), ("[1]", "[1] is no schema"), ("[" * 5000, "nested too deeply"),
    ('{"type": "string", "minLength": 4000}', "max_new_tokens=40 must be"),
    ('{"$ref": "#"}', "refers to itself"), ('{"enum": []}', "no value is valid")])
def test_broken_schemas_are_one_line(folder, tmp_path, text, message):
    (tmp_path / "s.json").write_text(text, encoding="utf-8")
    out, errors = run("x", "--model", folder, "--json-schema", tmp_path / "s.json", "--max-new-tokens", 40, code=2)
    assert message in errors and out == "" and len(errors.strip().splitlines()) == 1
    assert "s.json" in errors or "max_new_tokens" in message


def test_many_texts_begin_at_once(folder):
    """However many are asked for: none is prepared before the first is out."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "minigpt", "generate", "--model", str(folder), "--max-new-tokens", "2",
                                "--num-return", "100000000", "One"], stdout=subprocess.PIPE, env=env)
    try:
        assert json.loads(process.stdout.readline())["prompt"] == "One"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_chat_and_a_stop_string_through_a_pipe():
    out, _ = run_process("--chat", "--temperature", 0, "--max-new-tokens", 24, "--stop", ".", data=b"What is a whale?\n")
    row = json.loads(out)
    assert row["finish_reason"] == "stop" and "." not in row["text"] and len(row["text"]) > 5
    assert row["tokens"] < 24  # it is not drawn on behind the stop string


@pytest.mark.parametrize("arguments, data, message", [
    (["x", "--temperature", "-1"], b"", "temperature=-1"), (["x", "--top-p", "1.5"], b"", "top_p=1.5"),
    (["x", "--top-k", "-1"], b"", "top_k=-1"), ([], b"", "the prompt is empty"), ([""], b"", "the prompt is empty"),
    ([], b"caf\xe9\n", "not UTF-8 (byte 0xe9)"), (["caf\udce9"], b"", "half a character"), ([], b'{"text": 1}\n', "line 1"),
    (["x", "--num-beams", "4", "--draft", "ngram"], b"", "exclude each other"), (["x", "--format", "xml"], b"", "'xml'"),
    (["x", "--num-beams", "2", "--num-return", "3"], b"", "num_return=3"), (["x", "--regex", "("], b"", "never closed"),
    (["x", "--regex", "a", "--choice", "a"], b"", "--regex and --choice exclude"), (["x", "--choice", "caf\udce9"], b"", "half a character"),
    (["x", "--json-schema", "nowhere.json"], b"", "nowhere.json"), (["x", "--ignore-end", "--regex", "a"], b"", "--regex and --ignore-end"),
    (["x", "--num-beams", "100000000", "--max-new-tokens", "4"], b"", "ask for"),
    (["x", "--file", "nowhere.txt"], b"", "nowhere.txt"), (["x", "--model", "nowhere"], b"", "nowhere"),
    (["word " * 80], b"", "exceed the context of 64"), (["x", "--max-new-tokens", "99"], b"", "exceed the context of 64"),
    (["x", "--overflow", "wrap"], b"", "overflow='wrap'"), (["x", "--num-return", "0"], b"", "--num-return 0"),
    (["x", "--guesses", "0"], b"", "--guesses 0"),
    (["x", "--early-stopping", "soon"], b"", "--early-stopping 'soon'"),
    (["x", "--logit-bias", "cat"], b"", "--logit-bias 'cat' must be TEXT=NUMBER or ID=NUMBER"),
    (["x", "--logit-bias", "cat=nan"], b"", "'cat=nan' must be"), (["x", "--logit-bias", "=1"], b"", "'=1' must be"),
    (["x", "--logit-bias", "cat=" + "9" * 400], b"", "logit_bias=inf must be a finite number"),
    (["x", "--logit-bias", "20000=1"], b"", "there is no token 20000, the ids are 0 to 19999"),
    (["x", "--logit-bias", "hippopotamus rides=1"], b"", "'hippopotamus rides' is 6 tokens, and a bias is for one"),
    (["x", "--min-new-tokens", "-1"], b"", "min_new_tokens=-1 must be 0 or more"),
    (["x", "--min-new-tokens", "9", "--max-new-tokens", "8"], b"", "--min-new-tokens 9 must be at most --max-new-tokens 8")])
def test_errors_are_one_line(folder, arguments, data, message):
    if "--model" not in arguments:
        arguments = [*arguments, "--model", folder]
    out, errors = run(*arguments, data=data, code=2)
    assert message in errors and "Traceback" not in errors and out == ""
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments, data, message", [
    ([], b"caf\xe9\n", "not UTF-8 (byte 0xe9)"), (["x", "--seed", "one"], b"", "--seed"),
    (["x", "--num-beams", "2", "--num-return", "3"], b"", "num_return=3")])
def test_errors_of_a_process(arguments, data, message):
    out, errors = run_process(*arguments, data=data, code=2)
    assert message in errors and "Traceback" not in errors and out == "" and errors.count("\n") == 1


def test_help_is_quick_and_loads_nothing_heavy():
    code = ("import sys, minigpt.engine.generate_files; heavy = {'torch', 'numpy', 'datasets', 'gradio', 'matplotlib'};"
            "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr.decode()
    out, _ = run("--help")
    for flag in ("--num-return", "--num-beams", "--draft", "--regex", "--json-schema", "--typical-p", "--overflow", "--logit-bias", "--min-new-tokens"):
        assert flag in out
