"""Chapter 06: likelihood, intervals, choices, n-grams and replies against second ways."""
import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ttest_rel

from minigpt.engine.tokenizer import Tokenizer
from minigpt.chat_format import ChatRenderer
from minigpt.engine.dataset_readers import load_chats
from minigpt.deeper.calibration import calibration, calibration_error
from minigpt.engine.choices import (
    Question, _option_ids as option_ids, _read_question as read_question, choice_accuracy, credit, load_questions,
    score_options)
from minigpt.engine.ngram import NGram
from minigpt.engine.replies import reply_all
from minigpt.engine.scoring import score_chats, score_ids, score_rows
from minigpt.evaluation import (
    Scored, Scores, bits_per_byte, bootstrap, paired_difference, perplexity, score_texts, wilson, windows)
from minigpt.generation import generate
from minigpt.gpt2 import GPT2, GPT2Config


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained()


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    model = GPT2(GPT2Config.preset("nano", vocab_size=300, block_size=32)).eval()
    for p in model.parameters():  # far from uniform, so that a wrong index would show
        p.data *= 4
    return model


@pytest.fixture(scope="module")
def trigram(tokenizer):
    renderer = ChatRenderer(tokenizer)
    return NGram(tokenizer.vocab_size).fit(renderer.render(c["messages"]).ids for c in load_chats(limit=300))


def documents(lengths, vocab=300, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]


# ------------------------------------------------------------------ likelihood

@torch.inference_mode()
def brute_force(model, ids, size, stride):
    """One forward pass a token, its context cut as the definition of a stride says: the first window holds `size`
    tokens, each later one ends `stride` further; a token's context begins `size` before the last input's end."""
    found = []
    for t in range(1, len(ids)):
        end = size + 1 if t <= size else size + 1 + math.ceil((t - size) / stride) * stride
        start = max(0, min(end, len(ids)) - size - 1)
        logits = model(torch.tensor([ids[start:t]]))[0, -1].double()
        found.append((logits[ids[t]] - torch.logsumexp(logits, 0)).item())
    return found


@pytest.mark.parametrize("size,stride", [(32, 32), (32, 16), (32, 1), (7, 3), (1, 1)])
def test_strided_scores_equal_brute_force(nano, ledger, size, stride):
    worst = 0.0
    for ids in documents([2, 7, 8, 9, 33, 34, 75]):
        [scored] = score_ids(nano, [ids], size=size, stride=stride)
        brute = brute_force(nano, ids, size, stride)
        assert len(scored.logprob) == len(ids) - 1
        worst = max(worst, float(np.abs(scored.logprob.double().numpy() - brute).max()))
    ledger("strided log-probabilities against one pass a token", worst, peer="", bound=1e-4)
    assert worst < 1e-4


def test_scores_do_not_depend_on_the_batch(nano, ledger):
    docs = documents([2, 40, 5, 100, 33, 3, 64, 17])
    one = score_ids(nano, docs, batch_tokens=1)
    worst = 0.0
    for batch_tokens in (16, 64, 100, 4096):
        for a, b in zip(one, score_ids(nano, docs, batch_tokens=batch_tokens)):
            worst = max(worst, (a.logprob - b.logprob).abs().max().item())
            assert torch.equal(a.correct, b.correct)
    ledger("log-probabilities: batches of any size against one by one", worst, peer="torch", bound=1e-4)
    assert worst < 1e-4


def test_windows_count_every_token_once_with_enough_context():
    rng = random.Random(1)
    for _ in range(300):
        size = rng.randint(1, 40)
        n, stride = rng.randint(0, 120), rng.randint(1, size)
        cuts = list(windows(n, size, stride))
        assert [t for _, end, first in cuts for t in range(first, end)] == list(range(1, n))
        for start, end, first in cuts:
            assert end - start <= size + 1                                       # fits the model
            assert start == 0 or first - start >= size - stride + 1              # context of the first counted token


