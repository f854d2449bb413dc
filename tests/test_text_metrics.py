"""The metrics of texts: equal to sacrebleu's and rouge-score's, or to a plain second way."""
import random

import pytest

from minigpt.deeper.text_metrics import (
    bleu, chrf, distinct, exact_match, repetition, rouge, token_f1, tokenize_13a)


# ------------------------------------------------------------------ BLEU and chrF

VOCABULARY = ("the a cat dog sat on mat is not fish, air. \"well\" it's 3.5 1,000 well-known x-1 5-6 (a) &amp; &quot; é ü "
              "狐 🦊 <skipped> U.S. e.g. -\n \n \t $5 50% a/b [x] {y} ~ ` ^ _ @ # * + = | \\ ; : ! ? ... 'tis don't 1.000,5"
              ).split(" ")
EDGES = [
    ([""], [[""]]), ([""], [["a b"]]), (["a"], [[""]]), (["a"], [["a"]]), (["a b c"], [["a b c"]]),
    (["a b c d"], [["a b c d"]]), (["x"], [["a b c d e f"]]), ([".", ","], [["."], ["."]]),
    (["the the the the the"], [["the cat"]]), (["a b c d e"], [["a b", "a b c d e f g h"]]),
    (["a b c"], [["a b", "a b c d"]]), (["A B C D"], [["a b c d"]]), (["  a  b  "], [["a b"]]),
    (["&lt;b&gt; &amp;amp;"], [["<b> &amp;"]]), (["a" * 300], [["a" * 299]]), (["", "a b c d"], [["x"], ["a b c d"]]),
    (["ｆｕｌｌ　ｗｉｄｔｈ"], [["full width"]]), (["a\u00a0b\u2003c"], [["a b c"]]),
]


def random_case(rng):
    def sentence(n):
        return " ".join(rng.choice(VOCABULARY) for _ in range(n))

    hypotheses = [sentence(rng.choice([0, 1, 2, 3, 4, 5, 8, 15])) for _ in range(rng.choice([1, 1, 2, 5]))]
    several = rng.choice([1, 1, 2, 3])
    references = []
    for h in hypotheses:
        own = []
        for _ in range(several):
            words = h.split(" ") if rng.random() < 0.6 else sentence(rng.choice([0, 1, 2, 3, 6, 12])).split(" ")
            for _ in range(rng.randint(0, 3)):
                words[rng.randrange(len(words))] = rng.choice(VOCABULARY)
            if rng.random() < 0.2:
                rng.shuffle(words)
            own.append(" ".join(words))
        references.append(own)
    return hypotheses, references


def test_bleu_and_chrf_equal_sacrebleu(ledger):
    metrics = pytest.importorskip("sacrebleu.metrics")
    rng = random.Random(0)
    cases = EDGES + [random_case(rng) for _ in range(500)]
    worst = {"bleu": 0.0, "chrf": 0.0}
    for hypotheses, references in cases:
        streams = [list(s) for s in zip(*references)]
        for smoothing in ("exp", "floor", "add-k", "none"):
            value = rng.choice([None, 0.3]) if smoothing in ("floor", "add-k") else None
            effective, lower, order = rng.random() < 0.5, rng.random() < 0.3, rng.choice([4, 4, 4, 2, 1, 5])
            theirs = metrics.BLEU(smooth_method=smoothing, smooth_value=value, effective_order=effective,
                                  lowercase=lower, max_ngram_order=order).corpus_score(hypotheses, streams)
            ours = bleu(hypotheses, references, smoothing=smoothing, smooth_value=value, effective_order=effective,
                        lowercase=lower, max_order=order)
            worst["bleu"] = max(worst["bleu"], abs(ours.score - theirs.score))
            assert ours.brevity_penalty == pytest.approx(theirs.bp, abs=1e-12)
            assert (ours.hypothesis_length, ours.reference_length) == (theirs.sys_len, theirs.ref_len)
        words, chars, beta = rng.choice([0, 2]), rng.choice([6, 6, 3, 1]), rng.choice([2, 1, 3])
        theirs = metrics.CHRF(word_order=words, char_order=chars, beta=beta, lowercase=lower)
        ours = chrf(hypotheses, references, word_order=words, char_order=chars, beta=beta, lowercase=lower)
        worst["chrf"] = max(worst["chrf"], abs(ours - theirs.corpus_score(hypotheses, streams).score))
    for name, difference in worst.items():
        ledger(f"{name} on {len(cases)} random and edge cases", difference, peer="sacrebleu", bound=1e-9)
        assert difference <= 1e-9, name


