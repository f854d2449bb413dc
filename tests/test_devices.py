"""engine/devices: where to compute, and in which numbers."""
import os

import pytest
import torch

from minigpt.engine.devices import pick_device, pick_dtype, total_memory


def test_devices_and_dtypes():
    assert pick_device("cpu") == torch.device("cpu") and pick_device("auto") == pick_device()
    assert pick_dtype("cpu") == torch.float32 and pick_dtype("cpu", "bfloat16") == torch.bfloat16
    assert pick_dtype("cpu", torch.float16) == torch.float16 and pick_dtype("cpu", "auto") == torch.float32
    assert pick_dtype("cpu", "float16", training=True) == torch.float16
    for bad in ("gpu", "cuda:x"):
        with pytest.raises(ValueError, match=bad):
            pick_device(bad)
    for bad in ("int8", "nonsense", "relu", torch.int64):
        with pytest.raises(ValueError):
            pick_dtype("cpu", bad)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="not available"):
            pick_device("cuda")


@pytest.mark.parametrize("bf16, training, dtype", [
    (True, False, torch.bfloat16), (True, True, torch.bfloat16), (False, False, torch.float32),
    (False, True, torch.float16)])
def test_an_old_gpu_trains_in_float16(monkeypatch, bf16, training, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    assert pick_device() == torch.device("cuda")
    assert pick_dtype("cuda:0", "auto", training) == pick_dtype(None, None, training) == dtype
    assert pick_dtype("cpu", None, training) == torch.float32
    assert pick_dtype("cuda", "float32", training) == torch.float32


def test_float16_is_refused_where_it_cannot_train(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_dtype("mps", "float16") == torch.float16 and pick_dtype("mps", training=True) == torch.float32
    with pytest.raises(ValueError, match="does not train on mps"):
        pick_dtype(torch.device("mps"), "float16", training=True)


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="POSIX")
def test_total_memory_is_the_machines():
    psutil = pytest.importorskip("psutil")
    assert total_memory(torch.device("cpu")) == pytest.approx(psutil.virtual_memory().total, rel=0.01)
