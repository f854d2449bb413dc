"""Decoding with the shipped model, greedy: new tokens/s of this checkout and of others, in turns on the same machine.

  python benchmarks/decode.py [--against DIR ...] [--weights default live] [--batches 1 8] [--rounds 3] [--new 128]

DIR is another checkout of this repository (the package of MINIGPT_DIR is measured, too, where it is set). Each checkout
runs in a process of its own that stays alive; the rounds take turns. float32; `ratio` is this checkout's speed over the
other's by pairs of the same round (above 1: this one is faster). `serve` is a row of the server's batch, as Batch.step
draws it. BENCH_THREADS=1 takes CPU time, which hardly feels the neighbours.
"""
from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import sys
from pathlib import Path

import _common as c

HERE = Path(__file__).resolve().parent.parent
PROMPT = 32


def load(checkout: str):
    """The package of a checkout, and a model of the shipped shape with the shipped weights."""
    sys.path.insert(0, checkout)
    import torch
    torch.set_num_threads(c.threads())
    import minigpt
    assert Path(minigpt.__file__).is_relative_to(checkout), minigpt.__file__
    from minigpt.gpt2 import GPT2
    return GPT2.from_pretrained()


def decoding(model, weights: str, rows: list[list[int]], new: int):
    """A function that draws `new` tokens for each row."""
    try:
        from minigpt.deeper.fast_decoding import Decoder
    except ImportError:  # a checkout from before it had a notebook of its own
        from minigpt.generation import Decoder
    from minigpt.generation import generate
    decoder = Decoder(model) if weights == "default" else Decoder(model, weights)
    return lambda: generate(model, rows, max_new_tokens=new, temperature=0, stop_ids=(), decoder=decoder)


def serving(model, rows: list[list[int]], new: int):
    """A function that draws `new` tokens for each row in the server's batch."""
    from minigpt.bpe import BPETokenizer
    from minigpt.generation import Options
    from minigpt.engine.sequence import Request, Sequence
    from minigpt.server import Batch
    tokenizer = BPETokenizer.from_pretrained()
    batch = Batch(model, len(rows))

    def run():
        for ids in rows:
            batch.read(Request(ids, [Sequence(tokenizer, ids, Options(temperature=0, seed=0), new)]))
        while batch.rows:
            batch.step()
    return run


def worker(pipe, checkout: str, new: int) -> None:
    """Answers (weights, batch) with seconds, until None comes."""
    model, made = load(checkout), {}
    import torch
    while (case := pipe.recv()) is not None:
        weights, batch = case
        if case not in made:
            ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
            made[case] = serving(model, ids, new) if weights == "serve" else decoding(model, weights, ids, new)
            made[case]()
        pipe.send(min(c.repeat(made[case], 2, warmup=0)))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--against", nargs="*", default=[d for d in [os.environ.get("MINIGPT_DIR")] if d])
    ap.add_argument("--weights", nargs="*", default=["default", "live"], help="default, live, fast, int8 or serve")
    ap.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--new", type=int, default=128)
    a = ap.parse_args()
    checkouts = [str(HERE), *(str(Path(d).resolve()) for d in a.against)]
    context, pipes, workers = mp.get_context("spawn"), {}, []
    for checkout in checkouts:
        pipes[checkout], there = context.Pipe()
        workers.append(context.Process(target=worker, args=(there, checkout, a.new), daemon=True))
        workers[-1].start()
    seconds = {(case, checkout): [] for case in [(w, b) for w in a.weights for b in a.batches] for checkout in checkouts}
    for _ in range(a.rounds):
        for case, checkout in seconds:
            pipes[checkout].send(case)
            seconds[case, checkout].append(pipes[checkout].recv())
    for pipe in pipes.values():
        pipe.send(None)
    rows = []
    for (case, checkout), times in seconds.items():
        weights, batch = case
        ratio = c.summary(t / mine for t, mine in zip(times, seconds[case, checkouts[0]]))
        rows.append({"weights": weights, "batch": batch, "checkout": Path(checkout).name,
                     "tok_s": batch * a.new / c.summary(times)["median"],
                     "ratio": ratio["median"], "min": ratio["min"], "max": ratio["max"]})
    c.report("decode", rows, ["weights", "batch", "checkout", "tok_s", "ratio", "min", "max"])


if __name__ == "__main__":
    main()
