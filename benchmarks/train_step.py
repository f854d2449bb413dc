"""One optimizer step (forward, backward, AdamW) on CPU: tokens/s and share of the measured matrix-product speed.

  python benchmarks/train_step.py [--configs mini gpt2-small] [--dtypes fp32 bf16] [--rounds 5] [--forward]
                                  [--nanogpt DIR] [--llms DIR] [--no-compile]
  --forward: the forward pass and its loss alone, without gradients
  NANOGPT_DIR, LLMS_FROM_SCRATCH_DIR: checkouts of karpathy/nanoGPT and rasbt/LLMs-from-scratch

All candidates of a config run in turn in every round, in one process, with the same optimizer
(torch.optim.AdamW, fused), the same batch, no dropout, no gradient clipping; bf16 is torch.autocast on CPU.
On a busy machine set BENCH_THREADS=1: then `tok_cpu_s` (tokens per second of CPU time), `vs_nanoGPT` and `mfu` are
taken from CPU time and hardly feel the neighbours; with more threads they are of wall time.
`mfu` is model FLOPs of the best step over the best 2048x2048x2048 product in that dtype, measured in the same rounds.
"""
from __future__ import annotations

import argparse
import gc
import os
import sys
import time

import torch
import torch.nn.functional as F

import _common as c
import _models as m


def load_project(cfg):
    """Plug the project in here: return loss(x, y) and its parameters for a model of shape `cfg`."""
    minigpt = c.project()
    if minigpt is None:
        return None
    from minigpt.gpt2 import GPT2, GPT2Config
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=cfg["vocab"], block_size=cfg["block"], n_layer=cfg["n_layer"],
                            n_head=cfg["n_head"], n_embd=cfg["n_embd"])).train()
    from minigpt.engine.kernels import use_kernels
    from minigpt.training import summed_loss
    loss_of = use_kernels(model) or summed_loss

    def loss(x, y):  # the loss of the training loop; the autocast is that of the caller
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        return loss_of(model, x, y, dtype, 1 / y.numel())
    return loss, model.parameters()


def gemm_gflops(dtype, shape, rounds=5) -> float:
    a, b = (torch.randn(s, dtype=dtype) for s in ((shape[0], shape[1]), (shape[1], shape[2])))
    times = c.repeat(lambda: a @ b, rounds, warmup=2)
    return 2 * shape[0] * shape[1] * shape[2] / min(times) / 1e9


def candidates(cfg, a):
    made = {}

    def add(name, make):
        try:
            torch.manual_seed(0)
            loss, params = make()
            made[name] = (loss, torch.optim.AdamW(params, lr=1e-4, fused=True))
        except Exception as e:
            print(f"{name}: {type(e).__name__}: {e}", file=sys.stderr)

    def nano(compiled):
        def make():
            model = m.nanogpt(cfg, a.nanogpt)
            run = torch.compile(model) if compiled else model
            return lambda x, y: run(x, y)[1], model.parameters()
        return make

    def hf(compiled):
        def make():
            model = m.hf_gpt2(cfg).train()
            run = torch.compile(model) if compiled else model

            def loss(x, y):
                logits = run(input_ids=x, use_cache=False).logits
                return F.cross_entropy(logits.flatten(0, 1), y.flatten())
            return loss, model.parameters()
        return make

    def llms():
        model, _ = m.llms_from_scratch(cfg, a.llms)
        return lambda x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten()), model.parameters()

    add("nanoGPT", nano(False))
    add("HF GPT2", hf(False))
    add("LLMs-from-scratch", llms)
    if not a.no_compile:
        add("nanoGPT compiled", nano(True))
        add("HF GPT2 compiled", hf(True))
    project = load_project(cfg)
    if project is not None:
        add("minigpt", lambda: project)
    return made


