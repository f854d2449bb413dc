"""One LoRA step (r=8 on c_attn, c_proj, c_fc) against one full fine-tuning step of the same GPT-2: tokens/s, peak RSS.

  python benchmarks/lora_step.py [--configs shipped gpt2-small] [--dtypes fp32 bf16] [--steps 4] [--rounds 2]

The loss is F.cross_entropy over whole logits in every row but "LoRA, train()'s loss", so that rows differ in nothing else.
Every measurement is its own process (so that peak RSS is its own); methods alternate. `rss_mb` is the peak RSS less
that of the bare imports; `state_mb` the optimizer's state. With BENCH_THREADS=1 `vs_full` is taken from CPU time.
"""
from __future__ import annotations

import argparse
import sys
import time

import _common as c

TARGETS = ["c_attn", "c_proj", "c_fc"]
RANK = 8


def load_project(cfg, method):
    """Plug the project in here: return loss(x, y) and the trainable parameters, for "LoRA" or "full"."""
    minigpt = c.project()
    if minigpt is None:
        return None
    import torch
    from minigpt.deeper.quantization import quantize_model
    from minigpt.engine.kernels import use_kernels
    from minigpt.gpt2 import GPT2, GPT2Config
    from minigpt.lora import LoraConfig, apply_lora
    from minigpt.training import summed_loss
    model = GPT2(GPT2Config(vocab_size=cfg["vocab"], block_size=cfg["block"], n_layer=cfg["n_layer"],
                            n_head=cfg["n_head"], n_embd=cfg["n_embd"])).train()
    if method.endswith("NF4"):
        quantize_model(model)
    if method.startswith("LoRA"):
        apply_lora(model, LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS))
    loss_of = use_kernels(model)                   # as train() does
    if not method.endswith("train()'s loss"):
        loss_of = summed_loss

    def loss(x, y):
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        return loss_of(model, x, y, dtype, 1 / y.numel())
    return loss, [p for p in model.parameters() if p.requires_grad]


def build(cfg, engine, method):
    import torch.nn.functional as F
    import _models as m
    if engine == "minigpt":
        return load_project(cfg, method)
    model = m.hf_gpt2(cfg).train()
    if method.startswith("LoRA"):
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS,
                                                 fan_in_fan_out=True, task_type="CAUSAL_LM"))
    params = [p for p in model.parameters() if p.requires_grad]

    def loss(x, y):
        logits = model(input_ids=x, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return loss, params


def one(config, engine, method, dtype, steps):
    import torch
    import torch.nn.functional as F  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    import peft  # noqa: F401
    import _models as m
    torch.set_num_threads(c.threads())
    cfg = m.CONFIGS[config]
    imports = c.rss_mb()
    torch.manual_seed(0)
    built = build(cfg, engine, method)
    if built is None:
        return None
    loss, params = built
    params = list(params)
    opt = torch.optim.AdamW(params, lr=1e-4, fused=True)
    x = torch.randint(cfg["vocab"], (cfg["batch"], cfg["block"]))
    y = torch.roll(x, -1, dims=1)
    times, cpus = [], []
    c.reset_peak_rss()
    for _ in range(steps + 2):
        t, cpu = time.perf_counter(), time.process_time()
        opt.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            value = loss(x, y)
        value.backward()
        opt.step()
        value.item()
        times.append(time.perf_counter() - t)
        cpus.append(time.process_time() - cpu)
    state = sum(v.numel() * v.element_size() for s in opt.state.values() for v in s.values() if torch.is_tensor(v))
    return {"times": times[2:], "cpus": cpus[2:], "tokens": x.numel(), "rss_mb": c.vm_hwm_mb() - imports, "state_mb": state / 2**20,
            "trainable": sum(p.numel() for p in params)}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--configs", nargs="*", default=["shipped", "gpt2-small"])
    ap.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"])
    ap.add_argument("--steps", type=int, default=4)
    ap.add_argument("--rounds", type=int, default=2)
    a = ap.parse_args()
    cases = [("HF", "full"), ("peft", "LoRA"), ("minigpt", "full"), ("minigpt", "LoRA"),
             ("minigpt", "LoRA, train()'s loss"), ("minigpt", "LoRA over NF4")]
    rows = []
    for config in a.configs:
        for dtype in a.dtypes:
            results = {}
            for _ in range(a.rounds):
                for engine, method in cases:
                    r, reason = c.in_subprocess(one, config, engine, method, dtype, a.steps, timeout_s=600)
                    if r:
                        results.setdefault((engine, method), []).append(r)
                    elif reason:
                        print(f"{engine} {method}: {reason.splitlines()[0]}", file=sys.stderr)
            key = "cpus" if c.threads() == 1 else "times"
            base = c.summary(t for r in results.get(("HF", "full"), [{key: [float("nan")]}]) for t in r[key])["median"]
            for (engine, method), rs in results.items():
                s, n = c.summary(t for r in rs for t in r["times"]), rs[0]["tokens"]
                rows.append({"config": config, "dtype": dtype, "engine": engine, "method": method, "tok_s": n / s["median"],
                             "min": n / s["max"], "max": n / s["min"], "tok_cpu_s": n / c.summary(t for r in rs for t in r["cpus"])["median"],
                             "vs_full": base / c.summary(t for r in rs for t in r[key])["median"],
                             "rss_mb": c.summary(r["rss_mb"] for r in rs)["median"], "state_mb": rs[0]["state_mb"],
                             "trainable": rs[0]["trainable"]})
                print(c.table(rows[-1:], list(rows[-1])).splitlines()[-1], file=sys.stderr, flush=True)
    c.report("lora_step", rows, ["config", "dtype", "engine", "method", "tok_s", "min", "max", "tok_cpu_s", "vs_full", "rss_mb", "state_mb", "trainable"])


if __name__ == "__main__":
    main()
