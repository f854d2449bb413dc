"""Chapter 06: suites, reports, comparison of models, and the command `minigpt eval`."""
import errno
import html.parser
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import minigpt, one_line

from minigpt.engine.tokenizer import Tokenizer
from minigpt.engine import evaluate
from minigpt.engine.evaluate import _free_folder as free_folder
from minigpt.engine.chat_format import ChatRenderer
from minigpt.engine.dataset_readers import load_chats
from minigpt.deeper.text_metrics import NOT_SAID, bleu, token_f1
from minigpt.engine.scoring import score_chats
from minigpt.engine.devices import pick_device
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.engine.baselines import PlainRenderer, open_model, renderer_for
from minigpt.engine.everyday import KINDS, judge, load_everyday
from minigpt.engine.report import (
    SUITES, Suite, answers_part, by_kind, compare, report_html, report_rows, report_table, run_suite, take_evenly,
    write_report)

ROOT = Path(__file__).resolve().parent.parent
TINY = Suite(chats=12, answers=8, questions=8, max_new_tokens=6, everyday=2)


@pytest.fixture(scope="module")
def reports():
    found = []
    for name in ("untrained", "ngram"):
        model, tokenizer = open_model(name)
        found.append(run_suite(model, tokenizer, name=name, suite=TINY))
    return found


def strict(reports):
    """As json with no NaN in it, which is what other programs read."""
    return json.loads(json.dumps(reports))


# ------------------------------------------------------------------ the suite

def test_report_numbers_are_those_of_the_parts(reports):
    model, tokenizer = open_model("ngram")
    chats = load_chats("held", limit=12)
    scores = score_chats(model, ChatRenderer(tokenizer), chats)
    held = reports[1]["held"]
    assert held["all"]["perplexity"] == pytest.approx(list(scores.perplexity()))
    assert held["all"]["bits_per_byte"] == pytest.approx(list(scores.bits_per_byte()))
    nll, tokens, n_bytes, right = np.array(held["rows"]).sum(0)
    assert held["all"]["perplexity"][0] == pytest.approx(math.exp(nll / tokens))
    assert held["all"]["bits_per_byte"][0] == pytest.approx(nll / math.log(2) / n_bytes)
    assert n_bytes == sum(len(m["content"].encode()) for c in chats for m in c["messages"] if m["role"] == "assistant")
    assert sum(k["documents"] for k in held["kinds"].values()) == held["all"]["documents"] == 12
    rows = reports[1]["answers"]["rows"]
    assert reports[1]["answers"]["all"]["bleu"][0] == bleu([r["said"] for r in rows], [r["meant"] for r in rows]).score
    assert reports[1]["answers"]["all"]["f1"][0] == pytest.approx(np.mean([token_f1(r["said"], r["meant"]) for r in rows]))


def test_everyday_counts_are_those_of_the_rows(reports):
    """Two questions of each kind, of the half for tuning; the same for each model."""
    bundled = {row["id"]: row for row in load_everyday("tune")}
    for report in reports:
        rows, kinds = report["everyday"]["rows"], report["everyday"]["kinds"]
        assert len({row["id"] for row in rows}) == len(rows) == 2 * len(KINDS)
        for kind, (n, right, low, high) in kinds.items():
            own = [row for row in rows if kind in ("all", bundled[row["id"]]["kind"])]
            assert n == len(own) and right == sum(judge(bundled[row["id"]], row["said"]) for row in own)
            assert low <= right / n <= high
        assert list(kinds) == [*KINDS, "all"]
        assert report_rows(report)["everyday: all"].startswith(f"{kinds['all'][1]} of {2 * len(KINDS)} [")
    assert "everyday" in compare(*reports)


