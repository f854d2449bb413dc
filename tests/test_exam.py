"""The exam: right answers pass, each usual mistake is called by its name, and nothing that a file does ends it."""
import inspect
import json
import re
from pathlib import Path

import pytest
from command_line import minigpt, one_line

from minigpt.engine import exam
from minigpt.engine.exam_parts import PARTS

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = Path(__file__).with_name("exam_answers.py")


def functions(source: str) -> dict:
    names: dict = {}
    exec(compile(source, "answers", "exec"), names)  # of this folder
    return names


def verdict(name: str, *edits: tuple[str, str]) -> str:
    """What is said about a right answer after some edits of it."""
    source = ANSWERS.read_text(encoding="utf-8")
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return exam.judge(PARTS[name], functions(source)[name], Path("answers"))


# ------------------------------------------------------------------ each part

@pytest.mark.parametrize("name", PARTS)
def test_a_right_answer_passes(name):
    assert verdict(name) == "passed"


CUT = "[bytes([b]) for b in word.encode()] for word in split_words(text)]"
ATTEND = "return scores.masked_fill(later, -math.inf).softmax(-1) @ v"
NO_MASK, NO_SCALE = (".masked_fill(later, -math.inf)", ""), (" / math.sqrt(q.shape[-1])", "")
MISTAKES = [
    ("learn_merges", "the border of two words", (CUT, CUT.replace("split_words(text)", "[text]"))),
    ("learn_merges", "counts as often as it occurs", (CUT, CUT.replace("split_words(text)", "set(split_words(text))"))),
    ("learn_merges", "equally frequent pairs",
     ("min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))", "max(counts, key=counts.get)")),
    ("learn_merges", "begins with characters",
     (CUT, CUT.replace("bytes([b]) for b in word.encode()", "c.encode() for c in word")),
     ("{bytes([b]): b for b in range(256)}", "{chr(b).encode(): b for b in range(256)}")),
    ("encode", "the border of two words", ("in split_words(text):", "in [text]:")),
    ("encode", "the earliest merge", ("min(known, key=ranks.get)", "known[0]")),
    ("attention", "no causal mask", NO_MASK),
    ("attention", "not divided by the square root of D", NO_SCALE),
    ("attention", "divided by D, not by its", ("math.sqrt(q.shape[-1])", "q.shape[-1]")),
    ("attention", "hidden scores are 0", ("-math.inf).softmax(-1) @ v", "0.0).softmax(-1) @ v")),
    ("attention", "hidden after the softmax", (ATTEND, "return scores.softmax(-1).masked_fill(later, 0) @ v")),
    ("attention", "dim=-1", ("softmax(-1) @ v", "softmax(-2) @ v")),
    ("attention", "look at itself", ("triu(1)", "triu(0)")),
    ("attention", "exp overflows",
     (ATTEND, "e = scores.masked_fill(later, -math.inf).exp()\n    return e / e.sum(-1, keepdim=True) @ v")),
    ("gpt2_logits", "GELU is the exact one", (', approximate="tanh"', "")),
    ("gpt2_logits", "positions (wpe) are missing", (' + weights["wpe.weight"][:T]', "")),
    ("gpt2_logits", "ln_f", ('norm(x, "ln_f") @', "x @")),
    ("gpt2_logits", "no causal mask", NO_MASK),
    ("gpt2_logits", "not divided by the square root of D", NO_SCALE),
    ("gpt2_logits", "there are n_head", ("part.reshape(T, n_head, -1)", "part.reshape(T, 1, -1)")),
    ("gpt2_logits", "LayerNorm comes after the sum", ('linear(norm(x, h + "ln_1"), ', "linear(x, "),
     ("x = x + z", 'x = norm(x + z, h + "ln_1")'), ('linear(norm(x, h + "ln_2"), ', "linear(x, "),
     ('x = x + linear(hidden, h + "mlp.c_proj")', 'x = norm(x + linear(hidden, h + "mlp.c_proj"), h + "ln_2")')),
    ("gpt2_logits", "have to be added", ("x = x + z", "x = z"), ("x = x + linear(hidden", "x = linear(hidden")),
    ("sample_probs", "multiplied by the temperature", ("logits / temperature", "logits * temperature")),
    ("sample_probs", "temperature 0 is no division", ("if temperature == 0:", "if False:")),
    ("sample_probs", "no longer sum to 1", ("probs / probs.sum()", "probs")),
    ("sample_probs", "top-p drops the token", ("before >= top_p", "falling.cumsum(0) > top_p")),
    ("sample_probs", "top-p drops the token", ("before >= top_p", "(falling.cumsum(0) > top_p) & (before > 0)")),
    ("sample_probs", "the temperature comes first", ("logits = logits / temperature", "pass"),
     ("return probs / probs.sum()", "return (probs.log() / temperature).softmax(-1)")),
    ("sample_probs", "top-k comes first", ("    probs = logits.softmax(-1)\n", "    probs = whole\n"),
     ("    if top_k is not None:", "    whole = logits.softmax(-1)\n    if top_k is not None:"),
     ("return probs / probs.sum()", "probs = probs * (logits > -math.inf)\n    return probs / probs.sum()")),
    ("lora_delta", "alpha / r is missing", (" * (alpha / len(A))", "")),
    ("lora_delta", "alpha is not divided by r", ("alpha / len(A)", "alpha")),
    ("lora_delta", "rsLoRA", ("len(A))", "len(A) ** 0.5)")),
    ("lora_delta", "upside down", ("alpha / len(A)", "len(A) / alpha")),
    ("lora_delta", "transposed", ("x @ A.T @ B.T", "x @ A @ B")),
    ("bm25_scores", "idf without its floor", ("math.log(1 + ", "math.log(")),
    ("bm25_scores", "no idf", ("idf * f *", "f *")),
    ("bm25_scores", "another idf", ("math.log(1 + (N - df + 0.5) / (df + 0.5))", "math.log(N / df)")),
    ("bm25_scores", "another idf", ("math.log(1 + (N - df + 0.5) / (df + 0.5))",
                                    "max(0, math.log((N - df + 0.5) / (df + 0.5)))")),
    ("bm25_scores", "k1 + 1 is missing", (" * (k1 + 1)", "")),
    ("bm25_scores", "no saturation", (" * (k1 + 1) / (f + k1 * (1 - b + b * len(document) / mean))", "")),
    ("bm25_scores", "the length of a document", (" - b + b * len(document) / mean", "")),
    ("bm25_scores", "asked twice", ("for term in query:", "for term in set(query):")),
]


