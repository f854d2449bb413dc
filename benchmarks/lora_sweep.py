"""Rank, place and learning rate of LoRA, and full tuning beside it, on the pirate of the lesson, trained to a plateau.

  python benchmarks/lora_sweep.py [--steps 60] [--seeds 0 1] [--dtype bf16]

The data, the loop and the pirate loss are the lesson's own: the cells of nbs/09_lora.ipynb are run as they stand. `pirate` is
the loss on held-out answers, `text` that on stories (1.68 before any training), each after the last step; `curve` has the
held-out loss on the way. The adapters' lora_alpha is twice their rank. Two runs of double length say whether `--steps` was enough.
"""
from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import _common as c

CELLS = ("pirate", "pirate1", "pirate1a", "identity", "rows", "rows1", "render", "render0", "render1", "pad", "batches",
         "two", "step", "teach", "full")
ALL = ("c_attn", "c_proj", "c_fc")
MLP = ("mlp.c_fc", "mlp.c_proj")
CASES = [("full", None, None, 1e-4), ("full", None, None, 3e-4), ("LoRA", ALL, 8, 2e-3), ("LoRA", ALL, 1, 2e-3),
         ("LoRA", ALL, 32, 2e-3), ("LoRA", ("c_attn",), 32, 2e-3), ("LoRA", MLP, 13, 2e-3)]
RATES = [("LoRA", ALL, 8, 1e-4), ("LoRA", ALL, 8, 5e-4), ("LoRA", ALL, 8, 5e-3)]  # with the first seed


def lesson() -> dict:
    """What the cells of the lesson define."""
    cells = json.loads((Path(__file__).parent.parent / "nbs" / "09_lora.ipynb").read_text(encoding="utf-8"))["cells"]
    space: dict = {}
    exec("import torch\nfrom torch import nn", space)
    for name in CELLS:
        exec("".join(next(cell["source"] for cell in cells if cell["id"] == name)), space)
    return space


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--steps", type=int, default=60)
    ap.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    ap.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    a = ap.parse_args()
    c.project()
    import torch
    torch.set_num_threads(c.threads())
    from minigpt import load_text
    from minigpt.gpt2 import GPT2
    from minigpt.lora import LoraConfig, apply_lora
    from minigpt.training import held_loss
    here, model, rows = lesson(), GPT2.from_pretrained(), []
    stories = torch.tensor([i for text in load_text(limit=40) for i in here["tokenizer"].encode_ordinary(text)])[:4097]
    dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32

    def text_loss(student):
        return held_loss(student, stories, block_size=256, rows=4)

    def one(method, targets, r, lr, seed, steps):
        start = time.time()
        torch.manual_seed(seed)
        student = copy.deepcopy(model)
        if method == "full":
            here["only_matrices"](student)
        else:
            apply_lora(student, LoraConfig(r, lora_alpha=2 * r, target_modules=targets))
        curve = here["teach"](student, lr, steps=steps, seed=seed, dtype=dtype)
        rows.append({"method": method, "targets": " ".join(targets or ("all weights",)), "r": r, "lr": lr, "seed": seed,
                     "steps": steps, "trained": sum(p.numel() for p in student.parameters() if p.requires_grad),
                     "pirate": round(curve[-1][1], 4), "text": round(text_loss(student), 4),
                     "curve": [[step, round(loss, 4)] for step, loss in curve]})
        print(json.dumps(rows[-1]), round(time.time() - start), "s", flush=True)

    print("before", here["pirate_loss"](model), text_loss(model), flush=True)
    for seed in a.seeds:
        for case in CASES:
            one(*case, seed, a.steps)
    for case in RATES:
        one(*case, a.seeds[0], a.steps)
    for case in CASES[1:3]:
        one(*case, a.seeds[0], 2 * a.steps)
    c.report("lora_sweep", rows, ["method", "targets", "r", "lr", "seed", "steps", "trained", "pirate", "text"])


if __name__ == "__main__":
    main()
