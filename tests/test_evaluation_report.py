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
from minigpt.chat_format import ChatRenderer
from minigpt.engine.dataset_readers import load_chats
from minigpt.deeper.calibration import calibration
from minigpt.deeper.text_metrics import bleu, chrf, distinct, exact_match, rouge, token_f1
from minigpt.engine.scoring import score_chats
from minigpt.evaluation import wilson
from minigpt.engine.devices import pick_device
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.engine.choices import load_questions
from minigpt.engine.baselines import PlainRenderer, open_model, renderer_for
from minigpt.engine.everyday import KINDS, judge, load_everyday
from minigpt.engine.report import (
    _NOT_SAID as NOT_SAID, METRICS, SUITES, Metric, Suite, _kinds as kinds_of, _report_html, _take_evenly as take_evenly,
    as_text, compare, report_tables, run_suite, write_report)

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

def metric(name):
    [found] = [m for m in METRICS if m.name == name]
    return found


def test_report_numbers_are_those_of_the_parts(reports):
    model, tokenizer = open_model("ngram")
    chats = load_chats("held", limit=12)
    scores = score_chats(model, ChatRenderer(tokenizer), chats)
    rows, measures = reports[1]["rows"], reports[1]["measures"]
    assert measures["perplexity"]["all"] == pytest.approx(list(scores.perplexity()))
    assert measures["bits per byte"]["all"] == pytest.approx(list(scores.bits_per_byte()))
    assert measures["token accuracy"]["all"] == pytest.approx(list(scores.accuracy()))
    nll, tokens, n_bytes = (sum(row[key] for row in rows["held"]) for key in ("nll", "tokens", "bytes"))
    assert measures["perplexity"]["all"][0] == pytest.approx(math.exp(nll / tokens))
    assert measures["bits per byte"]["all"][0] == pytest.approx(nll / math.log(2) / n_bytes)
    assert n_bytes == sum(len(m["content"].encode()) for c in chats for m in c["messages"] if m["role"] == "assistant")
    sure, right = (torch.cat([getattr(d, name) for d in scores.documents]) for name in ("confidence", "correct"))
    assert measures["calibration error"]["all"][0] == pytest.approx(calibration(sure, right).error)
    by_kind = measures["bits per byte"]
    assert sum(n for kind, (_, _, _, n) in by_kind.items() if kind != "all") == by_kind["all"][3] == 12
    said, meant = ([row[key] for row in rows["answers"]] for key in ("said", "meant"))
    for name, value in (("BLEU", bleu(said, meant).score), ("chrF", chrf(said, meant)),
                        ("F1", np.mean([*map(token_f1, said, meant)])),
                        ("ROUGE-L", np.mean([rouge(*pair).f1 for pair in zip(said, meant)])),
                        ("exact match", np.mean([*map(exact_match, said, meant)])), ("distinct-1", distinct(said, 1))):
        assert measures[f"answers: {name}"]["all"][0] == pytest.approx(value), name


def test_shares_have_wilsons_interval_and_all_numbers_their_n(reports):
    for report in reports:
        for name, kinds in report["measures"].items():
            for value, low, high, n in kinds.values():
                assert n > 0
                if metric(name).share:
                    assert [value, low, high, n] == pytest.approx(list(wilson(value * n, n))) and low < high
        assert all(row[1].endswith(f" n={n}" + " (few)" * (n < 20)) for row, n in zip(report_tables([report])[""][1:], (
            n for kinds in report["measures"].values() for _, _, _, n in kinds.values())))


def test_everyday_counts_are_those_of_the_rows(reports):
    """Two questions of each kind, of the half for tuning; the same for each model."""
    bundled = {row["id"]: row for row in load_everyday("tune")}
    for report in reports:
        rows, kinds = report["rows"]["everyday"], report["measures"]["everyday"]
        assert len({row["id"] for row in rows}) == len(rows) == 2 * len(KINDS)
        for kind, (share, low, high, n) in kinds.items():
            own = [row for row in rows if kind in ("all", bundled[row["id"]]["kind"])]
            assert n == len(own) and share == sum(judge(bundled[row["id"]], row["said"]) for row in own) / n
            assert low <= share <= high
        assert set(kinds) == {*KINDS, "all"} and kinds["all"][3] == 2 * len(KINDS)
    assert "everyday" in compare(*reports)