@pytest.mark.parametrize("name, words, edits", [(name, words, edits) for name, words, *edits in MISTAKES],
                         ids=[f"{name}: {words}" for name, words, *_ in MISTAKES])
def test_a_usual_mistake_is_named(name, words, edits):
    said = verdict(name, *edits)
    assert said.startswith("wrong: ") and words in said and "\n" not in said
    assert f"{name}(" in said and "expected " in said and ", got " in said


def test_every_mistake_of_the_exam_is_made_here():
    named = {words for _, words, *_ in MISTAKES}
    for part in PARTS.values():
        for sentence, _ in part.mistakes:
            assert any(words in sentence for words in named), sentence


@pytest.mark.parametrize("name, edit, says", [
    ("lora_delta", ("return x @ A.T", "x @ A.T"), "lora_delta([1.0, 2.0], [[1.0, 0.0], [1.0, 1.0]], "
     "[[1.0, 0.0], [2.0, 1.0]], 6.0): expected [3.0, 15.0], got None"),
    ("lora_delta", ("* (alpha / len(A))", "+ 1"), "expected [3.0, 15.0], got [2.0, 6.0]"),
    ("encode", ("tokens += parts", "tokens.append(word)"), "encode('hi', []): expected [b'h', b'i'], got ['hi']"),
    ("learn_merges", ("range(n)", "range(min(n, 9))"), "from [9] on expected [("),
    ("attention", ("softmax(-1) @ v", "softmax(-1) @ v * (1 + (v.ndim == 4))"), "at [0, 0, 0, 0] expected "),
    ("bm25_scores", ("if not f:", "if f is None:"),
     "division by zero, for bm25_scores(['a'], [[]])"),
    ("bm25_scores", ("scores.append(score)", "documents.clear()"),
     "bm25_scores(['b'], [['a']]): expected [0.0], got []"),
], ids=["None", "another number", "strings", "a late merge", "four dimensions", "an error", "arguments are copies"])
def test_other_mistakes_show_the_smallest_input_and_both_values(name, edit, says):
    assert says in verdict(name, edit)


