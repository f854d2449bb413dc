"""The whole training loop against the bare step: tokens/s of `minigpt.train`, with data, seeding, clipping, log,
progress line and checks, over those of forward + backward + AdamW on one batch that never changes.

  python benchmarks/train_loop.py [--configs mini nano] [--dtypes fp32 bf16] [--steps 20] [--rounds 5]

Both run in turn in every round, in one process, on the same shape; the loop logs every 10 steps, the first of which is not
counted. On a busy machine set BENCH_THREADS=1 OMP_NUM_THREADS=1: then CPU time is measured. The target is 0.97.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile

import numpy as np
import torch

import _common as c
import _models as m

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SHAPES = {"mini": m.CONFIGS["mini"], "nano": dict(n_layer=4, n_head=4, n_embd=128, block=256, vocab=2048, batch=8)}


def shape(cfg):
    from minigpt.gpt2 import GPT2Config
    return GPT2Config(vocab_size=cfg["vocab"], block_size=cfg["block"], n_layer=cfg["n_layer"], n_head=cfg["n_head"],
                      n_embd=cfg["n_embd"])


def bare_loop(cfg, dtype, steps):
    """CPU or wall seconds of `steps` bare steps."""
    from minigpt.engine.kernels import use_kernels
    from minigpt.gpt2 import GPT2
    from minigpt.training import summed_loss
    torch.manual_seed(0)
    model = GPT2(shape(cfg)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = use_kernels(model) or summed_loss
    x = torch.randint(cfg["vocab"], (cfg["batch"], cfg["block"]))
    y = torch.roll(x, -1, dims=1)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, x, y, getattr(torch, DTYPES[dtype]), 1 / y.numel()).backward()
        optimizer.step()
    for _ in range(3):
        step()
    start = c.clock()
    for _ in range(steps):
        step()
    return c.clock() - start


def whole_loop(cfg, dtype, steps):
    """The same for the loop, taken between two lines of its log."""
    from minigpt.gpt2 import GPT2
    from minigpt.data import TokenArray
    from minigpt.engine.train_config import TrainConfig
    from minigpt.engine.trainer import train
    torch.manual_seed(0)
    marks = []
    ids = np.random.default_rng(0).integers(cfg["vocab"], size=1_000_000).astype(np.uint16)
    config = TrainConfig(max_steps=steps + 20, batch_size=cfg["batch"], dtype=DTYPES[dtype], log_every=10, save_every=0,
                         eval_every=0, device="cpu")
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        # the folder gets log.csv; the checkpoint at the end comes after the last mark but one
        train(GPT2(shape(cfg)), TokenArray(ids), config, out=folder,
              callbacks=[lambda row, model: marks.append((row["step"], c.clock()))])
    first, last = marks[0], marks[-2]
    return (last[1] - first[1]) / (last[0] - first[0]) * steps


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--configs", nargs="*", default=list(SHAPES))
    ap.add_argument("--dtypes", nargs="*", default=["fp32"])
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--rounds", type=int, default=5)
    a = ap.parse_args()
    if c.project() is None:
        sys.exit("minigpt isn't importable")
    torch.set_num_threads(c.threads())
    rows = []
    for name in a.configs:
        cfg = SHAPES[name]
        tokens = a.steps * cfg["batch"] * cfg["block"]
        for dtype in a.dtypes:
            bare, loop = [], []
            for i in range(a.rounds):
                pair = [(bare_loop, bare), (whole_loop, loop)]
                for run, times in pair[::1 if i % 2 else -1]:
                    times.append(run(cfg, dtype, a.steps))
            ratios = [b / w for b, w in zip(bare, loop)]
            rows.append({"config": name, "dtype": dtype, "bare_tok_s": tokens / statistics.median(bare),
                         "loop_tok_s": tokens / statistics.median(loop), "ratio": statistics.median(bare) / statistics.median(loop),
                         "min": min(ratios), "max": max(ratios)})
    c.report("train_loop", rows, ["config", "dtype", "bare_tok_s", "loop_tok_s", "ratio", "min", "max"], target=0.97)


if __name__ == "__main__":
    main()
