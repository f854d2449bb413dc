"""Encode text with GPT-2's vocabulary: MB/s and tokens/s.

  python benchmarks/bpe_encode.py [--texts NAME ...] [--threads 1 2] [--only NAME ...] [--minbpe DIR]
  (once before: python benchmarks/prepare_text.py)
  MINBPE_DIR / --minbpe: a checkout of karpathy/minbpe

`cold` is the first pass of a fresh process over the text, `warm` the median of the following passes over the
same text (caches full); MB/s are of wall time, `cpu_mb_s` of CPU time (one-thread rows; best warm pass), which
is the figure to compare on a busy machine. `load_s` is reading vocab.bpe/encoder.json and building the encoder.
Every encoder gets the same list of documents and must give tiktoken's tokens. `minigpt` gives lists of int, as
`tiktoken` does; `minigpt-numpy` gives arrays, as `tiktoken-numpy` does; with two threads minigpt uses two processes.
"""
from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
import time
from array import array

import _common as c
from bpe_train import documents, unicode_to_byte

DOC_CHARS = 16384


def gpt2_files():
    folder = c.cache_dir() / "gpt2"
    return str(folder / "vocab.bpe"), str(folder / "encoder.json")


def ranks() -> dict[bytes, int]:
    table = unicode_to_byte()
    with open(gpt2_files()[1], encoding="utf-8") as f:
        return {bytes(table[ch] for ch in t): i for t, i in json.load(f).items() if t != "<|endoftext|>"}


# ---------------------------------------------------------------- encoders: (threads) -> (docs -> list of id lists)

def load_project(threads: int, arrays: bool = False):
    """The project's GPT-2 tokenizer from gpt2_files(): docs -> list of ids, or with `arrays` -> uint16 arrays."""
    if c.project() is None:
        return None
    from minigpt.engine.tokenizer import Tokenizer
    merges, vocab = gpt2_files()
    tok = Tokenizer.from_gpt2(vocab, merges)
    if arrays:
        return lambda docs: list(tok.encode_iter(docs, num_proc=threads))
    return lambda docs: [ids.tolist() for ids in tok.encode_iter(docs, num_proc=threads)]


def load_tiktoken(threads):
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    enc = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks(), special_tokens={"<|endoftext|>": 50256})
    if threads == 1:
        return lambda docs: [enc.encode_ordinary(d) for d in docs]
    return lambda docs: enc.encode_ordinary_batch(docs, num_threads=threads)