def test_scores_of_a_row_are_those_of_cross_entropy(nano):
    ids = documents([30])[0]
    [scored] = score_rows(nano, [ids])
    with torch.inference_mode():
        logits = nano(torch.tensor([ids[:-1]]))[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    assert torch.allclose(-scored.logprob, expected, atol=1e-5)
    assert torch.equal(scored.correct, logits.argmax(-1) == torch.tensor(ids[1:]))
    assert torch.allclose(scored.confidence, logits.softmax(-1).max(-1).values, atol=1e-6)


def test_perplexity_and_bits_per_byte_of_texts(nano):
    token_bytes = [bytes([b]) for b in range(256)] + [b"<|endoftext|>"]
    tokenizer = Tokenizer(token_bytes, [], {"<|endoftext|>": 256})
    texts = ["héllo wörld 🦊", "plain", "狐 " * 30]
    nll, tokens = 0.0, 0
    for text in texts:
        raw = [256, *text.encode("utf-8")]
        nll -= sum(brute_force(nano, raw, 32, 8))
        tokens += len(raw) - 1
    assert perplexity(nano, tokenizer, texts, stride=8).value == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    # one token a byte here, so the two measures are tied: bits per byte = log2(perplexity)
    assert bits_per_byte(nano, tokenizer, texts, stride=8).value == pytest.approx(nll / tokens / math.log(2), rel=1e-4)
    assert score_texts(nano, tokenizer, texts).n_bytes == [len(t.encode()) for t in texts]


def test_only_the_assistant_counts_in_chats(trigram, tokenizer):
    renderer = ChatRenderer(tokenizer)
    chats = load_chats("held", limit=6)
    scores = score_chats(trigram, renderer, chats)
    for chat, doc, n in zip(chats, scores.documents, scores.n_bytes):
        ids, mask = renderer.render(chat["messages"])
        logits = trigram(torch.tensor([ids[:-1]]))[0]
        expected = [logits[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]]
        assert np.allclose(doc.logprob, expected, atol=1e-4)
        assert n == sum(len(m["content"].encode()) for m in chat["messages"] if m["role"] == "assistant")


@pytest.mark.parametrize("call,words", [
    (lambda m, t: score_rows(m, [[1, 2], [3]]), "row 1 has 1 token"),
    (lambda m, t: score_rows(m, [[1] * 50]), "row 0 has 50 tokens"),
    (lambda m, t: score_ids(m, [[1, 2], []]), "document 1 is empty"),
    (lambda m, t: score_ids(m, [[1] * 9], stride=0), None),
    (lambda m, t: score_ids(m, [[1] * 9], stride=33), "stride=33"),
    (lambda m, t: score_texts(m, t, ["a"]), "20000 ids"),
    (lambda m, t: score_texts(m, t, "a text"), "one str"),
    (lambda m, t: bootstrap(np.zeros((0, 2)), sum), r"\(0, 2\)"),
])
def test_bad_input_is_named(nano, tokenizer, call, words):
    if words is None:  # 0 means the default
        assert call(nano, tokenizer)
        return
    with pytest.raises(ValueError, match=words):
        call(nano, tokenizer)


def test_scores_subset_and_columns():
    docs = [Scored(torch.full((n,), -1.0), torch.arange(n) % 2 == 0, torch.ones(n)) for n in (2, 3, 4)]
    scores = Scores(docs, [4, 5, 6])
    assert scores.columns().tolist() == [[2, 2, 4, 1], [3, 3, 5, 2], [4, 4, 6, 2]]
    assert scores.subset([2, 0]).columns().tolist() == [[4, 4, 6, 2], [2, 2, 4, 1]]
    assert scores.perplexity().value == pytest.approx(math.e)
    assert Question("c", ("a",)).group == ""


# ------------------------------------------------------------------ intervals, calibration

def test_bootstrap_interval_equals_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 200, 60).astype(float)
    nll = tokens * rng.gamma(4, 0.6, 60)
    ours = bootstrap(np.stack([nll, tokens], 1), lambda s: math.exp(s[0] / s[1]), samples=6000)
    theirs = stats.bootstrap((nll, tokens), lambda a, b, axis: np.exp(a.sum(axis) / b.sum(axis)), paired=True,
                             vectorized=True, method="percentile", n_resamples=6000, random_state=1)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert abs(ours.low - theirs.confidence_interval.low) < 0.05 * width
    assert abs(ours.high - theirs.confidence_interval.high) < 0.05 * width
    assert ours.value == pytest.approx(math.exp(nll.sum() / tokens.sum()))


