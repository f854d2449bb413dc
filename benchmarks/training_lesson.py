"""Sentences of lesson 04 that no cell measures, over several seeds.

How the first weights decide (300 steps of SGD at 0.3 and of AdamW at 0.003), whether another rate suits SGD better,
what warm-up and clipping do at a rate of 0.02 (300 steps), and how far the model that writes gets below the bigram
line. `long` is the race of the optimizers, the sweep, warm-up and clipping once more, five times as long, past that
line. Everything else is as in the lesson: its texts, tokenizer and shapes. Two more are of deeper notebooks: 2,400
windows in batches of 2, 8 and 32 (deeper/optimizers), and three sizes at three budgets of operations
(deeper/resources). What is not in the default of --only runs where it is named.

    python benchmarks/training_lesson.py [--seeds 3] [--only starts rates wall story long batches sizes]
"""
from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minigpt import GPT2, GPT2Config, load_text  # noqa: E402
from minigpt.data import split_held  # noqa: E402
from minigpt.deeper.resources import flops_per_token  # noqa: E402
from minigpt.engine.tokenizer import Tokenizer  # noqa: E402
from minigpt.training import held_loss, make_optimizer, ngram_losses, train_model  # noqa: E402


def new_model(seed: int, width: int, heads: int, wte_std: float, wpe_std: float = 0.02) -> GPT2:
    torch.manual_seed(seed)
    model = GPT2(GPT2Config(vocab_size=512, block_size=64, n_layer=2, n_head=heads, n_embd=width))
    nn.init.normal_(model.wte.weight, std=wte_std)
    nn.init.normal_(model.wpe.weight, std=wpe_std)
    return model


def last_loss(model: GPT2, train: Tensor, held: Tensor, **settings) -> float:
    """The held-out loss at the end of a run."""
    train_model(model, settings.pop("make")(model), train, held[:513], report=lambda row: None,
                eval_every=settings["max_steps"], **settings)
    return held_loss(model, held)


def sgd(model: GPT2, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def steps_for(width: int, budget: float) -> int:
    """Steps of 8 windows of 64 tokens that take so many operations."""
    config = GPT2Config(vocab_size=512, block_size=64, n_layer=2, n_head=2, n_embd=width)
    return round(budget / (8 * 64 * flops_per_token(config)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["starts", "rates", "wall", "story"])
    args = parser.parse_args()
    texts, held_texts = split_held(load_text(), 0.05)
    tokenizer = Tokenizer.train(texts[:500], 512, ["<|endoftext|>"])
    end = tokenizer.special_tokens["<|endoftext|>"]
    train, held = (torch.tensor([i for text in some for i in (end, *tokenizer.encode_ordinary(text))])
                   for some in (texts, held_texts))
    bigram = ngram_losses(train.numpy(), held.numpy(), 512)[1]
    plain = dict(schedule="constant", warmup_steps=0, clip=1e9)
    adamw = {lr: functools.partial(make_optimizer, lr=lr) for lr in (0.003, 0.02)}
    optimizers = {"SGD": functools.partial(sgd, lr=0.3), "AdamW": adamw[0.003]}
    starts = {"as it was": dict(wte_std=0.02), "shorter positions": dict(wte_std=0.02, wpe_std=0.004),
              "longer tokens": dict(wte_std=0.1)}
    runs = {
        "starts": {f"{which}, {name}": (dict(width=64, heads=2, **start), dict(make=make, max_steps=300, **plain))
                   for which, make in optimizers.items() for name, start in starts.items()},
        "rates": {f"SGD at {lr}": (dict(width=64, heads=2, wte_std=0.1), dict(
            make=functools.partial(sgd, lr=lr), max_steps=300, **plain))
                  for lr in (0.3, 0.5, 1.0, 3.0)},
        "wall": {name: (dict(width=64, heads=2, wte_std=0.1),
                        dict(make=adamw[0.02], max_steps=300, warmup_steps=warmup, clip=clip))
                 for name, warmup, clip in [("neither", 0, 1e9), ("warm-up", 100, 1e9), ("clipping", 0, 1.0),
                                            ("both", 100, 1.0)]},
        "story": {"the model that writes": (dict(width=128, heads=4, wte_std=0.05), dict(
            make=functools.partial(make_optimizer, lr=5e-3, betas=(0.9, 0.98)), max_steps=2000, warmup_steps=50))},
        "long": {name: (dict(width=64, heads=2, wte_std=0.1), dict(make=make, max_steps=1500, **settings))
                 for name, make, settings in [
                     *((f"SGD at {lr}", functools.partial(sgd, lr=lr), plain) for lr in (0.3, 1.0)),
                     *((f"AdamW at {lr}", functools.partial(make_optimizer, lr=lr), plain)
                       for lr in (0.001, 0.003, 0.01, 0.03)),
                     *((f"0.02, {name}", adamw[0.02], dict(warmup_steps=warmup, clip=clip)) for name, warmup, clip
                       in [("neither", 0, 1e9), ("warm-up", 100, 1e9), ("clipping", 0, 1.0), ("both", 100, 1.0)])]},
        "batches": {f"{rows} windows at {lr}": (dict(width=64, heads=2, wte_std=0.1), dict(
            make=functools.partial(make_optimizer, lr=lr), max_steps=2400 // rows, warmup_steps=240 // rows,
            batch_size=rows))
                    for rows, first in ((2, 0.0025), (8, 0.005), (32, 0.005)) for lr in (first, 2 * first, 4 * first)},
        "sizes": {f"width {width}, {budget:.0e}": (dict(width=width, heads=2, wte_std=0.8 / width ** 0.5), dict(
            make=functools.partial(make_optimizer, lr=5e-3), max_steps=steps_for(width, budget), warmup_steps=30))
                  for budget in (1e11, 3e11, 9e11) for width in (32, 64, 128)}}
    print(f"bigram line {bigram:.2f}; held-out losses with the seeds 0 to {args.seeds - 1}")
    for part in args.only:
        for name, (shape, settings) in runs[part].items():
            losses = [last_loss(new_model(seed, **shape), train, held, seed=seed, **{"batch_size": 8} | settings)
                      for seed in range(args.seeds)]
            print(f"{part:8}{name:26}" + " ".join(f"{loss:7.2f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
