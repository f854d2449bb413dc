"""BM25 over 10,000 short passages: indexing seconds, milliseconds per query (top 10), added peak RSS.
With BENCH_THREADS=1 the times are CPU times.

  python benchmarks/retrieval.py [--passages 10000] [--queries 200] [--rounds 3]
  (once before: python benchmarks/prepare_text.py)

Passages are pieces of about 60 words of text-20mb.txt, queries are 6 words drawn from a passage. All engines get the
same word lists (lower case, \\w+), so that tokenisation isn't part of the time; `tokenise_s` in the JSON gives it apart.
bm25s is asked query by query and, in its own row, for all queries in one call.
`same_top1` is the share of queries whose best passage is rank_bm25's. BM25 variants differ in how they weigh a word that
stands in many passages (idf): the row `minigpt` uses rank_bm25's weight, `minigpt, lucene idf` that of bm25s.
"""
from __future__ import annotations

import argparse
import json
import random
import re
import sys

import _common as c

TOP = 10


def prepare(n_passages, n_queries):
    """Word lists of the passages and queries, left in the cache folder for the measuring processes."""
    words = c.load_text("text-20mb.txt").split()
    passages = [" ".join(words[i:i + 60]) for i in range(0, 60 * n_passages, 60)]
    rng = random.Random(0)
    t = c.clock()
    docs = [re.findall(r"\w+", p.lower()) for p in passages]
    tokenise_s = c.clock() - t
    queries = []
    while len(queries) < n_queries:
        doc = rng.choice(docs)
        if len(doc) >= 20:
            queries.append(rng.sample(doc, 6))
    path = c.cache_dir() / "retrieval.json"
    path.write_text(json.dumps([docs, queries]))
    return str(path), tokenise_s


def load_project(idf):
    """Plug the project in here: return index(docs: lists of words) -> search(query words) -> [passage numbers].

    idf: "okapi" is rank_bm25's formula, "lucene" (bm25s's, and the default of minigpt's Index) the other one.
    """
    if c.project() is None:
        return None
    from minigpt.deeper.retrieval import FastBM25

    def index(docs):
        built = FastBM25.build(docs, idf=idf)
        return lambda query: [number for number, _ in built.search(query, TOP)]
    return index


def use_rank_bm25(docs):
    import numpy as np
    from rank_bm25 import BM25Okapi
    index = BM25Okapi(docs)

    def search(query):
        scores = index.get_scores(query)
        top = np.argpartition(scores, -TOP)[-TOP:]
        return top[np.argsort(-scores[top])].tolist()
    return search


def use_bm25s(docs):
    import bm25s
    index = bm25s.BM25()
    index.index(docs, show_progress=False)
    return lambda query: index.retrieve([query], k=TOP, show_progress=False, n_threads=0)[0][0].tolist()


def use_bm25s_batch(docs):
    import bm25s
    index = bm25s.BM25()
    index.index(docs, show_progress=False)

    def search(query):
        return search.all([query])[0]
    search.all = lambda queries: index.retrieve(queries, k=TOP, show_progress=False, n_threads=0)[0].tolist()
    return search


def use_sketch(docs):
    """A plain NumPy index: per word its passages and their final BM25 weights; a query adds 6 short arrays."""
    import numpy as np
    from collections import Counter
    k1, b = 1.5, 0.75
    ids, rows, cols, counts = {}, [], [], []
    for i, doc in enumerate(docs):
        for w, n in Counter(doc).items():
            cols.append(ids.setdefault(w, len(ids)))
            counts.append(n)
            rows.append(i)
    rows, cols, tf = np.array(rows, np.int32), np.array(cols, np.int32), np.array(counts, np.float32)
    length = np.array([len(d) for d in docs], np.float32)
    df = np.bincount(cols, minlength=len(ids))
    idf = np.log(1 + (len(docs) - df + 0.5) / (df + 0.5)).astype(np.float32)
    weight = idf[cols] * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length[rows] / length.mean()))
    order = np.argsort(cols, kind="stable")
    rows, weight, start = rows[order], weight[order].astype(np.float32), np.concatenate([[0], np.cumsum(df)])

    def search(query):
        scores = np.zeros(len(docs), np.float32)
        for w in query:
            j = ids.get(w)
            if j is not None:
                scores[rows[start[j]:start[j + 1]]] += weight[start[j]:start[j + 1]]
        top = np.argpartition(scores, -TOP)[-TOP:]
        return top[np.argsort(-scores[top])].tolist()
    return search


ENGINES = {"rank_bm25": use_rank_bm25, "bm25s": use_bm25s, "bm25s, one call": use_bm25s_batch,
           "NumPy sketch": use_sketch, "minigpt": "okapi", "minigpt, lucene idf": "lucene"}
MODULES = {"rank_bm25": "rank_bm25", "bm25s": "bm25s", "bm25s, one call": "bm25s", "NumPy sketch": "numpy"}


def one(name, path):
    make = ENGINES[name]
    if isinstance(make, str):
        make = load_project(make)
    if make is None:
        return None
    if name in MODULES:
        __import__(MODULES[name])
    with open(path) as f:
        docs, queries = json.load(f)
    base = c.rss_mb()
    c.reset_peak_rss()
    t = c.clock()
    search = make(docs)
    index_s = c.clock() - t
    search(queries[0])
    t = c.clock()
    top = search.all(queries) if hasattr(search, "all") else [search(q) for q in queries]
    query_ms = (c.clock() - t) / len(queries) * 1e3
    return {"index_s": index_s, "query_ms": query_ms, "added_mb": c.vm_hwm_mb() - base,
            "top1": [int(t[0]) for t in top]}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--passages", type=int, default=10000)
    ap.add_argument("--queries", type=int, default=200)
    ap.add_argument("--rounds", type=int, default=3)
    a = ap.parse_args()
    path, tokenise_s = prepare(a.passages, a.queries)
    results = {}
    for _ in range(a.rounds):
        for name in ENGINES:
            r, reason = c.in_subprocess(one, name, path, timeout_s=300)
            if r:
                results.setdefault(name, []).append(r)
            elif reason:
                print(f"{name}: {reason.splitlines()[0]}", file=sys.stderr)
    rows, want = [], None
    for name, rs in results.items():
        want = want or rs[0]["top1"]
        index, query = (c.summary(r[k] for r in rs) for k in ("index_s", "query_ms"))
        rows.append({"engine": name, "index_s": index["median"], "index_min": index["min"], "index_max": index["max"],
                     "query_ms": query["median"], "query_min": query["min"], "query_max": query["max"],
                     "added_mb": c.summary(r["added_mb"] for r in rs)["median"],
                     "same_top1": sum(x == y for x, y in zip(rs[0]["top1"], want)) / len(want)})
    c.report("retrieval", rows, ["engine", "index_s", "index_min", "index_max", "query_ms", "query_min", "query_max",
                                 "added_mb", "same_top1"], passages=a.passages, queries=a.queries, tokenise_s=tokenise_s)


if __name__ == "__main__":
    main()
