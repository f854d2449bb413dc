"""Pack text into a token file: time against the tokenizer alone.

  python benchmarks/pack.py [--mb 100] [--text FILE | --conversations FILE.jsonl.xz] [--rounds 3] [--procs 1 2]

The text is a file of documents (default: the cache folder's text-20mb.txt, paragraphs in documents of about 2,000
characters, repeated up to --mb; with --conversations one document for each conversation).
`tokenizer` is `encode_array` of every document, held in memory, by a fresh process and a fresh cache: no file is read
or written. `pack` begins with the text file and ends with the token file: reading, cutting into documents, encoding,
writing them aside, and the digest. Both run in turn, in processes of their own; with one
process the times are CPU times where BENCH_THREADS=1, with several they are wall times, against the tokenizer's
`encode_iter` with as many processes.
The target: pack takes at most 1.3 times as long as the tokenizer.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import _common as c


def make_text(path: Path, mb: int, source: str | None, conversations: str | None) -> None:
    """Write a file of documents of about `mb` megabytes."""
    from minigpt.data import text_of
    from minigpt.engine.parallel import chunked
    from minigpt.engine.dataset_readers import load_chats
    if conversations:
        docs = (text_of(chat) for chat in load_chats(conversations, streaming=True))
    else:
        paragraphs = c.load_text(source or "text-20mb.txt").split("\n\n")
        docs = ["\n\n".join(chunk) for chunk in chunked(paragraphs, 2000)]
    left, wanted = mb * 1_000_000, []
    while left > 0:
        before = left
        for doc in docs:
            if left <= 0:
                break
            wanted.append(doc)
            left -= len(doc.encode()) + 15
        if left == before:
            sys.exit("there is no text to pack")
    path.write_text("\n<|endoftext|>\n".join(wanted), encoding="utf-8", newline="\n")


def clock(procs: int) -> float:
    return c.clock() if procs == 1 else time.perf_counter()


def tokenizer_alone(path: str, procs: int) -> dict:
    from minigpt.engine.tokenizer import Tokenizer
    from minigpt.engine.dataset_readers import load_text
    tok, docs = Tokenizer.from_pretrained(), load_text(path)
    t, count = clock(procs), 0
    if procs == 1:
        for doc in docs:
            count += len(tok.encode_array(doc)) + 1
    else:
        for ids in tok.encode_iter(docs, procs):
            count += len(ids) + 1
        tok.close()
    return {"seconds": clock(procs) - t, "tokens": count, "documents": len(docs)}


def packing(path: str, procs: int) -> dict:
    from minigpt.engine.tokenizer import Tokenizer
    from minigpt.deeper.packing import pack
    from minigpt.engine.dataset_readers import load_text
    tok, target = Tokenizer.from_pretrained(), Path(path).with_suffix(".bin")
    c.reset_peak_rss()
    base = c.rss_mb()
    t = clock(procs)
    file = pack(load_text(path, streaming=True), target, tok, num_proc=procs, overwrite=True, progress=False)
    return {"seconds": clock(procs) - t, "tokens": len(file), "documents": file.header.n_documents,
            "added_mb": c.vm_hwm_mb() - base}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--mb", type=int, default=100)
    ap.add_argument("--text")
    ap.add_argument("--conversations")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--procs", nargs="*", type=int, default=[1, 2][:c.threads()])
    a = ap.parse_args()
    path = c.cache_dir() / f"pack-{a.mb}mb.txt"
    make_text(path, a.mb, a.text, a.conversations)
    mb, rows = path.stat().st_size / 1e6, []
    for procs in a.procs:
        found = {"tokenizer": [], "pack": []}
        for _ in range(a.rounds):
            for name, fn in (("tokenizer", tokenizer_alone), ("pack", packing)):
                result, reason = c.in_subprocess(fn, str(path), procs)
                if result is None:
                    sys.exit(f"{name}: {reason}")
                found[name].append(result)
        ratios = c.summary(p["seconds"] / t["seconds"] for p, t in zip(found["pack"], found["tokenizer"]))
        for name, results in found.items():
            s = c.summary(r["seconds"] for r in results)
            rows.append({"what": name, "processes": procs, "seconds": s["median"], "min": s["min"], "max": s["max"],
                         "mb_s": mb / s["median"], "tokens": results[0]["tokens"],
                         "documents": results[0]["documents"], "added_mb": results[0].get("added_mb", ""),
                         "vs_tokenizer": ratios["median"] if name == "pack" else 1.0})
    path.unlink()
    path.with_suffix(".bin").unlink()
    c.report("pack", rows, ["what", "processes", "seconds", "min", "max", "mb_s", "tokens", "documents", "added_mb",
                            "vs_tokenizer"], mb=mb, target=1.3)


if __name__ == "__main__":
    main()
