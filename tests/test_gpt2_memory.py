"""estimate_memory() against the memory that a fresh process really takes, as Linux counts it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.deeper.resources import estimate_memory
from minigpt.gpt2 import GPT2Config, count_parts

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")

# batch, block, dtype. Tensors of less than 32 MiB are kept by malloc one time and given back the next, so the forward
# passes, which know no other memory, are measured with MALLOC; a training step is measured as users have it.
FORWARD = [("nano", 96, 256, "float32"), ("nano", 288, 256, "float32"), ("mini", 4, 256, "float32"),
           ("mini", 4, 256, "bfloat16"), ("gpt2", 2, 256, "float32"), ("gpt2", 1, 256, "bfloat16")]
TRAINING = [("mini", 2, 256, "float32"), ("mini", 1, 1024, "bfloat16"), ("gpt2", 1, 256, "float32"),
            ("gpt2", 1, 256, "bfloat16")]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}

# One pass or two training steps of a fresh model, in a fork that has loaded the libraries and run a small model before.
MEASURE = """
import json, os, sys
import torch
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.engine.kernels import use_kernels
from peak_memory import forget_peak, status

torch.set_num_threads(1)

def run(config, batch, block, dtype, kind):
    with torch.device("meta"):                        # as many bytes, without drawing random numbers for them
        model = GPT2(config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.01)
    ids = torch.zeros(batch, block, dtype=torch.long)
    if kind == "forward":
        model = model.to(dtype).eval()
        forget_peak()
        with torch.inference_mode():
            model(ids)
            model(ids)
        return
    forget_peak()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    summed_loss = use_kernels(model, dtype)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss = summed_loss(model, ids, ids, dtype, 1 / ids.numel())
        loss.backward()
        optimizer.step()

def measure(name, batch, block, dtype, kind):
    dtype = getattr(torch, dtype)
    run(GPT2Config.preset("nano", n_layer=1, block_size=64), 1, 32, dtype, kind)
    base = forget_peak()
    run(GPT2Config.preset(name), batch, block, dtype, kind)
    return status("VmHWM") - base

for case in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if not os.fork():
        os.write(write, str(measure(*case)).encode())
        os._exit(0)
    os.close(write)
    print(os.read(read, 99).decode() or "failed", flush=True)
    os.close(read)
    os.wait()
"""


def measured(cases: list[tuple], kind: str, **settings: str) -> list[int]:
    """Bytes that a fresh process grows by, for each case."""
    # one thread from the start: what malloc keeps of freed memory depends on what a pool of threads has allocated before
    env = os.environ | settings | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                                   "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    out = subprocess.run([sys.executable, "-c", MEASURE, json.dumps([[*case, kind] for case in cases])],
                         capture_output=True, text=True, cwd=ROOT, env=env)
    assert out.returncode == 0 and "failed" not in out.stdout, out.stderr[-800:]
    return list(map(int, out.stdout.split()))


@pytest.mark.parametrize("kind, cases, bound, settings", [("forward", FORWARD, 0.05, MALLOC), ("training", TRAINING, 0.15, {})])
def test_memory_is_what_is_estimated(kind, cases, bound, settings, ledger):
    wrong = {}
    for case, real in zip(cases, measured(cases, kind, **settings), strict=True):
        name, batch, block, dtype = case
        need = estimate_memory(GPT2Config.preset(name), batch, block, dtype, training=kind == "training")
        off = abs(need.peak / real - 1)
        ledger(f"memory of {name}, {kind} {batch} x {block}, {dtype}: estimate off by", off, bound=bound)
        if off > bound:
            wrong[case] = f"estimated {need}, measured {real / 2**20:.0f} MiB"
    assert wrong == {}


def test_parts_of_the_estimate():
    config = GPT2Config.preset("mini")
    need = estimate_memory(config, 4, 256, training=True)
    assert need.weights == 4 * sum(count_parts(config).values()) == need.gradients == need.optimizer // 2
    assert need.peak > need.weights + need.optimizer + need.activations
    half = estimate_memory(config, 4, 256, "bfloat16")
    assert half.weights * 2 == need.weights and half.gradients == half.optimizer == 0
    assert estimate_memory(config, 8, 256).activations == 2 * estimate_memory(config, 4, 256).activations
    assert estimate_memory(config, 1).peak == estimate_memory(config, 1, 1024).peak
    assert "weights 137 MiB" in str(need)
    rows = 4 * 256 * config.vocab_size                                  # a GPU's loss: three float32 rows, not one of dtype
    assert estimate_memory(config, 4, 256, training=True, device="cuda").activations - need.activations == (12 - 4) * rows


@pytest.mark.parametrize("batch, block, dtype", [(0, 8, "float32"), (1, 0, "float32"), (1, 1025, "float32"), (1, 8, "int8")])
def test_sizes_that_cannot_be(batch, block, dtype):
    with pytest.raises(ValueError):
        estimate_memory(GPT2Config.preset("mini"), batch, block, dtype)
