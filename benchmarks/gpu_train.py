"""Training throughput on one GPU: tokens/s and MFU of GPT-2 small (12/12/768, block 1024, bf16, torch.compile, SDPA).

  python benchmarks/gpu_train.py [--nanogpt DIR] [--batch 16] [--micro-steps 1] [--steps 20] [--rounds 3]
                            [--only NAME ...] [--peak-tflops 989] [--vocab 50304]
  NANOGPT_DIR: a checkout of karpathy/nanoGPT (its model.py); the second peer is transformers' GPT2LMHeadModel
  MINIGPT_DIR: a checkout of the project, where it isn't installed

Self-contained: needs torch (2.11 is fine) and, for its row, transformers (5.17 is fine). Every candidate runs in turn
in every round in one process on the same random batch: forward and backward of --micro-steps micro-batches, gradient
clipping at 1.0, fused AdamW; bf16 autocast, TF32 for what stays in fp32. MFU counts nanoGPT's (PaLM's) way,
6 N + 12 L C T per token, N without the position table, over --peak-tflops (H100 SXM dense bf16: 989; for H200 the
same) and again over the matrix-product speed measured here. Prints a table and one JSON line.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

CFG = dict(n_layer=12, n_head=12, n_embd=768, block=1024)


def import_from(directory, name):
    if directory:
        sys.path.insert(0, str(directory))
    try:
        return importlib.import_module(name)
    finally:
        if directory:
            sys.path.remove(str(directory))


def load_project(vocab, compiled):
    """minigpt's loss, (x, y) -> mean, as its training loop computes it, and its parameters."""
    try:
        import_from(os.environ.get("MINIGPT_DIR", Path(__file__).resolve().parent.parent), "minigpt")
        from minigpt.gpt2 import GPT2, GPT2Config
        from minigpt.training import summed_loss
    except ImportError as e:
        print(f"minigpt: skipped, {e}", file=sys.stderr)
        return None
    model = GPT2(GPT2Config(vocab_size=vocab, block_size=CFG["block"], n_layer=CFG["n_layer"], n_head=CFG["n_head"],
                            n_embd=CFG["n_embd"])).cuda().train()
    loss = torch.compile(summed_loss) if compiled else summed_loss
    return (lambda x, y: loss(model, x, y, torch.bfloat16, 1 / y.numel())), list(model.parameters())


def load_nanogpt(directory, vocab, compiled):
    m = import_from(directory, "model")
    model = m.GPT(m.GPTConfig(block_size=CFG["block"], vocab_size=vocab, n_layer=CFG["n_layer"], n_head=CFG["n_head"],
                              n_embd=CFG["n_embd"], dropout=0.0, bias=True)).cuda()
    run = torch.compile(model) if compiled else model
    return (lambda x, y: run(x, y)[1]), list(model.parameters())


def load_hf(vocab, compiled):
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=CFG["block"], n_layer=CFG["n_layer"], n_head=CFG["n_head"],
                                       n_embd=CFG["n_embd"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                       bos_token_id=0, eos_token_id=0, attn_implementation="sdpa")).cuda().train()

    def loss(x, y):
        logits = model(input_ids=x, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return (torch.compile(loss) if compiled else loss), list(model.parameters())


def gemm_tflops(n=8192, repeat=30) -> float:
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    for _ in range(5):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(repeat):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 2 * n**3 * repeat / (start.elapsed_time(end) / 1e3) / 1e12


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--nanogpt", default=os.environ.get("NANOGPT_DIR"))
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--micro-steps", type=int, default=1)
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--vocab", type=int, default=50304)
    ap.add_argument("--peak-tflops", type=float, default=989.0)
    ap.add_argument("--only", nargs="*")
    a = ap.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_train.py needs a CUDA GPU")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    x = torch.randint(a.vocab, (a.batch, CFG["block"]), device="cuda")
    y = torch.roll(x, -1, dims=1)
    makers = {}
    for compiled in (False, True):
        suffix = " compiled" if compiled else ""
        makers["nanoGPT" + suffix] = lambda k=compiled: load_nanogpt(a.nanogpt, a.vocab, k)
        makers["HF GPT2" + suffix] = lambda k=compiled: load_hf(a.vocab, k)
        makers["minigpt" + suffix] = lambda k=compiled: load_project(a.vocab, k)
    gemm = gemm_tflops()
    steps, info, times = {}, {}, {}
    for name, make in makers.items():
        if a.only and name not in a.only:
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):
                made = make()
            if made is None:
                continue
            loss_fn, params = made
            opt = torch.optim.AdamW(params, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

            def step(loss_fn=loss_fn, params=params, opt=opt):
                opt.zero_grad(set_to_none=True)
                for _ in range(a.micro_steps):
                    with torch.autocast("cuda", dtype=torch.bfloat16):
                        loss = loss_fn(x, y) / a.micro_steps
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                opt.step()
                return loss
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            t = time.perf_counter()
            step()
            torch.cuda.synchronize()
            first = time.perf_counter() - t
            for _ in range(5):
                loss = step()
            torch.cuda.synchronize()
            info[name] = {"first_step_s": first, "step_mem_gb": (torch.cuda.max_memory_allocated() - base) / 2**30,
                          "params_m": sum(p.numel() for p in params) / 1e6, "loss_after_6": loss.item() * a.micro_steps}
            steps[name], times[name] = step, []
        except Exception as e:
            print(f"{name}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", file=sys.stderr)
            torch.cuda.empty_cache()
    for _ in range(a.rounds):
        for name, step in steps.items():
            step()
            torch.cuda.synchronize()
            t = time.perf_counter()
            for _ in range(a.steps):
                step()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - t) / a.steps)
    tokens = x.numel() * a.micro_steps
    weights = 12 * CFG["n_layer"] * CFG["n_embd"] ** 2 + a.vocab * CFG["n_embd"]
    flops = (6 * weights + 12 * CFG["n_layer"] * CFG["n_embd"] * CFG["block"]) * tokens
    rows = []
    for name, ts in times.items():
        med = statistics.median(ts)
        rows.append({"model": name, "tok_s": tokens / med, "min": tokens / max(ts), "max": tokens / min(ts), "ms_step": med * 1e3,
                     "mfu_peak": flops / med / 1e12 / a.peak_tflops, "mfu_gemm": flops / med / 1e12 / gemm, **info[name]})
    columns = ["model", "tok_s", "min", "max", "ms_step", "mfu_peak", "mfu_gemm", "first_step_s", "step_mem_gb", "params_m", "loss_after_6"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for r in rows:
        print("| " + " | ".join(f"{r[k]:.4g}" if isinstance(r[k], float) and r[k] < 1e4 else f"{r[k]:,.0f}" if isinstance(r[k], float) else str(r[k]) for k in columns) + " |")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if "transformers" in sys.modules:
        versions["transformers"] = sys.modules["transformers"].__version__
    print(json.dumps({"bench": "gpu_train", "gpu": torch.cuda.get_device_name(), **versions, "batch": a.batch,
                      "micro_steps": a.micro_steps, "block": CFG["block"], "vocab": a.vocab, "gemm_tflops": gemm, "rows": rows}))


if __name__ == "__main__":
    main()
