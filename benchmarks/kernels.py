"""Kernels on trial: one whole training step of the shipped shape with the kernels of minigpt.engine.kernels, and without one.

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
WITHOUT = {"full": ["", "blockwise", "summed_rows_loss", "PieceGELU", "sparse rows"], "LoRA": ["", "summed_rows_loss", "LoraProduct"]}


def one(method: str, without: str, dtype: str, steps: int, batch: int, block: int) -> dict:
    """Seconds of each step and the peak memory, in a process of its own."""
    c.project()
    import torch
    torch.set_num_threads(c.threads())
    from minigpt import gpt2, lora, training
    from minigpt.attention import set_attn_implementation
    from minigpt.engine.kernels import use_kernels
    imports = c.rss_mb()
    torch.manual_seed(0)
    model = gpt2.GPT2(gpt2.GPT2Config(**SHAPE)).train()
    if method == "LoRA":
        lora.apply_lora(model, lora.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"]))
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    loss_of = use_kernels(model, kind)
    if without == "blockwise":
        set_attn_implementation(model, "sdpa")
    if without == "summed_rows_loss":
        loss_of = training.summed_loss
    if without == "PieceGELU":
        for block in model.blocks:
            block.mlp.act = torch.nn.GELU(approximate="tanh")
    if without == "sparse rows":
        model.wte.sparse = False
    if without == "LoraProduct":
        for layer in lora.lora_layers(model).values():
            layer.product = lora.LoraLinear.product
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    x = torch.randint(SHAPE["vocab_size"], (batch, block))
    y = torch.roll(x, -1, dims=1)
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
    cases = [(method, kernel, d) for d in a.dtypes for method, kernels in WITHOUT.items() for kernel in kernels]
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
        base = found[method, "", dtype]
        time_ratio = c.summary(r["seconds"] / b["seconds"] for r, b in zip(runs, base))
        memory = c.summary(r["peak_mb"] / b["peak_mb"] for r, b in zip(runs, base))
        rows.append({"step": method, "dtype": dtype, "without": kernel,
                     "tok_s": a.batch * a.block / c.summary(r["seconds"] for r in runs)["median"],
                     "peak_mb": c.summary(r["peak_mb"] for r in runs)["median"],
                     "time": time_ratio["median"], "min": time_ratio["min"], "max": time_ratio["max"], "memory": memory["median"]})
    c.report("kernels", rows, ["step", "dtype", "without", "tok_s", "peak_mb", "time", "min", "max", "memory"])


if __name__ == "__main__":
    main()