def test_reading_rows_are_those_of_kind_context():
    chats = [{"messages": [{"role": "user", "content": "Context: x\n\nQuestion: y"},
                           {"role": "assistant", "content": a}], "kind": "context"} for a in ("Ada", NOT_SAID, NOT_SAID)]
    chats.append({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "kind": "talk"})
    part = answers_part(chats, ["Ada.", NOT_SAID, "Ben", NOT_SAID], by_kind(chats, least=1))
    assert part["reading"] == {"exact_match": 1, "f1": 1, "rightly_not_said": 0.5, "wrongly_not_said": 0}


def test_an_untrained_model_is_at_the_bottom(reports):
    assert 0.8 < reports[0]["held"]["all"]["perplexity"][0] / 20000 < 1.3
    assert reports[1]["held"]["all"]["perplexity"][0] < 2000
    assert compare(*reports)["bits per byte"].high < 0


def test_a_model_without_chat_tokens_is_measured_in_plain_text():
    tokenizer = Tokenizer.from_pretrained("gpt2")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=16, block_size=256)).eval()
    report = run_suite(model, tokenizer, suite=Suite(4, 2, 2, 4))
    assert isinstance(renderer_for(tokenizer), PlainRenderer)
    assert 0.5 < report["held"]["all"]["perplexity"][0] / 50257 < 2
    chat = load_chats("held", limit=1)[0]["messages"]
    ids, mask = PlainRenderer(tokenizer).render(chat)
    spoken = tokenizer.decode([i for i, m in zip(ids, mask) if m])
    assert spoken == "".join(" " + " ".join(m["content"].split()) + "\n" for m in chat if m["role"] == "assistant")
    assert tokenizer.decode(PlainRenderer(tokenizer).prompt(chat[:-1])).endswith("\nAnswer:")


def test_long_conversations_do_not_break_the_suite():
    """Longer than the model reads: scored by windows, asked with the oldest exchanges left out."""
    model, tokenizer = open_model("untrained")
    long = [{"role": r, "content": f"{word} " * 300} for word in ("fox", "kite", "bee") for r in ("user", "assistant")]
    report = run_suite(model, tokenizer, suite=Suite(1, 1, 1, 3), chats=[{"messages": long}])
    assert report["held"]["all"]["tokens"] == sum(
        len(tokenizer.encode_ordinary((f"{word} " * 300).strip())) + 1 for word in ("fox", "kite", "bee"))


def test_a_question_longer_than_the_room_does_not_end_the_suite():
    """It counts as answered with nothing, so that models of other lengths are compared on the same questions."""
    tokenizer = Tokenizer.from_pretrained()
    torch.manual_seed(0)
    model = GPT2(GPT2Config.preset("mini", n_layer=1, block_size=256)).eval()
    said = [[("user", "so " * 220), ("assistant", "Yes.")], [("user", "Hi"), ("assistant", "Hello!")]]
    chats = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in said]
    assert 208 < len(ChatRenderer(tokenizer).prompt(chats[0]["messages"][:1])) < 256
    with pytest.warns(UserWarning, match="1 of 2 conversations"):
        report = run_suite(model, tokenizer, suite=Suite(2, 2, 1, 48), chats=chats)
    rows = report["answers"]["rows"]
    assert rows[0]["said"] == "" and rows[0]["f1"] == 0 and rows[1]["said"]
    assert report["held"]["all"]["documents"] == report["answers"]["all"]["documents"] == 2
    other = run_suite(open_model("ngram")[0], tokenizer, suite=Suite(2, 2, 1, 48), chats=chats)
    assert "answers: F1" in compare(report, other)


def test_rare_kinds_join_the_rows_of_kind_other():
    kinds = ["other", "story", "other", "fact", "story", "other"]
    chats = [{"kind": kind} for kind in kinds]
    assert by_kind(chats, least=2) == {"story": [1, 4], "other": [0, 2, 3, 5]}
    assert by_kind(chats, least=4) == {"other": [0, 1, 2, 3, 4, 5]}
    assert by_kind(chats[:5], least=1) == {"story": [1, 4], "fact": [3], "other": [0, 2]}
    assert list(by_kind([*chats, {}, {"kind": "fact"}], least=2)) == ["fact", "story", "other"]