def test_reading_rows_are_those_of_kind_context():
    said = ["Ada", NOT_SAID, "the text does not say", "blue", NOT_SAID, NOT_SAID]
    meant = ["Ada.", "red", NOT_SAID, NOT_SAID, "The text does not say.", NOT_SAID]
    rows = [{"kind": "context", "said": s, "meant": m} for s, m in zip(said, meant)]
    rows[-1]["kind"] = "talk"
    found = {name: metric(f"reading: {name}").estimate(rows) for name in (
        "exact match", "F1", "rightly not said", "wrongly not said")}
    assert {name: (x.value, x.n) for name, x in found.items()} == {
        "exact match": (0.5, 2), "F1": (0.5, 2), "rightly not said": (pytest.approx(2 / 3), 3), "wrongly not said": (0.5, 2)}
    assert metric("reading: rightly not said").estimate(rows[:2]) is None


def test_a_metric_is_one_entry(reports, monkeypatch):
    """Its line, its kinds, its difference and its bars come from the entry."""
    monkeypatch.setattr("minigpt.engine.report.METRICS", [Metric(
        "letters", "answers", lambda r: (len(r["said"]),), kinds=True, panel="Lengths")])
    from minigpt.engine.report import _measures, draw_report
    short = [{"name": r["name"], "suite": "quick", "rows": r["rows"], "measures": _measures(r["rows"])} for r in reports]
    tables = report_tables(short)
    lengths = [[len(row["said"]) for row in r["rows"]["answers"]] for r in reports]
    assert [row[0] for row in tables[""]][:2] == ["", "letters"] and len(tables[""]) > 2
    assert tables[""][1][1].startswith(f"{np.mean(lengths[0]):.4g} [") and tables[""][1][1].endswith(" n=8 (few)")
    [[_, gain]] = tables["untrained minus ngram"][1:]
    assert gain.startswith(f"{np.mean(lengths[0]) - np.mean(lengths[1]):.4g} [")
    [bars, _] = draw_report(short).axes
    assert bars.get_title() == "Lengths" and bars.get_yticklabels()[0].get_text() in ("letters", *short[1]["measures"]["letters"])
    assert max(bar.get_width() for bar in bars.patches) >= np.mean(lengths[0])


def test_groups_of_pairs_are_counted_one_by_one(reports):
    pairs = load_questions("pairs")
    for report in reports:
        rows = report["rows"]["pairs"]
        assert [row["kind"] for row in rows] == [q.group for q in take_evenly(pairs, TINY.questions)]
        for kind, (share, _, _, n) in report["measures"]["minimal pairs"].items():
            own = [row["sum"] for row in rows if kind in ("all", row["kind"])]
            assert share == pytest.approx(sum(own) / len(own)) and n == len(own)


def test_an_untrained_model_is_at_the_bottom(reports):
    assert 0.8 < reports[0]["measures"]["perplexity"]["all"][0] / 20000 < 1.3
    assert reports[1]["measures"]["perplexity"]["all"][0] < 2000
    assert compare(*reports)["bits per byte"].high < 0