def test_bootstrap_interval_covers_the_truth():
    """95 % intervals of 200 made-up data sets hold the true mean about 95 times in 100."""
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        sample = rng.exponential(3.0, 80)
        e = bootstrap(np.stack([sample, np.ones(80)], 1), lambda s: s[0] / s[1], samples=300, seed=seed)
        hits += e.low <= 3.0 <= e.high
    assert 0.88 <= hits / 200 <= 0.99


def test_calibration_equals_a_plain_loop():
    rng = np.random.default_rng(3)
    p = rng.random(500)
    right = rng.random(500) < p ** 2
    ours = calibration(torch.tensor(p), torch.tensor(right), bins=7)
    error = 0.0
    for b in range(7):
        inside = [i for i in range(500) if b / 7 <= p[i] < (b + 1) / 7]
        error += len(inside) / 500 * abs(np.mean(p[inside]) - np.mean(right[inside]))
        assert ours.accuracy[b] == pytest.approx(np.mean(right[inside]))
    assert ours.error == pytest.approx(error)
    assert calibration(torch.ones(3), torch.ones(3)).error == 0       # confidence 1.0 has a bin, too


def test_calibration_error_is_that_of_all_tokens_with_an_interval_over_documents():
    rng = np.random.default_rng(4)
    documents = []
    for n in (3, 40, 17, 60, 25, 80):
        p = torch.tensor(rng.random(n))
        documents.append(Scored(p.log(), torch.tensor(rng.random(n)) < p ** 2, p))
    p, right = (torch.cat([getattr(d, name) for d in documents]) for name in ("confidence", "correct"))
    found = calibration_error(documents)
    assert found.value == pytest.approx(calibration(p, right).error) and found.n == 6
    again = []                                                        # the bootstrap as a plain loop
    for _ in range(600):
        some = [documents[i] for i in rng.integers(6, size=6)]
        again.append(calibration(torch.cat([d.confidence for d in some]), torch.cat([d.correct for d in some])).error)
    low, high = np.quantile(again, [0.025, 0.975])
    assert abs(found.low - low) < 0.15 * (high - low) and abs(found.high - high) < 0.15 * (high - low)


def test_paired_difference_sees_what_two_intervals_hide():
    """Hard and easy items make each mean uncertain; the difference is that of scipy's paired t-test."""
    rng = np.random.default_rng(5)
    hard = rng.exponential(3.0, 200)
    better = hard - 0.2 + rng.normal(0, 0.3, 200)
    found = paired_difference(hard, better)
    theirs = ttest_rel(better, hard).confidence_interval()
    assert found.value == pytest.approx((better - hard).mean()) and found.n == 200
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    alone = [bootstrap(np.stack([x, np.ones(200)], 1), lambda s: s[0] / s[1]) for x in (hard, better)]
    assert alone[0].low < alone[1].high and found.high < 0


def test_an_interval_of_a_share_always_has_a_width_and_its_n():
    for right, n in ((0, 1), (1, 1), (0, 12), (12, 12), (20, 20), (3.5, 7)):
        share = wilson(right, n)
        assert 0 <= share.low <= share.value <= share.high <= 1 and share.low < share.high
        assert str(share).endswith(f" n={n}")
    assert wilson(12, 12).low == pytest.approx(binomtest(12, 12).proportion_ci(method="wilson").low, abs=1e-5)
    with pytest.raises(ValueError, match="n=0"):
        wilson(0, 0)


