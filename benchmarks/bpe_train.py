"""Train a byte-level BPE with the GPT-2 split pattern: seconds and added peak RSS.

  python benchmarks/bpe_train.py [--quick] [--only NAME ...] [--repeat 3] [--minbpe DIR]
  (once before: python benchmarks/prepare_text.py)
  MINBPE_DIR / --minbpe: a checkout of karpathy/minbpe

Every run is a fresh process that gets the same list of documents; the time covers everything from the
documents to a trained vocabulary (pre-tokenisation, counting, merging), the memory is the process's peak
RSS less its RSS just before training (the text is loaded by then). `cpu_s` is the process's CPU time:
compare that one for single-threaded trainers when the machine is busy. `minigpt-2` is minigpt with two counting
processes: its CPU time and memory are those of the main process only, its wall time is the figure that counts.
`same_merges` says whether minigpt's merges are HF tokenizers' merges, in the same order.
"""
from __future__ import annotations

import argparse
import os
import sys
import time

import _common as c

DOC_CHARS = 65536
MINBPE_VOCAB = 256 + 64  # it would need many minutes for 1000


def documents(text: str) -> list[str]:
    """Pieces of about DOC_CHARS characters, cut at line ends."""
    docs, start = [], 0
    while start < len(text):
        end = start + DOC_CHARS
        end = len(text) if end >= len(text) else text.find("\n", end) + 1 or len(text)
        docs.append(text[start:end])
        start = end
    return docs


# ---------------------------------------------------------------- trainers: (docs, vocab_size) -> set of token bytes

def load_project(num_proc: int = 1):
    """The project's BPE trainer (docs, vocab_size) -> list of token bytes, bytes first, then one for each merge."""
    if c.project() is None:
        return None
    from minigpt.engine.tokenizer import Tokenizer
    return lambda docs, vocab_size: Tokenizer.train(docs, vocab_size, num_proc=num_proc).token_bytes


def train_hf(docs, vocab_size):
    from tokenizers import Tokenizer as HFTokenizer, models, pre_tokenizers, trainers
    tok = HFTokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.train_from_iterator(docs, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=0, show_progress=False))
    table = unicode_to_byte()
    vocab = tok.get_vocab()
    return [bytes(table[ch] for ch in t) for t in sorted(vocab, key=vocab.get)]


def train_rustbpe(docs, vocab_size):
    import rustbpe
    tok = rustbpe.Tokenizer()
    tok.train_from_iterator(iter(docs), vocab_size, pattern=c.GPT2_SPLIT)
    return {bytes(b) for b, _ in tok.get_mergeable_ranks()}


def train_bpeasy(docs, vocab_size):
    import bpeasy
    return set(bpeasy.train_bpe(iter(docs), c.GPT2_SPLIT, 128, vocab_size))


def train_minbpe(docs, vocab_size):
    from minbpe import RegexTokenizer
    tok = RegexTokenizer(c.GPT2_SPLIT)
    tok.train("".join(docs), vocab_size)
    return set(tok.vocab.values())


def train_python_sketch(docs, vocab_size):
    """What plain Python can do: count distinct pre-tokens once, keep pair counts and a pair -> words
    index up to date, take the best pair from a heap whose stale entries are skipped."""
    import heapq
    import re
    from collections import Counter, defaultdict
    import regex
    general = regex.compile(c.GPT2_SPLIT).findall
    ascii_only = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+").findall
    words = Counter()
    for doc in docs:
        words.update((ascii_only if doc.isascii() else general)(doc))
    vocab = [bytes([i]) for i in range(256)]
    seqs, freqs = [list(w.encode()) for w in words], list(words.values())
    counts, where = defaultdict(int), defaultdict(set)
    for i, s in enumerate(seqs):
        f = freqs[i]
        for pair in zip(s, s[1:]):
            counts[pair] += f
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while len(vocab) < vocab_size and heap:
        n, pair = heapq.heappop(heap)
        if counts.get(pair, 0) != -n:  # stale: push it again with today's count
            if counts.get(pair, 0) > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        if n == 0:
            break
        a, b = pair
        new, changed = len(vocab), set()
        vocab.append(vocab[a] + vocab[b])
        for i in where.pop(pair):
            s, f, out, k = seqs[i], freqs[i], [], 0
            last = len(s) - 1
            while k <= last:
                if s[k] == a and k < last and s[k + 1] == b:
                    out.append(new)
                    k += 2
                else:
                    out.append(s[k])
                    k += 1
            if len(out) == len(s):
                continue
            for p in zip(s, s[1:]):
                counts[p] -= f
            for p in zip(out, out[1:]):
                counts[p] += f
                if new in p:
                    where[p].add(i)
                    changed.add(p)
            seqs[i] = out
        counts.pop(pair, None)
        for p in changed:
            heapq.heappush(heap, (-counts[p], p))
    return set(vocab)