def test_a_model_without_chat_tokens_is_measured_in_plain_text():
    tokenizer = Tokenizer.from_pretrained("gpt2")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=16, block_size=256)).eval()
    report = run_suite(model, tokenizer, suite=Suite(4, 2, 2, 4))
    assert isinstance(renderer_for(tokenizer), PlainRenderer)
    assert 0.5 < report["measures"]["perplexity"]["all"][0] / 50257 < 2
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
    assert report["rows"]["held"][0]["tokens"] == sum(
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
    rows = report["rows"]["answers"]
    assert rows[0]["said"] == "" and metric("answers: F1").estimate(rows[:1]).value == 0 and rows[1]["said"]
    assert len(report["rows"]["held"]) == report["measures"]["answers: F1"]["all"][3] == 2
    other = run_suite(open_model("ngram")[0], tokenizer, suite=Suite(2, 2, 1, 48), chats=chats)
    assert "answers: F1" in compare(report, other)


def test_rare_kinds_join_the_rows_of_kind_other():
    kinds = ["other", "story", "other", "fact", "story:sad", "other"]
    chats = [{"kind": kind} for kind in kinds]
    assert kinds_of(chats, least=2) == ["other", "story", "other", "other", "story", "other"]
    assert kinds_of(chats, least=4) == ["other"] * 6
    assert kinds_of(chats[:5], least=1) == ["other", "story", "other", "fact", "story"]
    assert kinds_of([{}, {"kind": "fact"}, {"kind": "fact"}], least=2) == ["other", "fact", "fact"]
    toy = Metric("rows", "held", lambda r: (1,), kinds=True)
    rows = [{"kind": kind} for kind in ("other", "story", "other", "fact", "story", "other", "fact", "fact")]
    assert list(toy.by_kind(rows)) == ["all", "fact", "story", "other"]        # the largest first, "other" last


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
    assert set(gains) == {m.name for m in METRICS if m.adds and m.name in a["measures"]}
    for name, gain in gains.items():
        assert gain.value == pytest.approx(b["measures"][name]["all"][0] - a["measures"][name]["all"][0]), name
    back = compare(b, a)
    assert all(back[k].value == pytest.approx(-gains[k].value) for k in gains)


def test_the_paired_interval_equals_scipys(reports):
    """Of a mean over rows: scipy's bootstrap of the differences, row by row."""
    stats = pytest.importorskip("scipy.stats")
    for name in ("answers: F1", "answers: words"):
        values = [metric(name).columns(r["rows"]["answers"])[:, 0] for r in reports]
        theirs = stats.bootstrap([values[1] - values[0]], np.mean, n_resamples=20000, method="percentile",
                                 random_state=0).confidence_interval
        gain = compare(*reports)[name]
        width = theirs.high - theirs.low
        assert gain.low == pytest.approx(theirs.low, abs=0.1 * width)
        assert gain.high == pytest.approx(theirs.high, abs=0.1 * width)


def test_other_documents_are_not_compared(reports):
    other = strict(reports[0])
    other["rows"]["held"] = other["rows"]["held"][:-1]
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
    evil[0]["rows"]["answers"][0]["said"] = "<script>alert(1)</script><img src=http://x>"
    tags = Tags(_report_html(evil, report_tables(evil)))
    assert tags.open == [] and "script" not in tags.seen and "i" not in tags.seen
    assert tags.seen.count("img") == 1 and all(link.startswith("data:image/png;base64,") for link in tags.links)


def test_files_are_whole_and_not_overwritten(reports, tmp_path):
    write_report(reports, tmp_path / "r")
    text = (tmp_path / "r" / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert report_tables(json.loads(text)) == report_tables(reports)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["report.html", "report.json"]
    with pytest.raises(FileExistsError, match="report.json"):
        write_report(reports, tmp_path / "r")
    write_report(reports[:1], tmp_path / "r", overwrite=True)
    assert len(json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))) == 1


def test_every_measure_is_in_the_table(reports):
    tables = report_tables(reports)
    rows = [line[0] for line in tables[""]]
    for measure in ("perplexity", "bits per byte", "  bits per byte: other", "token accuracy", "calibration error", "answers: BLEU",
                    "answers: chrF", "answers: ROUGE-L", "answers: F1", "answers: exact match", "answers: repetition",
                    "answers: distinct-2", "questions (byte)", "cloze, first guess", "minimal pairs", "everyday"):
        assert measure in rows
    lines = as_text(tables[""]).splitlines()
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


def test_a_tokenizer_without_the_mark_of_documents_is_told_before_any_work(tmp_path):
    tokenizer = Tokenizer.train(["a fox and a kite"], 260, progress=False)
    GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=1, n_embd=8)
         ).save_pretrained(tmp_path / "bare", tokenizer)
    assert "no <|endoftext|>" in one_line("eval", tmp_path / "bare", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    assert as_text(report_tables(reports[:1])[""]) in out and list((tmp_path / "runs").iterdir()) == []


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
