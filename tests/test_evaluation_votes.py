"""Chapter 06: votes on disk, blind ballots, ratings and agreement against second methods, both front ends."""
import json
import math
import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from browsers import BROWSER, launch

from minigpt.deeper.human_eval import (
    agreement, bradley_terry, flip_test, krippendorff_alpha, rate, sign_test, vote_summary, votes_needed, win_table)
from minigpt.engine.ballots import Ballot, Match, Vote, Votes, make_matches
from minigpt.engine.vote_ui import BUTTONS, ballot_html, rating_figure, vote_panel

MATCHES = [Match(f"q{i}", f"Prompt {i}?", {"big": f"big says {i}", "small": f"small says {i}"}) for i in range(6)]


def add_many(path, rater, count):
    votes = Votes(path)
    for i in range(count):
        votes.add(Vote(rater, str(i), "A", "B", "tie"))


# ------------------------------------------------------------------ the file

def test_a_killed_process_loses_no_vote(tmp_path):
    """A process is killed (no clean-up at all) right after `add` returned; half a line is left behind besides."""
    path = tmp_path / "votes.jsonl"
    code = ("import os, sys\nfrom minigpt.engine.ballots import Vote, Votes\nvotes = Votes(sys.argv[1])\n"
            "for i in range(20):\n    votes.add(Vote('ada', str(i), 'A', 'B', 'left'))\n"
            "with open(sys.argv[1], 'a') as f:\n    f.write('{\"rater\": \"ad')\n    f.flush()\n    os._exit(9)\n")
    run = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent)})
    assert run.returncode == 9
    with pytest.warns(UserWarning, match="line 21"):
        votes = Votes(path)
    assert [v.item for v in votes.rows] == [str(i) for i in range(20)]
    votes.add(Vote("bob", "x", "A", "B", "right"))
    with pytest.warns(UserWarning, match="line 21"):
        assert len(Votes(path).rows) == 21


def test_a_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "votes.jsonl"
    first = Vote("ada", "1", "A", "B", "left")
    path.write_text(json.dumps(first.__dict__), encoding="utf-8")     # as if the newline had not been written
    second = Vote("ada", "2", "A", "B", "tie")
    Votes(path).add(second)
    assert Votes(path).rows == [first, second]


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n", "\r\n"], ids=ascii)
def test_line_ends_of_other_kinds_in_a_vote_end_no_line(odd, tmp_path, recwarn):
    path = tmp_path / "votes.jsonl"
    votes = [Vote(f"a{odd}da", f"q{odd}1", "A", "B", "left"), Vote("bob", "2", f"A{odd}", "B", "tie")]
    for vote in votes:
        Votes(path).add(vote)
    assert Votes(path).rows == votes and not recwarn.list


def test_threads_and_processes_share_a_file(tmp_path):
    path = tmp_path / "votes.jsonl"
    shared = Votes(path)
    threads = [threading.Thread(target=lambda n=n: [shared.add(Vote(f"t{n}", str(i), "A", "B", "left"))
                                                    for i in range(20)]) for n in range(4)]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=add_many, args=(path, f"p{n}", 20)) for n in range(2)]
    for worker in threads + processes:
        worker.start()
    for worker in threads + processes:
        worker.join()
    counts = Counter(v.rater for v in Votes(path).rows)
    assert counts == {f"t{n}": 20 for n in range(4)} | {f"p{n}": 20 for n in range(2)}


@pytest.mark.parametrize("fields,words", [
    (("ada", "q", "A", "B", "both"), "both"), (("", "q", "A", "B", "tie"), "rater"),
    (("ada", "q", "A", "A", "tie"), "against itself")])
def test_bad_votes_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Vote(*fields)


# ------------------------------------------------------------------ the ballot

def test_ballots_are_blind_complete_and_random(tmp_path):
    votes = Votes(tmp_path / "v.jsonl")
    orders, lefts = set(), Counter()
    for n in range(60):
        ballot = Ballot(MATCHES, votes, f"rater {n}")
        orders.add(tuple(m.item for m, _, _ in ballot.todo))
        lefts.update(left for _, left, _ in ballot.todo)
        assert sorted(m.item for m, _, _ in ballot.todo) == [m.item for m in MATCHES]
        seen = ballot.current()
        assert set(seen._fields) == {"prompt", "left", "right"}
    assert len(orders) > 55                                 # each rater another order
    assert 0.4 < lefts["big"] / lefts.total() < 0.6         # and no side for a system