# ------------------------------------------------------------------ choices

def test_bundled_sets_are_sound():
    sets = {name: load_questions(name) for name in ("questions", "goals", "cloze", "pairs")}
    assert {name: len(items) for name, items in sets.items()} == {"questions": 60, "goals": 40, "cloze": 60, "pairs": 84}
    for q in sets["questions"]:
        assert len(q.options) == len(set(q.options)) == 4
    for q in sets["pairs"]:
        assert q.options[0] != q.options[1] and q.group
    for items in (sets["questions"], sets["goals"]):    # the place of the answer gives nothing away
        counts = np.bincount([q.answer for q in items])
        assert counts.max() / len(items) < 0.62
    texts = [q.context + q.options[0] for items in sets.values() for q in items]
    assert len(set(texts)) == len(texts)


def test_options_are_scored_one_by_one(trigram, tokenizer):
    questions = load_questions("questions", limit=5) + load_questions("pairs", limit=4) + load_questions("cloze", limit=4)
    for renderer in (None, ChatRenderer(tokenizer)):
        for q, options in zip(questions, score_options(trigram, tokenizer, questions, renderer=renderer)):
            for text, scored in zip(q.options, options):
                ids, begin = option_ids(tokenizer, q.context, text, renderer)
                logits = trigram(torch.tensor([ids[:-1]]))[0]
                logprob = sum(logits[t - 1, ids[t]].item() for t in range(begin, len(ids)))
                greedy = all(logits[t - 1].argmax() == ids[t] for t in range(begin, len(ids)))
                assert scored.logprob == pytest.approx(logprob, abs=1e-3)
                assert (scored.tokens, scored.n_bytes, scored.greedy) == (len(ids) - begin, len(text.encode()), greedy)
            if renderer is None and q.context:   # the border does not change how the whole is cut
                whole = tokenizer.encode_ordinary(f"{q.context} {q.options[0]}")
                assert option_ids(tokenizer, q.context, q.options[0])[0][1:] == whole


def test_accuracy_counts(trigram, tokenizer):
    pairs = load_questions("pairs")
    scored = score_options(trigram, tokenizer, pairs)
    right = [(1 + np.sign(round(options[0].logprob - options[1].logprob, 4))) / 2 for options in scored]
    assert 0.5 in right    # a trigram ties where the mistake lies outside its window
    assert choice_accuracy(pairs, scored).value == pytest.approx(np.mean(right))
    with pytest.raises(ValueError, match="word"):
        credit(pairs[0], scored[0], by="word")


def test_questions_from_a_local_hub_folder(tmp_path):
    """`load_dataset` of a repository folder with parquet files in ARC's and PIQA's schema, offline."""
    datasets = pytest.importorskip("datasets")
    arc = [{"id": "1", "question": "What?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}]
    piqa = [{"goal": "To fly,", "sol1": "walk", "sol2": "flap", "label": 1}]
    for name, rows, split in (("arc", arc, "test"), ("piqa", piqa, "validation")):
        (tmp_path / name / "data").mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / name / "data" / f"{split}-00000-of-00001.parquet"))
        (tmp_path / name / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n"
            f"    path: data/{split}-*\n---\n", encoding="utf-8")
        [question] = load_questions(tmp_path / name, split=split)
        assert question.answer == 1 and question.options[1] in ("y", "flap")


