"""Kernels on trial: one whole training step of the shipped shape with all of our own kernels, and with one of them off.

  python benchmarks/kernels.py [--dtypes fp32 bf16] [--rounds 3] [--steps 3] [--batch 4] [--block 512]

Every measurement is a process of its own, so that its peak memory is its own; the cases take turns in every round.
`time` is that of the case over the one with all kernels, by pairs of the same round (1.10: the step takes 10 % longer
without it); `memory` likewise, of the peak less that of the bare imports. BENCH_THREADS=1 takes CPU time.
"""
from __future__ import annotations

import argparse
import time

import _common as c

SHAPE = dict(vocab_size=20000, block_size=1024, n_layer=8, n_head=8, n_embd=512)  # minigpt-chat
FULL = ["all", "BlockwiseAttention", "TanhGELU", "RowsLoss", "TokenEmbedding"]
LORA = ["all", "LoraProduct", "FrozenHead"]


def switch_off(kernel: str) -> None:
    """Put the plain form in the place of one kernel."""
    import torch
    import torch.nn.functional as F
    from minigpt import attention, gpt2, lora, training
    if kernel == "BlockwiseAttention":
        attention.in_blocks = lambda q, k, v: False
    elif kernel == "TanhGELU":
        gpt2.gelu = lambda x, activation="gelu_new": F.gelu(x, approximate="tanh")
    elif kernel == "RowsLoss":
        def plain(model, ids, targets, dtype=torch.float32, scale=1.0):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                logits = model(ids).flatten(0, 1)
                return scale * F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
        training.summed_loss = plain
    elif kernel == "TokenEmbedding":
        gpt2.TokenEmbedding.forward = lambda self, ids: F.embedding(ids, self.weight)
    elif kernel == "LoraProduct":
        def plain_step(base, x, A, B, config, training=False):
            return base(x) + config.scale * F.linear(F.linear(x, A), B)
        lora.lora_step = plain_step
    elif kernel == "FrozenHead":
        lora.lora_loss = training.summed_loss


def one(method: str, off: str, dtype: str, steps: int, batch: int, block: int) -> dict:
    """Seconds of each step and the peak memory, in a process of its own."""
    import torch
    torch.set_num_threads(c.threads())
    from minigpt import gpt2, lora, training
    switch_off(off)
    imports = c.rss_mb()
    torch.manual_seed(0)
    model = gpt2.GPT2(gpt2.GPT2Config(**SHAPE)).train()
    loss_of = training.summed_loss
    if method == "LoRA":
        lora.apply_lora(model, lora.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"]))
        loss_of = lora.lora_loss
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    x = torch.randint(SHAPE["vocab_size"], (batch, block))
    y = torch.roll(x, -1, dims=1)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    clock = time.process_time if c.threads() == 1 else time.perf_counter
    seconds = []
    c.reset_peak_rss()
    for _ in range(steps + 2):
        t = clock()
        opt.zero_grad(set_to_none=True)
        loss = loss_of(model, x, y, kind, 1 / y.numel())
        loss.backward()
        opt.step()
        loss.item()
        seconds.append(clock() - t)
    return {"seconds": min(seconds[2:]), "peak_mb": c.vm_hwm_mb() - imports}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"])
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--steps", type=int, default=3)
    ap.add_argument("--batch", type=int, default=4)
    ap.add_argument("--block", type=int, default=512)
    a = ap.parse_args()
    cases = [("full", k, d) for d in a.dtypes for k in FULL] + [("LoRA", k, d) for d in a.dtypes for k in LORA]
    found = {case: [] for case in cases}
    for _ in range(a.rounds):
        for case in cases:
            result, reason = c.in_subprocess(one, *case, a.steps, a.batch, a.block)
            if reason:
                raise SystemExit(f"{case}: {reason}")
            found[case].append(result)
            print(case, result, flush=True)
    rows = []
    for (method, kernel, dtype), runs in found.items():
        base = found[method, "all", dtype]
        time_ratio = c.summary(r["seconds"] / b["seconds"] for r, b in zip(runs, base))
        memory = c.summary(r["peak_mb"] / b["peak_mb"] for r, b in zip(runs, base))
        rows.append({"step": method, "dtype": dtype, "without": "" if kernel == "all" else kernel,
                     "tok_s": a.batch * a.block / c.summary(r["seconds"] for r in runs)["median"],
                     "peak_mb": c.summary(r["peak_mb"] for r in runs)["median"],
                     "time": time_ratio["median"], "min": time_ratio["min"], "max": time_ratio["max"], "memory": memory["median"]})
    c.report("kernels", rows, ["step", "dtype", "without", "tok_s", "peak_mb", "time", "min", "max", "memory"])


if __name__ == "__main__":
    main()