@pytest.mark.parametrize("call,words", [
    (dict(suite="best"), "suite='best'"), (dict(chats=[]), "nothing to"),
    (dict(chats=[{"messages": [{"role": "user", "content": "x"}]}]), "nothing to")])
def test_bad_suites_are_named(call, words):
    model, tokenizer = open_model("untrained")
    with pytest.raises(ValueError, match=words):
        run_suite(model, tokenizer, **call)


def test_take_evenly_keeps_order_and_ends():
    items = list(range(84))
    for limit in (1, 7, 24, 40, 83):
        taken = take_evenly(items, limit)
        assert len(set(taken)) == limit and taken == sorted(taken) and taken[0] == 0
        assert max(np.diff(taken, append=84)) <= math.ceil(84 / limit)


# ------------------------------------------------------------------ comparison

def test_paired_difference_is_the_difference(reports):
    a, b = reports
    gains = compare(a, b)
    assert gains["bits per byte"].value == pytest.approx(b["held"]["all"]["bits_per_byte"][0]
                                                         - a["held"]["all"]["bits_per_byte"][0])
    assert gains["answers: F1"].value == pytest.approx(b["answers"]["all"]["f1"][0] - a["answers"]["all"]["f1"][0])
    back = compare(b, a)
    assert all(back[k].value == pytest.approx(-gains[k].value) for k in gains)


def test_other_documents_are_not_compared(reports):
    other = strict(reports[0])
    other["held"]["rows"] = other["held"]["rows"][:-1]
    with pytest.raises(ValueError, match="different documents"):
        compare(reports[1], other)


# ------------------------------------------------------------------ what is written