@pytest.mark.parametrize("row,words", [
    ({"question": "?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}, "answerKey 'B'"),
    ({"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "label -1"),
    ({"text": "word"}, "fields"), ({"prompt": "x"}, r"\['prompt'\]"),
])
def test_bad_questions_are_named(row, words):
    with pytest.raises(ValueError, match=words):
        read_question(row, "row 7")
    with pytest.raises(ValueError, match="row 7"):
        read_question(row, "row 7")


def test_missing_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        load_questions(tmp_path / "nothing.jsonl")


# ------------------------------------------------------------------ the n-gram

def test_ngram_is_a_distribution_and_equals_the_recursion():
    rows = documents([40, 30], vocab=6, seed=4)
    model = NGram(6, order=3).fit(rows)

    def probability(history, token):           # Witten & Bell, written as the recursion of the paper
        after = [r[i] for r in rows for i in range(max(1, len(history)), len(r))
                 if r[i - len(history):i] == history]
        shorter = 1 / 6 if not history else probability(history[1:], token)
        kinds = len(set(after))
        return (after.count(token) + kinds * shorter) / (len(after) + kinds) if after else shorter

    for history in ([0, 1], [3, 2], [5, 5], [4]):
        p = model.probabilities(history)
        assert p.sum() == pytest.approx(1)
        assert [probability(history, t) for t in range(6)] == pytest.approx(p.tolist())
    logits = model(torch.tensor([[0, 1], [3, 2]]))
    assert np.allclose(logits[1, -1].exp(), model.probabilities([3, 2]), atol=1e-6)


def test_ngram_generates_as_a_plain_loop(trigram):
    prompts = [[0, 1, 400], [0, 1], [0, 1, 5, 6, 7]]
    drawn = generate(trigram, prompts, max_new_tokens=12, temperature=0, stop_ids=[2], decoder=trigram.decoder())
    for prompt, generation in zip(prompts, drawn):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (token := int(trigram.probabilities(ids).argmax())) != 2:
            ids.append(token)
        assert generation.ids == ids[len(prompt):]


def test_answers_do_not_depend_on_the_batch(tokenizer):
    torch.manual_seed(3)
    model = GPT2(GPT2Config.preset("mini", n_layer=1)).eval()
    renderer = ChatRenderer(tokenizer)
    asked = load_chats("held", limit=7)
    together = reply_all(model, renderer, asked, max_new_tokens=8)
    assert together == [reply_all(model, renderer, [a], max_new_tokens=8)[0] for a in asked]
    open_ended = [{"messages": c["messages"][:-1]} for c in asked]              # a last answer is left out
    assert together == reply_all(model, renderer, open_ended, max_new_tokens=8)
    seeds = [5, 9, 2, 1, 3, 8, 7]                                               # and so with draws, a seed for each
    drawn = reply_all(model, renderer, asked, max_new_tokens=8, seed=seeds, temperature=1.0, batch_size=3)
    assert drawn[3] == reply_all(model, renderer, [asked[3]], max_new_tokens=8, seed=[1], temperature=1.0)[0]
    assert drawn != together


def test_a_question_that_does_not_fit_is_answered_with_nothing(tokenizer):
    """The other answers, and their places, are those that the model gives without it; who asks wrongly is still told."""
    torch.manual_seed(3)
    model = GPT2(GPT2Config.preset("mini", n_layer=1, block_size=64)).eval()
    renderer = ChatRenderer(tokenizer)
    long, *short = [{"messages": [{"role": "user", "content": text}]}
                    for text in ("so " * 100, "Hi!", "What is a whale?")]
    with pytest.warns(UserWarning, match="1 of 3 conversations"):
        found = reply_all(model, renderer, [short[0], long, short[1]], max_new_tokens=8)
    assert found[1] == ("", [], "length")
    assert [found[0], found[2]] == reply_all(model, renderer, short, max_new_tokens=8)
    with pytest.warns(UserWarning, match="2 of 2 conversations"):
        assert [r.text for r in reply_all(model, renderer, short, max_new_tokens=64)] == ["", ""]       # no room at all
    old = [{"role": "user", "content": "so " * 40}, {"role": "assistant", "content": "No."}, *short[1]["messages"]]
    assert reply_all(model, renderer, [{"messages": old}], max_new_tokens=8) == [found[2]]       # the oldest go
    with pytest.raises(ValueError, match="the user has to begin"):
        nobody = {"messages": [{"role": "system", "content": "Be kind."}]}
        reply_all(model, renderer, [short[0], nobody], max_new_tokens=8)