def unicode_to_byte() -> dict[str, int]:
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {chr(b): b for b in keep}, 0
    for b in range(256):
        if b not in keep:
            table[chr(256 + extra)] = b
            extra += 1
    return table


TRAINERS = {"hf-tokenizers": train_hf, "rustbpe": train_rustbpe, "bpeasy": train_bpeasy,
            "minbpe": train_minbpe, "python-sketch": train_python_sketch,
            "minigpt": None, "minigpt-2": None}


def one(name, text_name, vocab_size, minbpe_dir):
    """Runs in its own process."""
    docs = documents(c.load_text(text_name))
    train = TRAINERS[name]
    if name.startswith("minigpt"):
        train = load_project(2 if name == "minigpt-2" else 1)
        if train is None:
            return None
    else:  # import outside the timing
        module, folder = {"hf-tokenizers": ("tokenizers", None), "rustbpe": ("rustbpe", None), "bpeasy": ("bpeasy", None),
                          "minbpe": ("minbpe", minbpe_dir), "python-sketch": ("regex", None)}[name]
        if c.find_module(module, folder) is None:
            raise ImportError(f"{module} isn't importable")
    base = c.rss_mb()
    c.reset_peak_rss()
    t, cpu = time.perf_counter(), time.process_time()
    tokens = train(docs, vocab_size)
    wall, cpu = time.perf_counter() - t, time.process_time() - cpu
    return {"s": wall, "cpu_s": cpu, "added_mb": c.vm_hwm_mb() - base, "tokens": frozenset(tokens), "order": list(tokens)}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--minbpe", default=os.environ.get("MINBPE_DIR"))
    ap.add_argument("--only", nargs="*", default=[t for t in TRAINERS if t != "minigpt-2" or c.threads() > 1])
    ap.add_argument("--repeat", type=int, default=3)
    ap.add_argument("--quick", action="store_true", help="the 1 MB text only")
    ap.add_argument("--timeout", type=float, default=180)
    a = ap.parse_args()
    cases = [("text-1mb.txt", 1000), ("text-1mb.txt", 5000), ("text-1mb.txt", 20000), ("text-20mb.txt", 20000)]
    if a.quick:
        cases = cases[:3]
    os.environ.setdefault("RAYON_NUM_THREADS", str(c.threads()))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    rows = []
    for text, vocab in cases:
        runs, reasons, sets, orders = {n: [] for n in a.only}, {}, {}, {}
        for round_ in range(a.repeat):  # rounds, so that noise hits every trainer alike
            for name in a.only:
                size = vocab
                if name == "minbpe":  # every merge is one pass over the text: time 64 of them, once
                    if (text, vocab) != cases[0] or round_:
                        continue
                    size = MINBPE_VOCAB
                if name in reasons:
                    continue
                r, reason = c.in_subprocess(one, name, text, size, a.minbpe, timeout_s=a.timeout)
                if r is None:
                    reasons[name] = reason or "skipped"
                    if reason:
                        print(f"{name}: {str(reason).splitlines()[0]}", file=sys.stderr)
                else:
                    sets[name], orders[name] = r.pop("tokens"), r.pop("order")
                    runs[name].append(r)
        reference = sets.get("hf-tokenizers")
        for name, rs in runs.items():
            if not rs:
                continue
            s, cpu, mb = (c.summary(r[k] for r in rs) for k in ("s", "cpu_s", "added_mb"))
            shared = len(sets[name] & reference) / min(len(reference), len(sets[name])) if reference else None
            rows.append({"text": text, "vocab": MINBPE_VOCAB if name == "minbpe" else vocab, "trainer": name,
                         "s": s["median"], "min": s["min"], "max": s["max"], "cpu_s": cpu["min"],
                         "added_mb": mb["median"], "tokens": len(sets[name]), "shared_with_hf": shared, "runs": s["n"],
                         "same_merges": orders[name] == orders["hf-tokenizers"] if name.startswith("minigpt") and reference else ""})
            print(c.table(rows[-1:], list(rows[-1])).splitlines()[-1], file=sys.stderr, flush=True)
    c.report("bpe_train", rows, ["text", "vocab", "trainer", "s", "min", "max", "cpu_s", "added_mb", "tokens",
                                 "shared_with_hf", "same_merges", "runs"])


if __name__ == "__main__":
    main()