class Tags(html.parser.HTMLParser):
    """All tags of a page, and whether each is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.links = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "html":
            assert self.open.pop() == tag


def test_html_needs_nothing_else_and_escapes_what_models_say(reports):
    evil = strict(reports)
    evil[0]["name"] = "<i>evil</i>"
    evil[0]["answers"]["rows"][0]["said"] = "<script>alert(1)</script><img src=http://x>"
    tags = Tags(report_html(evil))
    assert tags.open == [] and "script" not in tags.seen and "i" not in tags.seen
    assert tags.seen.count("img") == 1 and all(link.startswith("data:image/png;base64,") for link in tags.links)


def test_files_are_whole_and_not_overwritten(reports, tmp_path):
    write_report(reports, tmp_path / "r")
    text = (tmp_path / "r" / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert report_table(json.loads(text)) == report_table(reports)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["report.html", "report.json"]
    with pytest.raises(FileExistsError, match="report.json"):
        write_report(reports, tmp_path / "r")
    write_report(reports[:1], tmp_path / "r", overwrite=True)
    assert len(json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))) == 1


def test_every_measure_is_in_the_table(reports):
    rows = report_rows(reports[1])
    for measure in ("perplexity", "bits per byte", "  bits per byte: other", "token accuracy", "calibration error", "answers: BLEU",
                    "answers: chrF", "answers: F1", "answers: exact match", "answers: repetition", "answers: distinct-2",
                    "reading: rightly not said", "questions (byte)", "cloze, first guess", "minimal pairs"):
        assert measure in rows
    lines = report_table(reports).splitlines()
    column = lines[0].index("ngram")
    assert all(len(line) <= column or line[column - 1] == " " != line[column] for line in lines)


# ------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    path.write_text("\n".join(json.dumps(c) for c in load_chats("held", limit=4)), encoding="utf-8")
    return path


def test_eval_writes_a_report_and_compares(few, tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "quick", Suite(chats=4, answers=3, questions=9, max_new_tokens=6))
    out, _ = minigpt("eval", "ngram", "--against", "untrained", "--against", "ngram", "--data", few, "--quiet",
                     "--out", tmp_path / "out")
    assert "ngram minus untrained" in out and "bits per byte" in out
    saved = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [r["name"] for r in saved] == ["ngram", "untrained"] and saved[0]["suite"] == "quick"
    assert saved[0]["plan"] == {"chats": 4, "answers": 3, "questions": 9, "max_new_tokens": 6, "everyday": 0}
    assert "report.json" in one_line("eval", "ngram", "--out", tmp_path / "out")


@pytest.mark.parametrize("args,words", [
    (["no/such-model"], "no/such-model"), (["--suite", "huge"], "huge"),
    (["ngram", "--data", "none.jsonl"], "none.jsonl"), (["ngram", "--against", "./nowhere"], "nowhere")])
def test_bad_arguments_end_in_one_line_and_2(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in one_line("eval", *args)
    assert not list(tmp_path.iterdir())


def test_folders_are_counted_up(tmp_path):
    assert free_folder(tmp_path / "runs").name == "eval-001" and (tmp_path / "runs" / "eval-001").is_dir()
    assert free_folder(tmp_path / "runs").name == "eval-002"
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        free_folder(tmp_path / "file")


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: free_folder(tmp_path), range(40)))
    assert sorted(found) == [tmp_path / f"eval-{n:03d}" for n in range(1, 41)]


def test_an_out_that_is_no_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    def measured(*args, **kwargs):
        raise AssertionError("a model was measured first")

    monkeypatch.setattr("minigpt.engine.report.run_suite", measured)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out in ("file", "file/inside"):
        for more in ([], ["--overwrite"]):
            assert "file" in one_line("eval", "untrained", "--quiet", *more, "--out", tmp_path / out)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_the_report_is_written_before_anything_is_printed(reports, tmp_path, monkeypatch, capfd):
    """As `minigpt eval | head -1`: nobody reads the table to its end."""
    def broken(*args, **kwargs):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("minigpt.engine.report.run_suite", lambda *args, name, **kwargs: reports[name == "ngram"])
    monkeypatch.setattr(evaluate, "print", broken, raising=False)
    with pytest.raises(BrokenPipeError):
        evaluate.run_eval(["untrained", "ngram"], out=tmp_path / "out", progress=False)
    assert len(json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))) == 2


def test_a_report_that_cannot_be_written_is_still_printed_and_leaves_no_empty_folder(reports, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minigpt.engine.report.run_suite", lambda *args, **more: run_suite(*args, **more | {"chats": []}))
    assert "nothing to" in one_line("eval", "untrained", "--quiet")
    assert list((tmp_path / "runs").iterdir()) == []
    monkeypatch.setattr("minigpt.engine.report.run_suite", lambda *args, name, **kwargs: reports[name == "ngram"])
    monkeypatch.setattr("minigpt.engine.report.write_report", full)
    out, err = minigpt("eval", "untrained", "--quiet", code=2)
    assert err == "minigpt: No space left on device\n"
    assert report_table(reports[:1]) in out and list((tmp_path / "runs").iterdir()) == []


def test_the_device_is_picked_by_the_one_rule(tmp_path, monkeypatch):
    def picked(device, rule=pick_device):
        if device != "cpu":
            raise OSError(f"asked for {device}")
        return rule(device)

    monkeypatch.setattr("minigpt.engine.hub.pick_device", picked)
    for more, asked in ([], "asked for auto"), (["--device", "mps"], "asked for mps"):
        assert asked in one_line("eval", "--quiet", "--out", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_modules_import_no_gradio_datasets_or_matplotlib():
    code = ("import sys, minigpt.evaluation, minigpt.engine.report, minigpt.engine.vote_ui\n"
            "print([m for m in ('matplotlib', 'datasets', 'gradio', 'ipywidgets', 'lm_eval') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert out.stdout.strip() == "[]"


def test_quick_is_smaller_than_full():
    assert SUITES["full"].chats is None is SUITES["full"].everyday and SUITES["quick"].chats < len(load_chats("held"))