def optimizer_rows(cfg, name, rounds):
    rows = []
    for kind, kw in (("fused", dict(fused=True)), ("foreach", dict(foreach=True)), ("for-loop", dict(foreach=False, fused=False))):
        model = m.hf_gpt2(cfg)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4, **kw)
        s = c.summary(c.repeat(opt.step, rounds, warmup=2))
        rows.append({"config": name, "adamw": kind, "ms": s["median"] * 1e3, "min": s["min"] * 1e3, "max": s["max"] * 1e3})
    return rows


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--nanogpt", default=os.environ.get("NANOGPT_DIR"))
    ap.add_argument("--llms", default=os.environ.get("LLMS_FROM_SCRATCH_DIR"))
    ap.add_argument("--configs", nargs="*", default=list(m.CONFIGS))
    ap.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"])
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--forward", action="store_true")
    ap.add_argument("--no-compile", action="store_true")
    a = ap.parse_args()
    torch.set_num_threads(c.threads())
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rows, gemms, optimizers = [], [], []
    for name in a.configs:
        cfg = m.CONFIGS[name]
        x = torch.randint(cfg["vocab"], (cfg["batch"], cfg["block"]))
        y = torch.roll(x, -1, dims=1)
        tokens, e = x.numel(), cfg["n_embd"]
        for dtype in a.dtypes:
            torch._dynamo.reset()
            made = candidates(cfg, a)
            best = 0.0
            big = torch.randn(2048, 2048, dtype=dtypes[dtype])
            steps, times, cpus, losses = {}, {}, {}, {}
            for cand, (loss, opt) in made.items():
                def step(loss=loss, opt=opt, cand=cand):
                    if a.forward:
                        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
                            losses[cand] = loss(x, y).item()
                        return
                    opt.zero_grad(set_to_none=True)
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
                        value = loss(x, y)
                    value.backward()
                    opt.step()
                    losses[cand] = value.item()
                try:
                    t = time.perf_counter()
                    step()
                    first = time.perf_counter() - t
                    step()
                    steps[cand], times[cand], cpus[cand] = step, [], []
                    print(f"{name} {dtype} {cand}: first step {first:.1f} s, loss {losses[cand]:.3f}", file=sys.stderr, flush=True)
                except Exception as err:
                    print(f"{cand}: {type(err).__name__}: {str(err).splitlines()[0]}", file=sys.stderr)
            for _ in range(a.rounds):
                t, cpu = time.perf_counter(), time.process_time()
                big @ big
                wall, cpu = time.perf_counter() - t, time.process_time() - cpu
                best = max(best, 2 * 2048**3 / (cpu if c.threads() == 1 else wall) / 1e9)
                for cand, step in steps.items():
                    t, cpu = time.perf_counter(), time.process_time()
                    step()
                    times[cand].append(time.perf_counter() - t)
                    cpus[cand].append(time.process_time() - cpu)
            gemms.append({"config": name, "dtype": dtype, "gemm": "2048x2048x2048", "gflop_s": best})
            for label, shape in (("mlp up", (tokens, e, 4 * e)), ("mlp down", (tokens, 4 * e, e)), ("head", (tokens, e, cfg["vocab"]))):
                gemms.append({"config": name, "dtype": dtype, "gemm": f"{label} {'x'.join(map(str, shape))}",
                              "gflop_s": gemm_gflops(dtypes[dtype], shape, 7)})
            base = c.summary((cpus if c.threads() == 1 else times).get("nanoGPT", [float("nan")]))["median"]
            for cand, ts in times.items():
                s, cpu = c.summary(ts), c.summary(cpus[cand])["median"]
                fast = m.flops_per_token(cfg) / (3 if a.forward else 1) * tokens / (min(cpus[cand]) if c.threads() == 1 else s["min"]) / 1e9
                rows.append({"config": name, "dtype": dtype, "pass": "forward" if a.forward else "step", "model": cand, "tok_s": tokens / s["median"],
                             "min": tokens / s["max"], "max": tokens / s["min"], "tok_cpu_s": tokens / cpu,
                             "vs_nanoGPT": base / (cpu if c.threads() == 1 else s["median"]),
                             "gflop_s": fast, "mfu": fast / best, "loss": losses[cand]})
                print(c.table(rows[-1:], list(rows[-1])).splitlines()[-1], file=sys.stderr, flush=True)
            del made, steps
            gc.collect()
        optimizers += [] if a.forward else optimizer_rows(cfg, name, a.rounds)
    print(c.table(gemms, ["config", "dtype", "gemm", "gflop_s"]))
    print(c.table(optimizers, ["config", "adamw", "ms", "min", "max"]))
    c.report("train_step", rows, ["config", "dtype", "pass", "model", "tok_s", "min", "max", "tok_cpu_s", "vs_nanoGPT", "gflop_s", "mfu", "loss"],
             gemm=gemms, optimizer=optimizers)


if __name__ == "__main__":
    main()