def test_the_vote_is_on_what_was_shown(tmp_path):
    votes = Votes(tmp_path / "v.jsonl")
    ballot = Ballot(MATCHES, votes, "ada")
    rng = random.Random(0)
    for _ in range(len(MATCHES)):
        shown = ballot.current()
        better = rng.choice(["left", "right"])
        expected = getattr(shown, better).split(" ")[0]     # "big says 3" -> big
        ballot.vote(better)
        assert votes.rows[-1].winner == expected
        assert votes.rows[-1].item in shown.prompt.replace("Prompt ", "q")
    assert ballot.current() is None
    with pytest.raises(ValueError, match="done"):
        ballot.vote("tie")


def test_a_rater_goes_on_after_a_crash(tmp_path):
    path = tmp_path / "v.jsonl"
    ballot = Ballot(MATCHES, Votes(path), "ada")
    planned = [m.item for m, _, _ in ballot.todo]
    for choice in ("skip", "tie", "left"):
        ballot.vote(choice)
    again = Ballot(MATCHES, Votes(path), "ada")
    assert [m.item for m, _, _ in again.todo] == planned[3:]
    assert len(Ballot(MATCHES, Votes(path), "bob").todo) == len(MATCHES)


# ------------------------------------------------------------------ ratings

def simulated(truth, raters, items, seed, ties=0.1):
    rng, votes = random.Random(seed), []
    for i in range(items):
        for r in range(raters):
            a, b = rng.sample(list(truth), 2)
            left = rng.random() < 1 / (1 + 10 ** ((truth[b] - truth[a]) / 400))
            votes.append(Vote(f"r{r}", str(i), a, b, "tie" if rng.random() < ties else "left" if left else "right"))
    return votes