def load_tiktoken_numpy(threads):
    """tiktoken without building Python ints."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    enc = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks(), special_tokens={"<|endoftext|>": 50256})
    if threads == 1:
        return lambda docs: [enc.encode_to_numpy(d, disallowed_special=()) for d in docs]
    from concurrent.futures import ThreadPoolExecutor
    pool = ThreadPoolExecutor(threads)
    return lambda docs: list(pool.map(lambda d: enc.encode_to_numpy(d, disallowed_special=()), docs))


def load_hf(threads):
    from tokenizers import Tokenizer as HFTokenizer, models, pre_tokenizers
    merges, vocab = gpt2_files()
    tok = HFTokenizer(models.BPE.from_file(vocab, merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return lambda docs: [e.ids for e in tok.encode_batch_fast(docs, add_special_tokens=False)]


def load_gigatoken(threads):
    import gigatoken
    from tiktoken_ext.openai_public import r50k_pat_str
    merges, vocab = gpt2_files()
    from tokenizers import Tokenizer as HFTokenizer, models, pre_tokenizers, decoders
    tok = HFTokenizer(models.BPE.from_file(vocab, merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    enc = gigatoken.Tokenizer.from_json(tok.to_str())
    if threads == 1:
        return lambda docs: [enc.encode(d) for d in docs]
    return lambda docs: list(enc.encode_batch_list(docs))


def load_minbpe(threads, folder):
    c.find_module("minbpe", folder)
    from minbpe import RegexTokenizer
    from minbpe.gpt4 import recover_merges
    r = ranks()
    tok = RegexTokenizer(c.GPT2_SPLIT)
    tok.merges = recover_merges(r)
    shuffle = bytes(r[bytes([i])] for i in range(256))  # GPT-2 numbers its bytes in another order
    plain = tok._encode_chunk
    tok._encode_chunk = lambda chunk: plain(chunk.translate(shuffle))
    return lambda docs: [tok.encode_ordinary(d) for d in docs]


class PythonSketch:
    """The obvious pure-Python encoder: split with a regex, keep a dict from pre-token to its ids, and merge the
    lowest-ranked pair of a new pre-token until none is left. Stdlib `re` with ASCII classes gives the same split
    as the \\p{..} pattern on pure-ASCII text and is the faster engine."""

    def __init__(self, packed=False, ascii_fast_path=True):
        import regex
        self.ranks, self.packed = ranks(), packed
        self.general = regex.compile(c.GPT2_SPLIT).findall
        self.ascii = re.compile(r" ?[A-Za-z]++|'(?:[sdmt]|ll|ve|re)| ?[0-9]++| ?[^\sA-Za-z0-9]++|\s+(?!\S)|\s+", re.A).findall \
            if ascii_fast_path and sys.version_info >= (3, 11) else None
        encode_new = self.encode_new

        class Cache(dict):
            def __missing__(self, word):
                ids = self[word] = encode_new(word)
                return ids
        self.cache = Cache()

    def split(self, text):
        # re.A keeps \s to the ASCII white space that the \p{..} engines see too (not \x1c-\x1f)
        return self.ascii(text) if self.ascii and text.isascii() else self.general(text)

    def encode_new(self, word):
        get, word, none = self.ranks.get, word.encode(), 1 << 30
        parts = [word] if word in self.ranks else [word[i:i + 1] for i in range(len(word))]
        pairs = [get(a + b, none) for a, b in zip(parts, parts[1:])]
        while pairs and (best := min(pairs)) < none:
            i = pairs.index(best)
            new = parts[i] = parts[i] + parts[i + 1]
            del parts[i + 1], pairs[i]
            if i:
                pairs[i - 1] = get(parts[i - 1] + new, none)
            if i < len(pairs):
                pairs[i] = get(new + parts[i + 1], none)
        ids = [self.ranks[p] for p in parts]
        return array("H", ids).tobytes() if self.packed else tuple(ids)

    def __call__(self, docs):
        get = self.cache.__getitem__
        if self.packed:
            import numpy as np
            return [np.frombuffer(b"".join(map(get, self.split(d))), dtype=np.uint16) for d in docs]
        return [list(itertools.chain.from_iterable(map(get, self.split(d)))) for d in docs]


def sketch_in_processes(make, threads):
    """The sketch with a pool of forked processes (what 2 cores can give pure Python)."""
    import multiprocessing as mp
    import numpy as np
    global _worker
    _worker = make()
    pool = mp.get_context("fork").Pool(threads)

    def run(docs):
        n = max(1, min(64, len(docs) // threads))
        return [np.frombuffer(b, dtype=np.uint16) for part in pool.map(_worker_run, [docs[i:i + n] for i in range(0, len(docs), n)], 1) for b in part]
    return run


def _worker_run(docs):
    return [ids.tobytes() for ids in _worker(docs)]


def build(name, threads, minbpe_dir):
    if name.startswith("minigpt"):
        return load_project(threads, arrays=name == "minigpt-numpy")
    if name == "tiktoken":
        return load_tiktoken(threads)
    if name == "tiktoken-numpy":
        return load_tiktoken_numpy(threads)
    if name == "hf-tokenizers":
        return load_hf(threads)
    if name == "gigatoken":
        return load_gigatoken(threads)
    if name == "minbpe":
        return load_minbpe(threads, minbpe_dir)
    make = {"python-sketch": lambda: PythonSketch(), "python-sketch-uint16": lambda: PythonSketch(packed=True),
            "python-sketch-regex": lambda: PythonSketch(ascii_fast_path=False)}[name]
    return make() if threads == 1 else sketch_in_processes(lambda: PythonSketch(packed=True), threads)


NAMES = ["tiktoken", "tiktoken-numpy", "hf-tokenizers", "gigatoken", "minbpe", "python-sketch", "python-sketch-uint16",
         "python-sketch-regex", "minigpt", "minigpt-numpy"]


def one(name, text_name, threads, passes, minbpe_dir, max_chars=None):
    """Runs in its own process."""
    text = c.load_text(text_name)[:max_chars]
    docs = [d for big in documents(text) for d in _pieces(big)]
    mb = sum(len(d.encode()) for d in docs) / 1e6
    import numpy  # noqa: F401  some encoders import it on their first call
    t = time.perf_counter()
    encode = build(name, threads, minbpe_dir)
    load_s = time.perf_counter() - t
    if encode is None:
        return None
    times, cpus, ids = [], [], None
    for _ in range(1 + passes):
        del ids
        t, cpu = time.perf_counter(), time.process_time()
        ids = encode(docs)
        times.append(time.perf_counter() - t)
        cpus.append(time.process_time() - cpu)
    digest, count = hashlib.sha256(), 0
    for doc_ids in ids:
        digest.update(array("I", list(map(int, doc_ids))).tobytes())
        count += len(doc_ids)
    return {"mb": mb, "load_s": load_s, "times": times, "cpus": cpus, "tokens": count, "digest": digest.hexdigest()}


def _pieces(text):
    start = 0
    while start < len(text):
        end = start + DOC_CHARS
        end = len(text) if end >= len(text) else text.find("\n", end) + 1 or len(text)
        yield text[start:end]
        start = end


def where_time_goes(text_name, max_chars=4_000_000):
    """CPU seconds per step of the sketch on the head of a text (cache warm): split, then look up, then flatten."""
    text = c.load_text(text_name)[:max_chars]
    docs = list(_pieces(text))
    mb = len(text.encode()) / 1e6
    out = []
    for label, kw in (("re, ASCII classes", {}), ("regex, \\p classes", {"ascii_fast_path": False})):
        s = PythonSketch(**kw)
        p = PythonSketch(packed=True, **kw)
        cold = time.process_time()
        s(docs)
        cold = time.process_time() - cold
        p(docs)
        steps = {"split (findall)": lambda: [s.split(d) for d in docs],
                 "split + dict look-ups": lambda: [list(map(s.cache.__getitem__, s.split(d))) for d in docs],
                 "whole, list of int": lambda: s(docs),
                 "whole, uint16 array": lambda: p(docs)}
        for step, fn in steps.items():
            best = []
            for _ in range(4):
                t = time.process_time()
                fn()
                best.append(time.process_time() - t)
            out.append({"engine": label, "step": step, "cpu_s": min(best), "cpu_mb_s": mb / min(best)})
        out.append({"engine": label, "step": "whole, cold cache", "cpu_s": cold, "cpu_mb_s": mb / cold,
                    "distinct_pretokens": len(s.cache)})
    return out


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--minbpe", default=os.environ.get("MINBPE_DIR"))
    ap.add_argument("--texts", nargs="*", default=["text-1mb.txt", "text-20mb.txt", "text-other.txt"])
    ap.add_argument("--only", nargs="*", default=NAMES)
    ap.add_argument("--passes", type=int, default=5)
    ap.add_argument("--rounds", type=int, default=2)
    ap.add_argument("--threads", nargs="*", type=int, default=[1, 2][:c.threads()])
    a = ap.parse_args()
    rows, failed = [], set()
    for text in a.texts:
        for threads in a.threads:
            results, want = {}, None
            os.environ["RAYON_NUM_THREADS"] = str(threads)
            os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
            for _ in range(a.rounds):
                for name in a.only:
                    if name in failed or threads > 1 and name in ("minbpe", "python-sketch", "python-sketch-regex"):
                        continue
                    slow = name == "minbpe"
                    if slow and text != a.texts[0] or slow and name in results:
                        continue
                    r, reason = c.in_subprocess(one, name, text, threads, 1 if slow else a.passes, a.minbpe,
                                                timeout_s=240)
                    if r is None:
                        failed.add(name)
                        if reason:
                            print(f"{name}: {reason.splitlines()[0]}", file=sys.stderr)
                        continue
                    results.setdefault(name, []).append(r)
            for name, rs in results.items():
                want = want or rs[0]["digest"]
                mb, n = rs[0]["mb"], rs[0]["tokens"]
                cold = c.summary(r["times"][0] for r in rs)["median"]
                warm = c.summary(t for r in rs for t in r["times"][1:])
                cpu = min(t for r in rs for t in r["cpus"][1:])
                rows.append({"text": text, "threads": threads, "encoder": name,
                             "load_s": c.summary(r["load_s"] for r in rs)["median"],
                             "cold_mb_s": mb / cold, "warm_mb_s": mb / warm["median"], "min": mb / warm["max"],
                             "max": mb / warm["min"], "warm_mtok_s": n / warm["median"] / 1e6,
                             "cpu_mb_s": mb / cpu if threads == 1 else None,
                             "cpu_cold_mb_s": mb / min(r["cpus"][0] for r in rs) if threads == 1 else None,
                             "tokens": n, "same_ids": rs[0]["digest"] == want})
                print(c.table(rows[-1:], list(rows[-1])).splitlines()[-1], file=sys.stderr, flush=True)
    columns = ["text", "threads", "encoder", "load_s", "cold_mb_s", "warm_mb_s", "min", "max", "warm_mtok_s",
               "cpu_mb_s", "cpu_cold_mb_s", "tokens", "same_ids"]
    steps, reason = c.in_subprocess(where_time_goes, a.texts[0], timeout_s=300)
    if steps:
        print(c.table(steps, ["engine", "step", "cpu_s", "cpu_mb_s", "distinct_pretokens"]))
    elif reason:
        print(reason, file=sys.stderr)
    c.report("bpe_encode", rows, columns, sketch_steps=steps)


if __name__ == "__main__":
    main()
