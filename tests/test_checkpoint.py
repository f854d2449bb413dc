"""Checkpoints: what is kept, what is broken, and what a killed process leaves."""
import os
import shutil

import pytest
import torch

from minigpt.engine.checkpoint import Checkpoints, load_tensors, model_tensors, optimizer_tensors


pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, here and in the processes that the tests start


def test_last_and_best_are_kept(tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4, 5):
        saved.save(step, {"w": torch.tensor([float(step)])}, {}, {"step": step}, {})
        if step == 2:
            saved.mark_best(2, 1.0)
    assert saved.steps() == [2, 4, 5] and saved.best() == (2, 1.0)
    weights, _, state = saved.load(2)
    assert weights["w"].item() == 2 and state == {"step": 2}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_broken_file_falls_back(tmp_path, file, harm):
    saved = Checkpoints(tmp_path)
    for step in (1, 2):
        saved.save(step, {"w": torch.ones(100)}, {"w:step": torch.ones(1)}, {"step": step}, {})
    path = saved.path(2) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if harm == "gone" else path.write_bytes(data if harm == "flip" else data[:-3])
    with pytest.warns(UserWarning, match="broken"):
        assert saved.newest() == 1


def test_a_save_never_removes_itself_nor_keeps_what_was_given_up(tmp_path):
    """Step 4 is broken, the run went back to 2 and saves 3: 3 stays, 4 goes."""
    saved = Checkpoints(tmp_path, keep=1)
    for step in (2, 4, 3):
        saved.save(step, {"w": torch.tensor([float(step)])}, {}, {"step": step}, {})
        if step == 4:
            (saved.path(4) / "model.safetensors").write_bytes(b"broken")
    assert saved.steps() == [3] and saved.newest() == 3


class Killed(BaseException):
    """A process that ends where it stands."""


@pytest.mark.parametrize("at", range(8))
def test_killed_at_any_moment_of_a_second_save_of_a_step(tmp_path, monkeypatch, at):
    """The run went back and saves step 2 again: after each thing that is done to the disk the process may end, and the next
    start finds the older or the newer one of step 2, whole, and nothing else."""
    saved, done = Checkpoints(tmp_path), []
    saved.save(2, {"w": torch.zeros(9)}, {}, {"step": 2}, {})
    remove, replace = shutil.rmtree, os.replace

    def step(do, *args, **options):
        if len(done) == at:
            raise Killed
        done.append(args)
        do(*args, **options)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **o: step(remove, *a, **o))
    monkeypatch.setattr(os, "replace", lambda *a, **o: step(replace, *a, **o))
    try:
        saved.save(2, {"w": torch.ones(9)}, {}, {"step": 2}, {})
        finished = True
    except Killed:
        finished = False
    monkeypatch.undo()
    saved.settle()
    assert saved.newest() == 2 and saved.steps() == [2]
    value = saved.load(2)[0]["w"]
    assert torch.equal(value, torch.ones(9)) or (not finished and torch.equal(value, torch.zeros(9)))
    assert finished or at < 7


def test_an_old_folder_that_is_half_removed_is_replaced_on_the_next_start(tmp_path):
    """Killed while the older folder of a step was being removed: some of its files are gone, the new one waits aside."""
    saved = Checkpoints(tmp_path)
    saved.save(4, {"w": torch.zeros(9)}, {}, {"step": 4}, {})
    saved.save(6, {"w": torch.ones(9)}, {}, {"step": 4}, {})
    os.replace(saved.path(6), tmp_path / ".step-00000004.new")
    (saved.path(4) / "model.safetensors").unlink()
    assert not saved.is_whole(4)
    saved.settle()
    assert torch.equal(saved.load(4)[0]["w"], torch.ones(9)) and saved.is_whole(4)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_the_directory_is_synced_after_the_name(tmp_path, monkeypatch):
    """Without it the disk may forget the name of a folder that is complete."""
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append(os.fstat(handle).st_ino), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(str(b)), replace(a, b)))
    Checkpoints(tmp_path).save(1, {"w": torch.zeros(9)}, {}, {"step": 1}, {})
    last = max(i for i, what in enumerate(order) if str(what).endswith("step-00000001"))
    assert tmp_path.stat().st_ino in order[last:]


def test_an_optimizer_with_another_state_comes_back(tmp_path):
    """SGD with momentum, whose state has no step count; saved after two steps, the third is the same."""
    def make():
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step(layer, optimizer):
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    one, two = make(), make()
    for _ in range(2):
        step(*one)
    saved = Checkpoints(tmp_path)
    saved.save(2, model_tensors(one[0]), optimizer_tensors(*one), {}, {})
    load_tensors(*two, *saved.load(2)[:2])
    for pair in (one, two):
        step(*pair)
    assert all(torch.equal(p, q) for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True))