@pytest.mark.parametrize("seed", range(5))
def test_ratings_equal_two_other_methods(seed, ledger):
    """Zermelo's iteration against scipy's minimiser of the likelihood, and against Newton's method."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    wins = rng.integers(0, 30, (5, 5)) * (1 - np.eye(5)) + (rng.random((5, 5)) < 0.3) / 2 * (1 - np.eye(5))
    for prior in (0.0, 1.0):
        table = wins + prior / 2 * (1 - np.eye(5))

        def loss(theta):
            return np.sum(table * np.log1p(np.exp(theta[None] - theta[:, None])))

        theta = optimize.minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-10}).x
        points = 1000 + 400 / math.log(10) * (theta - theta.mean())
        newton, games = np.zeros(5), table + table.T
        for _ in range(50):
            p = 1 / (1 + np.exp(newton - newton[:, None]))             # i beats j
            bend = games * p * (1 - p)
            step = np.linalg.lstsq(np.diag(bend.sum(1)) - bend, (table - games * p).sum(1), rcond=None)[0]
            newton += (step - step.mean()).clip(-2, 2)
        ours = bradley_terry(wins, prior)
        difference = float(np.abs(ours - 1000 - 400 / math.log(10) * (newton - newton.mean())).max())
        ledger("Bradley-Terry ratings (points) against Newton's method", difference, peer="numpy", bound=1e-6)
        assert difference < 1e-6
        assert np.allclose(ours, points, atol=1e-2)
        assert ours.mean() == pytest.approx(1000)
        assert np.allclose(bradley_terry(np.stack([wins.T, wins]), prior)[1], ours, atol=1e-8)   # many at once


def test_two_systems_have_a_closed_form():
    votes = [Vote("a", str(i), "A", "B", c) for i, c in enumerate(["left"] * 7 + ["right"] * 2 + ["tie"] * 2)]
    names, wins = win_table(votes)
    assert wins.tolist() == [[0, 8], [3, 0]]
    gap = np.subtract(*bradley_terry(wins, prior=0))
    assert gap == pytest.approx(400 * math.log10(8 / 3))
    assert np.subtract(*bradley_terry(wins, prior=1)) == pytest.approx(400 * math.log10(8.5 / 3.5))


@pytest.mark.parametrize("wins", [[[0, 3], [0, 0]], [[0, 2, 0], [1, 0, 0], [0, 0, 0]],
                                  [[0, 1, 1], [1, 0, 1], [0, 0, 0]]])
def test_infinite_ratings_are_refused_without_a_prior(wins):
    with pytest.raises(ValueError, match="no finite ratings"):
        bradley_terry(np.array(wins, float), prior=0)
    assert np.isfinite(bradley_terry(np.array(wins, float))).all()


def test_rating_intervals_cover_the_truth():
    truth, hits, n = {"A": 1100, "B": 1000, "C": 900}, 0, 0
    for seed in range(25):
        for name, e in rate(simulated(truth, 3, 50, seed), samples=120, seed=seed).items():
            hits, n = hits + (e.low <= truth[name] <= e.high), n + 1
    assert 0.85 <= hits / n <= 1.0
    with pytest.raises(ValueError, match="no votes"):
        rate([Vote("a", "1", "A", "B", "skip")])


def test_rating_intervals_resample_items():
    """Every vote repeated by ten raters is no new information: the interval must not shrink."""
    few = simulated({"A": 1080, "B": 920}, 1, 40, seed=3)
    many = [Vote(f"r{k}", v.item, v.left, v.right, v.choice) for v in few for k in range(10)]
    one, ten = (rate(v, prior=0.01, samples=300)["A"] for v in (few, many))
    assert (ten.high - ten.low) == pytest.approx(one.high - one.low, rel=0.15)


# ------------------------------------------------------------------ agreement

def test_alpha_equals_krippendorffs_own_example():
    observers = ["123321412...", "1233224125.3", ".3332342251.", "1233244125 1.".replace(" ", "")]
    units = [[row[u] for row in observers if row[u] != "."] for u in range(12)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    numbers = [[int(value) for value in unit] for unit in units]
    assert krippendorff_alpha(numbers, lambda a, b: (a - b) ** 2) == pytest.approx(0.849, abs=5e-4)


def plain_alpha(units):
    """From the definition: disagreement within units over disagreement among all values."""
    units = [u for u in units if len(u) > 1]
    values = [v for u in units for v in u]
    within = sum(2 * sum(a != b for a, b in combinations(u, 2)) / (len(u) - 1) for u in units) / len(values)
    among = 2 * sum(a != b for a, b in combinations(values, 2)) / (len(values) * (len(values) - 1))
    return 1 - within / among


def test_alpha_equals_the_definition_and_nltk(ledger):
    rng = random.Random(1)
    worst = 0.0
    agreement_module = pytest.importorskip("nltk.metrics.agreement")
    for _ in range(100):
        raters, items = rng.randint(2, 5), rng.randint(3, 15)
        table = {(r, i): rng.choice("ABC"[:rng.randint(1, 3)]) for r in range(raters) for i in range(items)
                 if rng.random() < 0.8}
        units = [[v for (_, i), v in table.items() if i == item] for item in range(items)]
        ours = krippendorff_alpha(units)
        if math.isnan(ours):
            assert len({v for u in units if len(u) > 1 for v in u}) <= 1
            continue
        worst = max(worst, abs(ours - plain_alpha(units)))
        if all(len(u) == raters for u in units):
            theirs = agreement_module.AnnotationTask([(str(r), str(i), v) for (r, i), v in table.items()]).alpha()
            worst = max(worst, abs(ours - theirs))
    full = [[rng.choice("AB") for _ in range(3)] for _ in range(12)]
    theirs = agreement_module.AnnotationTask([(str(r), str(i), v) for i, u in enumerate(full)
                                              for r, v in enumerate(u)]).alpha()
    worst = max(worst, abs(krippendorff_alpha(full) - theirs))
    ledger("Krippendorff's alpha against its definition and nltk", worst, peer="nltk", bound=1e-9)
    assert worst < 1e-9


def test_agreement_is_about_systems_not_sides():
    votes = [Vote("a", "1", "A", "B", "left"), Vote("b", "1", "B", "A", "right"),     # both say A
             Vote("a", "2", "A", "B", "right"), Vote("b", "2", "A", "B", "right"),    # both say B
             Vote("c", "2", "A", "B", "skip")]
    assert agreement(votes) == 1
    assert math.isnan(agreement(votes[:1]))


# ------------------------------------------------------------------ how many votes

def test_sign_test_equals_scipys():
    stats = pytest.importorskip("scipy.stats")
    for wins in range(0, 40, 3):
        for losses in range(0, 40, 5):
            expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
            assert sign_test(wins, losses) == pytest.approx(expected)


@pytest.mark.parametrize("rate_,power", [(0.55, 0.8), (0.6, 0.8), (0.75, 0.9), (0.35, 0.8)])
def test_votes_needed_gives_the_power(rate_, power):
    """The exact power of the exact test at that number, from the binomial distribution."""
    stats = pytest.importorskip("scipy.stats")
    n = votes_needed(rate_, power=power)
    k = np.arange(n + 1)
    seen = np.array([stats.binomtest(int(i), n).pvalue < 0.05 for i in k])
    exact = stats.binom.pmf(k, n, rate_)[seen].sum()
    assert power - 0.08 < exact < power + 0.03       # the exact test is a little more careful than the formula
    with pytest.raises(ValueError, match="0.5"):
        votes_needed(0.5)


def test_flip_test_equals_scipys_and_the_sign_test():
    """Exact: all signs tried by scipy; with one vote an item it is the sign test."""
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(4)
    for _ in range(20):
        margins = [rng.choice([-3, -1, 0, 1, 2, 5]) for _ in range(rng.randint(2, 9))]
        theirs = stats.permutation_test((margins,), np.sum, permutation_type="samples", n_resamples=np.inf)
        assert flip_test(margins) == pytest.approx(theirs.pvalue), margins
    for wins, losses, ties in ((5, 5, 0), (9, 2, 3), (0, 6, 1), (40, 22, 9)):
        assert flip_test([1] * wins + [-1] * losses + [0] * ties) == pytest.approx(sign_test(wins, losses))
    assert flip_test([]) == flip_test([0, 0]) == 1.0


def test_dependent_votes_raise_no_false_alarms():
    """Equal systems, items with a better answer each, seven raters: a test on votes would say 20 % and more."""
    rng, alarms, naive, trials = np.random.default_rng(8), 0, 0, 600
    for _ in range(trials):
        won = rng.binomial(7, rng.choice([0.2, 0.8], 30))
        alarms += flip_test(2 * won - 7) < 0.05
        naive += sign_test(int(won.sum()), int(210 - won.sum())) < 0.05
    assert 0.02 < alarms / trials < 0.06 and naive / trials > 0.18


def test_summary_says_what_the_parts_say():
    votes = simulated({"A": 1100, "B": 900}, raters=3, items=20, seed=1)
    lines = vote_summary(votes).splitlines()
    count = Counter(v.choice for v in votes)
    won, lost = (sum(v.winner == name for v in votes) for name in "AB")
    assert lines[0] == f"60 votes of 3 raters: {won + lost} decided, {count['tie']} ties, 0 skips"
    assert lines[1:3] == [f"{name}: {r}" for name, r in rate(votes).items()]
    assert lines[3] == f"agreement (alpha): {agreement(votes):.2f}"
    margins = Counter({item: 0 for item in {v.item for v in votes}})
    for v in votes:
        margins[v.item] += (v.winner == "A") - (v.winner == "B")
    assert len(margins) == 20
    assert lines[4:] == [f"if both were equal (flip test on 20 items): p = {flip_test([*margins.values()]):.3f}"]
    only = [Vote("ada", "1", "A", "B", "skip")]
    assert vote_summary(only) == "1 votes of 1 raters: 0 decided, 0 ties, 1 skips"
    assert vote_summary([]).startswith("0 votes")
    three = simulated({"A": 1100, "B": 1000, "C": 900}, raters=2, items=9, seed=0)
    assert "flip test" not in vote_summary(three) and vote_summary(three).endswith("less than 20 are too narrow")


def test_matches_come_from_answers():
    [first, second] = make_matches(["a?", "b?"], {"x": ["1", "2"], "y": ["3", "4"]})
    assert (first.prompt, first.answers, second.answers) == ("a?", {"x": "1", "y": "3"}, {"x": "2", "y": "4"})
    assert first.item != second.item
    with pytest.raises(ValueError, match="'y' has 1 answers to 2 prompts"):
        make_matches(["a?", "b?"], {"x": ["1", "2"], "y": ["3"]})


# ------------------------------------------------------------------ the front ends

def test_panel_votes_on_click(tmp_path):
    votes = Votes(tmp_path / "v.jsonl")
    ballot = Ballot(MATCHES[:3], votes, "ada")
    panel = vote_panel(ballot)
    page, row = panel.children
    for choice in ("tie", "right", "skip"):
        shown = ballot.current()
        assert shown.left in page.value and shown.right in page.value
        assert "big</b>" not in page.value
        next(b for b in row.children if b.description == BUTTONS[choice]).click()
        assert Votes(votes.path).rows[-1].choice == choice       # on disk already
    assert "All done" in page.value and all(b.disabled for b in row.children)


def test_ratings_are_drawn_as_they_are(tmp_path):
    votes = Votes(tmp_path / "v.jsonl")
    assert rating_figure(votes) is None
    for v in simulated({"A": 1100, "B": 1000, "C": 900}, 1, 12, seed=2):
        votes.add(v)
    [ax] = rating_figure(votes).axes
    drawn = dict(zip([label.get_text() for label in ax.get_yticklabels()],
                     [(list(bar.get_xdata()), dot.get_xdata()[0]) for bar, dot in zip(ax.lines[::2], ax.lines[1::2])]))
    assert drawn == {name: ([r.low, r.high], r.value) for name, r in rate(votes.rows).items()}


def test_answers_are_shown_as_text(tmp_path):
    evil = Match("1", "<script>p</script>", {"A": "<img src=x onerror=alert(1)>", "B": "</div><b>bold</b>"})
    html = ballot_html(Ballot([evil], Votes(tmp_path / "v.jsonl"), "<i>ada</i>"))
    assert not any(tag in html for tag in ("<script", "<img", "<b>bold"))


@pytest.fixture
def tab(tmp_path):
    """The vote tab served by Gradio in a process of its own; (url, votes file)."""
    pytest.importorskip("gradio")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = ("import sys\nimport gradio as gr\nfrom minigpt.engine.ballots import Match\nfrom minigpt.engine.vote_ui import vote_tab\n"
            "m = [Match(f'q{i}', f'Prompt {i}?', {'big': f'big <b>says</b> {i}', 'small': f'small says {i}'})"
            " for i in range(3)]\n"
            "with gr.Blocks() as app:\n    with gr.Tab('Vote'):\n        vote_tab(lambda: m, sys.argv[1])\n"
            "app.launch(server_name='127.0.0.1', server_port=int(sys.argv[2]), quiet=True)\n")
    path = tmp_path / "tab.jsonl"
    server = subprocess.Popen([sys.executable, "-c", code, str(path), str(port)], env=os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "GRADIO_ANALYTICS_ENABLED": "False"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert server.poll() is None, "the server ended"
        time.sleep(0.5)
    else:
        pytest.fail("the tab did not start")
    yield f"http://127.0.0.1:{port}", path
    server.terminate()
    server.wait(20)


def test_vote_tab_in_a_browser(tab):
    """Two visitors with a name each vote in Chromium; every click is in the file, and nobody sees a system's name."""
    api = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no Chromium on this machine")
    url, path = tab
    with api.sync_playwright() as p:
        browser = launch(p)
        pages = {}
        for rater in ("ada", "bob"):
            page = pages[rater] = browser.new_context().new_page()
            page.goto(url)
            page.get_by_label("Your name").fill(rater)
            page.get_by_role("button", name="Start").click()
            page.get_by_text("3 to go").wait_for()
            api.expect(page.get_by_label("Left", exact=True)).to_have_value(re.compile("says"), timeout=60_000)
        for left, (choice, text) in zip((2, 1, 0), list(BUTTONS.items())[:3]):
            page = pages["ada"]
            prompt = page.get_by_label("Asked").input_value()
            shown = page.get_by_label("Left", exact=True).input_value()
            page.get_by_role("button", name=text).click()
            page.get_by_text(f"{left} to go" if left else "All done").wait_for()
            if left:
                api.expect(page.get_by_label("Asked")).not_to_have_value(prompt, timeout=60_000)
            vote = Votes(path).rows[-1]
            assert (vote.rater, vote.choice) == ("ada", choice)
            assert prompt == f"Prompt {vote.item[1:]}?" and shown.startswith(vote.left)
        pages["bob"].get_by_role("button", name="Skip").click()
        pages["bob"].get_by_text("2 to go").wait_for()
        pages["bob"].get_by_text("Results").click()
        pages["bob"].get_by_role("button", name="Count the votes").click()
        box = pages["bob"].get_by_label("Votes", exact=True)
        api.expect(box).to_have_value(re.compile("4 votes of 2 raters"))
        assert box.input_value() == vote_summary(Votes(path).rows)
        if folder := os.environ.get("MINIGPT_SCREENSHOTS"):
            pages["bob"].screenshot(path=str(Path(folder) / "vote_tab.png"))
        browser.close()
    assert Counter(v.rater for v in Votes(path).rows) == {"ada": 3, "bob": 1}
