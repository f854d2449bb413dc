"""What each change from GPT-2 to Llama brings to a small network: held-out loss, five seeds, the same batches.

  python benchmarks/architecture_ablation.py [--log FILE]

Text, shape and loop are the lesson's own: the cells of nbs/deeper/architecture_ablation.ipynb are run as they stand.
All networks of a set read the same tokens in the same number of steps; `gflop` counts the operations of one training step
(torch's counter, matrix products), `parameters` the weights. `held` is the loss after the last step, on average over the
seeds; `difference` is that minus GPT-2's with the same seed, on average, and the least and the most. `runs` has each run by
itself. Sets: all networks; some whose blocks' matrices begin as narrow as GPT-2's (`wider` 1, three seeds); GPT-2 and Llama
at two other rates, and those and RoPE with twice the steps (one seed).
--log: runs that stand in this file (a JSON object a line) are not made again, new ones are added to it.
Set BENCH_THREADS=1 to repeat the numbers bit for bit on one machine; other threads or processors add in another order.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import _common as c

CELLS = ("data", "data-1", "data-2", "shape", "budget", "run")
SETTING = ("lr", "steps", "wider")
COLUMNS = ["network", *SETTING, "seeds", "held", "difference", "min", "max", "parameters", "gflop"]
SOME = ("GPT-2", "SwiGLU", "RoPE", "all five")


def lesson() -> dict:
    """What the cells of the notebook define."""
    path = Path(__file__).parent.parent / "nbs" / "deeper" / "architecture_ablation.ipynb"
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]}
    space: dict = {}
    exec("from minigpt.llama import LlamaConfig\nfrom minigpt.deeper.architecture_ablation import build_variant", space)
    for name in CELLS:
        exec(cells[name], space)
    return space


def step_gflop(model, batch_size: int) -> float:
    """Operations of forward and backward pass of one batch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from minigpt.training import summed_loss
    ids = torch.zeros(batch_size, model.config.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        summed_loss(model, ids, ids).backward()
    return counter.get_total_flops() / 1e9


def plan(variants: dict, here: dict) -> list[dict]:
    """Every run, without its result."""
    usual = {"lr": here["PEAK"], "steps": here["STEPS"], "wider": here["WIDER"]}
    sets = [(variants, range(5), {}), (SOME, range(3), {"wider": 1.0}),
            *((("GPT-2", "all five"), range(1), {"lr": lr}) for lr in (0.002, 0.01)),
            (("GPT-2", "RoPE", "all five"), range(1), {"steps": 2 * here["STEPS"]})]
    return [{"network": name, "seed": seed, **usual, **changed} for names, seeds, changed in sets
            for seed in seeds for name in names]


def table(runs: list[dict], variants: dict, here: dict) -> list[dict]:
    """A row for each network and setting: means over seeds, and the differences from GPT-2 with the same seed."""
    rows = []
    for name, *setting in dict.fromkeys((run["network"], *(run[key] for key in SETTING)) for run in runs):
        held, base = ({run["seed"]: run["held"] for run in runs
                       if [run["network"], *(run[key] for key in SETTING)] == [one, *setting]} for one in (name, "GPT-2"))
        gains = [held[seed] - base[seed] for seed in held]
        model = here["build_variant"](here["shape"], variants[name])
        rows.append({"network": name, **dict(zip(SETTING, setting)), "seeds": len(held),
                     "held": round(statistics.mean(held.values()), 4), "difference": round(statistics.mean(gains), 4),
                     "min": round(min(gains), 4), "max": round(max(gains), 4),
                     "parameters": sum(p.numel() for p in model.parameters()),
                     "gflop": round(step_gflop(model, here["BATCH"]), 4)})
    return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--log", type=Path)
    a = ap.parse_args()
    c.project()
    import torch
    torch.set_num_threads(c.threads())
    from minigpt.deeper.architecture_ablation import CHANGES, LLAMA
    here, runs, start = lesson(), [], time.time()
    variants = {"GPT-2": ()} | {name: (name,) for name in CHANGES} | {"all five": LLAMA}
    lines = a.log.read_text(encoding="utf-8").splitlines() if a.log and a.log.exists() else []
    made = [json.loads(line) for line in lines]
    for run in plan(variants, here):
        done = [one for one in made if one | run == one]
        if not done:
            history = here["run"](variants[run["network"]], **{key: run[key] for key in ("seed", *SETTING)})
            done = [run | {"held": round(history[-1]["held"], 4),
                           "curve": [[row["step"], round(row["held"], 4)] for row in history]}]
            print(json.dumps(done[0]), round(time.time() - start), "s", file=sys.stderr, flush=True)
            if a.log:
                with a.log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(done[0]) + "\n")
        runs += done[:1]
    c.report("architecture_ablation", table(runs, variants, here), COLUMNS, runs=runs)


if __name__ == "__main__":
    main()