def test_13a_tokens_equal_sacrebleus():
    peer = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    rng = random.Random(5)
    alphabet = [chr(c) for c in range(32, 127)] + list("\n\té狐🦊“”—…0123456789.,.,--&;") + ["&lt;", "<skipped>", "-\n"]
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40)))
        assert tokenize_13a(text) == peer(text).split(), repr(text)


@pytest.mark.parametrize("call,words", [
    (lambda: bleu("a", ["a"]), "lists of texts"),
    (lambda: bleu(["a"], "a"), "lists of texts"),
    (lambda: bleu([], []), "0 hypotheses"),
    (lambda: bleu(["a", "b"], ["a"]), "2 hypotheses and 1 references"),
    (lambda: bleu(["a"], [[]]), "hypothesis 0 has no reference"),
    (lambda: bleu(["a"], ["a"], smoothing="best"), "best"),
    (lambda: chrf(["a"], []), "1 hypotheses and 0 references"),
])
def test_bad_bleu_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------ ROUGE

def test_rouge_equals_rouge_score(ledger):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    rng, worst = random.Random(2), 0.0
    pairs = [(h, r) for hypotheses, references in EDGES + [random_case(rng) for _ in range(300)]
             for h, several in zip(hypotheses, references) for r in several]
    for said, meant in pairs:
        for kind, theirs in scorer.score(meant, said).items():
            ours = rouge(said, meant, kind.removeprefix("rouge"))
            worst = max(worst, *(abs(a - b) for a, b in zip(ours, theirs)))
    ledger(f"ROUGE-1, 2 and L of {len(pairs)} random and edge cases", worst, peer="rouge_score", bound=1e-9)
    assert worst <= 1e-9


def test_the_longest_common_subsequence_by_all_subsequences():
    """Of all choices of words of the one text, the longest that is in order in the other."""
    def in_order(words, text):
        rest = iter(text)
        return all(word in rest for word in words)

    rng = random.Random(3)
    for _ in range(60):
        a, b = ([rng.choice("abcd") for _ in range(rng.randint(1, 8))] for _ in range(2))
        chosen = ([w for n, w in enumerate(a) if mask >> n & 1] for mask in range(2 ** len(a)))
        longest = max(len(words) for words in chosen if in_order(words, b))
        found = rouge(" ".join(a), " ".join(b), "L")
        assert found == pytest.approx((longest / len(a), longest / len(b), 2 * longest / (len(a) + len(b))))


def test_an_unknown_rouge_is_named():
    with pytest.raises(ValueError, match="kind='3'"):
        rouge("a", "b", "3")


# ------------------------------------------------------------------ text measures

SQUAD = [("The Eiffel Tower.", "eiffel tower", 1, 1.0), ("in Paris, France", "Paris", 0, 0.5), ("", "", 1, 1.0),
         ("", "x", 0, 0.0), ("a cat a cat", "the cat", 0, 2 / 3), ("no!", "yes", 0, 0.0), ("an apple", "Apple", 1, 1.0)]


@pytest.mark.parametrize("said,meant,em,f1", SQUAD)
def test_exact_match_and_f1_by_hand(said, meant, em, f1):
    assert exact_match(said, meant) == bool(em)
    assert token_f1(said, meant) == pytest.approx(f1)


def test_text_measures_by_brute_force():
    rng = random.Random(8)
    texts = [" ".join(rng.choice("abcde") for _ in range(rng.randint(0, 40))) for _ in range(20)]
    for n in (1, 2, 4):
        grams = [tuple(w[i:i + n]) for w in (t.split() for t in texts) for i in range(len(w) - n + 1)]
        assert distinct(texts, n) == pytest.approx(len(set(grams)) / len(grams))
    for text in texts:
        words = text.split()
        grams = [tuple(words[i:i + 4]) for i in range(len(words) - 3)]
        again = sum(g in grams[:i] for i, g in enumerate(grams))
        assert repetition(text) == pytest.approx(again / len(grams) if grams else 0)