def test_the_stubs_fit_what_is_asked():
    stubs = functions(exam.STUBS)
    assert [name for name in stubs if name in PARTS] == list(PARTS)
    for name, part in PARTS.items():
        assert len(stubs[name].__doc__) > 80
        for arguments in part.cases():
            inspect.signature(stubs[name]).bind(*arguments)
        assert exam.judge(part, stubs[name], Path("stubs")) == "not written yet"


def test_each_hint_is_a_heading_of_that_lesson():
    for part in PARTS.values():
        number, heading = re.fullmatch(r'lesson (\d\d), "(.+)"', part.lesson).groups()
        [path] = (ROOT / "nbs").glob(f"{number}_*.ipynb")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = [line.rstrip() for cell in cells for line in cell["source"]]
        assert f"## {heading}" in lines, part.lesson


# ------------------------------------------------------------------ a file, and the command

def test_the_command_writes_stubs_once_and_judges_a_file(tmp_path):
    path = tmp_path / "my answers.py"
    assert str(path) in minigpt("exam", "--stubs", path)[0]
    lines = minigpt("exam", path, code=1)[0].splitlines()
    assert len(lines) == 8 and all("not written yet (lesson " in line for line in lines[:7])
    assert lines[7] == "0 of 7 parts passed"
    assert "my answers.py exists, and may hold your answers" in one_line("exam", "--stubs", path)
    path.write_text("def attention(q, k, v)\n    pass", encoding="utf-8")
    assert "my answers.py, line 1: no Python (expected ':')" in one_line("exam", path)
    assert "no such file" in one_line("exam", tmp_path / "none.py")


def test_a_file_of_right_answers_passes():
    lines = minigpt("exam", ANSWERS)[0].splitlines()
    assert [line.split() for line in lines[:7]] == [[name, "passed"] for name in PARTS]
    assert lines[7] == "7 of 7 parts passed"


WILD = """
import os, sys
from exam_neighbour import attention

def learn_merges(text, n):
    while True:
        pass

def encode(text, merges):
    os._exit(3)

def sample_probs(logits, temperature, top_k, top_p):
    sys.exit("enough")

def bm25_scores(query, documents):
    return [] if not documents else nothing
"""


def test_nothing_that_a_file_does_ends_the_exam(tmp_path, capsys):
    (tmp_path / "exam_neighbour.py").write_text("def attention(q, k, v):\n    return v", encoding="utf-8")
    path = tmp_path / "wild.py"
    path.write_text(WILD, encoding="utf-8")
    assert exam.run_exam(path, seconds=8) == 1
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert said["learn_merges"].startswith("no end after 8 seconds: learn_merges('', 3) (lesson 00")
    assert said["encode"].startswith("Python died with exit code 3: encode('', [])")
    assert said["attention"].startswith("wrong: attention(")
    assert said["sample_probs"].startswith("line 13 raised SystemExit: enough, for sample_probs([1.0, 3.0], ")
    assert said["bm25_scores"].startswith(
        "line 16 raised NameError: name 'nothing' is not defined, for bm25_scores(['b'], [['a']])")
    assert said["gpt2_logits"].startswith("not written yet")


def test_a_file_that_cannot_be_loaded_says_so_for_each_part(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_thing\n\ndef lora_delta(x, A, B, alpha):\n    return x\n", encoding="utf-8")
    assert exam.run_exam(path) == 1
    said = capsys.readouterr().out
    assert "broken.py: line 1 raised ModuleNotFoundError: No module named 'no_such_thing' (lesson 09" in said
