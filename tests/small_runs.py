"""A model, a stream of ids and a recipe that take no time, for the tests of training and the programs they start."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from minigpt.data import TokenArray
from minigpt.engine.recipes import load_recipe
from minigpt.engine.stepper import Stepper
from minigpt.engine.train_config import TrainConfig
from minigpt.gpt2 import GPT2, GPT2Config


ROOT = Path(__file__).resolve().parent.parent


SHAPE = GPT2Config(vocab_size=300, block_size=32, n_layer=2, n_head=2, n_embd=32)


def tiny(**changes) -> GPT2:
    torch.manual_seed(0)
    return GPT2(replace(SHAPE, **changes))


def stream(n: int = 5000, seed: int = 0) -> TokenArray:
    rng = np.random.default_rng(seed)
    ids = (np.cumsum(rng.integers(0, 3, n)) % 290).astype(np.uint16)
    return TokenArray(ids, rng.integers(0, 2, n).astype(np.uint8))


def same(a: GPT2, b: GPT2) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def gradients(stepper: Stepper, ids: np.ndarray, targets: np.ndarray) -> torch.Tensor:
    stepper.gradients(ids, targets)
    return torch.cat([p.grad.flatten() for p in stepper.model.parameters()])


def run_script(code: str, *args, env: dict | None = None) -> subprocess.Popen:
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=settings, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


SMALL = {"max_steps": 6, "batch_size": 8, "save_every": 3, "eval_every": 3, "eval_windows": 2, "log_every": 1, "warmup_steps": 2}


def small_recipe() -> dict:
    """nano-stories with a model that takes no time."""
    recipe = load_recipe("nano-stories")
    recipe["model"] |= {"n_layer": 1, "n_embd": 32, "block_size": 64, "n_head": 2}
    return recipe | {"tokenizer": {"train": 400}}


PHASED = TrainConfig(max_steps=40, batch_size=4, micro_batch=2, lr=1e-2, warmup_steps=5, schedule="wsd", stable=0.5,
                     log_every=5, eval_every=10, save_every=10, eval_windows=4)
SEVERAL = TrainConfig(max_steps=12, batch_size=8, micro_batch=2, lr=3e-3, warmup_steps=4, log_every=1, eval_every=6,
                      save_every=6, eval_windows=8, device="cpu", keep_last=3)
