"""Chapter 04: the step against torch and transformers, exact resume with real signals, checkpoints that survive, several
processes through torchrun, streams split by rank, plans, recipes. Values are computed another way than in the chapter."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from exercise_cells import exercises, said
from minigpt import training as t
from minigpt.engine.tokenizer import Tokenizer
from minigpt.engine import tracking
from minigpt.engine.runs import make_recipe
from minigpt.data import TokenArray, WindowSampler
from minigpt.deeper.packing import TokenFile, pack
from minigpt.engine.dataset_readers import load_text
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.training import Checkpoints, Phase, Ranks, Stepper, StreamSampler, TrainConfig, plan, train

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


pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, here and in the processes that the tests start


def run_script(code: str, *args, env: dict | None = None) -> subprocess.Popen:
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=settings, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ------------------------------------------------------------------ settings and schedule

@pytest.mark.parametrize("changes, words", [
    ({"lr": 0}, "lr=0"), ({"schedule": "linear"}, "cosine, wsd, constant"), ({"dtype": "int8"}, "dtype='int8'"),
    ({"max_steps": None}, "no end"), ({"micro_batch": 0}, "micro_batch=0"), ({"stable": 2.0}, "stable=2.0"),
    ({"batch_size": -1}, "batch_size=-1"), ({"keep_last": 0}, "keep_last=0"), ({"parallel": "tp"}, "ddp, fsdp"),
    ({"compile": "False"}, "compile='False'"), ({"warmup_steps": "abc"}, "warmup_steps='abc'"), ({"lr": "x"}, "lr='x'"),
    ({"max_steps": 0}, "max_steps=0"), ({"max_steps": None, "max_seconds": 0.0}, "max_seconds=0.0"),
    ({"batch_size": 2.5}, "batch_size=2.5"), ({"block_size": True}, "block_size=True"), ({"betas": (0.9,)}, "betas="),
    ({"betas": 0.9}, "betas=0.9"), ({"max_steps": (5, None)}, "max_steps="), ({"device": 3}, "device=3")])
def test_bad_settings_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**changes)


@pytest.mark.parametrize("device", [None, torch.device("cpu"), "cpu"])
def test_a_device_is_what_pick_device_takes(device):
    result = train(tiny(), stream(), TrainConfig(max_steps=1, device=device), progress=False)
    assert result.step == 1


def test_cosine_schedule_is_transformers(ledger):
    transformers = pytest.importorskip("transformers")
    config = TrainConfig(max_steps=200, warmup_steps=20, lr=1.0, final_lr=0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = transformers.get_cosine_schedule_with_warmup(optimizer, 20, 200)
    worst = 0.0
    for step in range(200):
        ours = t.learning_rate(config, step if step >= 20 else step - 1, step / 200) if step else 0.0
        worst = max(worst, abs(ours - peer.get_last_lr()[0]))     # theirs warms up from 0, one step behind
        optimizer.step()
        peer.step()
    ledger("learning rate of the cosine schedule", worst, peer="transformers", bound=1e-9)
    assert worst < 1e-9


def test_wsd_is_flat_then_falls_and_follows_the_clock():
    config = TrainConfig(max_steps=None, max_seconds=100, schedule="wsd", stable=0.5, warmup_steps=10, lr=2.0, final_lr=0.25)
    assert t.learning_rate(config, 50, 0.49) == 2.0
    assert t.learning_rate(config, 50, 1.0) == pytest.approx(0.5)
    assert t.learning_rate(config, 50, 0.75) == pytest.approx((2.0 + 0.5) / 2)


def test_only_matrices_decay():
    model = tiny()
    optimizer = t.make_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        decayed = name in ("wte.weight", "wpe.weight") or (".c_" in name and name.endswith("weight"))
        assert torch.allclose(p, before[name] * (0.95 if decayed else 1.0)), name


# ------------------------------------------------------------------ the step

@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_accumulated_gradients_are_one_big_batch(micro_batch, ledger):
    rng = np.random.default_rng(1)
    ids, targets = rng.integers(0, 300, (8, 32)), rng.integers(0, 300, (8, 32))
    targets[rng.random((8, 32)) < np.linspace(0, 1, 8)[:, None]] = -100        # row 0 counts in full, row 7 hardly
    targets[5] = -100                                                          # a micro-batch without any target
    model = tiny()
    F.cross_entropy(model(torch.from_numpy(ids)).flatten(0, 1), torch.from_numpy(targets).flatten()).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    parts = gradients(Stepper(tiny(), TrainConfig(micro_batch=micro_batch)), ids, targets)
    apart = (parts - whole).abs().max().item()
    ledger(f"gradients accumulated over micro-batches of {micro_batch} = one big batch", apart, peer="torch", bound=1e-6)
    assert torch.isfinite(parts).all() and apart < 1e-6


def test_step_is_torchs_own(ledger):
    """Clip, decay groups and update against a loop written with torch's parts, not fused."""
    ids = np.random.default_rng(2).integers(0, 300, (4, 33))
    ours, plain = tiny(), tiny()
    stepper = Stepper(ours, TrainConfig(lr=1e-3, clip=0.5))
    groups = [{"params": [p for p in plain.parameters() if (p.dim() >= 2) == big], "weight_decay": decay}
              for big, decay in ((True, 0.1), (False, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), foreach=False, fused=False)
    x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
    for _ in range(3):
        loss, norm = stepper(ids[:, :-1], ids[:, 1:], lr=1e-3)
        want = F.cross_entropy(plain(x).flatten(0, 1), y.flatten())
        want.backward()
        length = torch.sqrt(sum((p.grad ** 2).sum() for p in plain.parameters()))
        for p in plain.parameters():
            p.grad *= min(1.0, 0.5 / (length.item() + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss.item() - want.item()) < 1e-5 and abs(norm.item() - length.item()) < 1e-4
    apart = max((p - q).abs().max().item() for p, q in zip(ours.parameters(), plain.parameters()))
    ledger("weights after 3 steps = torch's AdamW, not fused", apart, peer="torch", bound=1e-4)
    assert apart < 1e-4


def test_held_out_loss_is_transformers(tmp_path, ledger):
    transformers = pytest.importorskip("transformers")
    model, data = tiny().eval(), stream(32 * 5 + 1)
    model.save_pretrained(tmp_path / "model")
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ours = t.held_out_loss(model, data, rows=2)
    losses, kept = [], []
    for start in range(0, 160, 32):
        ids = torch.from_numpy(data.ids[start:start + 33].astype(np.int64))[None]
        with torch.no_grad():
            logits = peer(ids[:, :-1]).logits[0]
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
        kept.append(torch.from_numpy(data.mask[start + 1:start + 33]) > 0)
    losses, kept = torch.cat(losses), torch.cat(kept)
    apart = max(abs(ours["held"] - losses.mean().item()), abs(ours["held_answers"] - losses[kept].mean().item()))
    ledger("held-out loss, all tokens and answers", apart, peer="transformers", bound=1e-5)
    assert apart < 1e-5


def test_flops_count_the_products():
    """6 x (parameters without position table, norms and biases) + attention, against a count of each product."""
    B, T = 3, 32
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):    # counts no fused attention
        tiny()(torch.zeros(B, T, dtype=torch.long))
    assert 3 * counter.get_total_flops() == B * T * t.flops_per_token(SHAPE, T)


def test_compile_that_fails_goes_on_without():
    code = """
import sys, warnings, numpy as np, torch, torch._inductor.config as inductor
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.training import Stepper, TrainConfig
inductor.cpp.cxx = ("no-such-compiler",)
inductor.force_disable_caches = True
ids = np.random.default_rng(0).integers(0, 300, (2, 16))
losses = []
for compile in (True, False):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=300, block_size=16, n_layer=1, n_head=1, n_embd=16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = Stepper(model, TrainConfig(compile=compile))
        losses.append([step(ids, ids, 1e-2)[0].item() for _ in range(3)])
    if compile:
        print(*[c.message for c in caught if "torch.compile" in str(c.message)])
assert losses[0] == losses[1], losses
"""
    process = run_script(code)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "torch.compile failed" in out and "training goes on without it" in out


# ------------------------------------------------------------------ exact resume

PHASED = TrainConfig(max_steps=40, batch_size=4, micro_batch=2, lr=1e-2, warmup_steps=5, schedule="wsd", stable=0.5,
                     log_every=5, eval_every=10, save_every=10, eval_windows=4)
RESUME = """
import os, random, signal, sys
import numpy as np, torch
sys.path.insert(0, sys.argv[3])
import test_training as here
from minigpt.training import Phase, train

def interrupt(row, model):
    random.random(), np.random.rand(), torch.rand(3)      # a callback that draws numbers changes nothing
    if row["step"] == 25:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))

data = here.stream()
result = train(here.tiny(dropout=0.2), [Phase(data, 0.6), Phase(data, 1.0, "answers")], here.PHASED, held=here.stream(400, 1),
               out=sys.argv[1], callbacks=[interrupt], progress=False)
print("stopped", result.stopped, result.step)
"""


def phased(out=None, **options):
    data = stream()
    return train(tiny(dropout=0.2), [Phase(data, 0.6), Phase(data, 1.0, "answers")], PHASED, held=stream(400, 1), out=out,
                 progress=False, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return phased(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_resumed_is_uninterrupted_bit_for_bit(uninterrupted, tmp_path, ledger):
    """Ctrl-C, SIGTERM, and kill -9 between checkpoints, each in a process of its own."""
    names = ("SIGINT", "SIGTERM", "SIGKILL")
    processes = {n: run_script(RESUME, tmp_path / n, n, Path(__file__).parent) for n in names}
    for name, process in processes.items():
        out, err = process.communicate(timeout=300)
        folder = tmp_path / name
        if name == "SIGKILL":
            assert process.returncode == -9
            assert Checkpoints(folder).steps() == [10, 20]
        else:
            assert f"stopped {name} 26" in out, err
            assert Checkpoints(folder).newest() == 26
        resumed = phased(folder, resume=True)
        assert same(resumed.model, uninterrupted.model), name
        one, two = (Checkpoints(r.folder).load(40) for r in (resumed, uninterrupted))
        assert one[1].keys() == two[1].keys() and all(torch.equal(one[1][k], two[1][k]) for k in one[1]), name
        assert one[2]["places"] == two[2]["places"]
        keys = ("step", "tokens", "lr", "held", "held_answers")
        rows = [[{k: row.get(k) for k in keys} for row in r.history if row["step"] % 5 == 0]
                for r in (resumed, uninterrupted)]
        assert rows[0] == rows[1], name
    apart = max((p - q).abs().max().item() for p, q in zip(resumed.model.parameters(), uninterrupted.model.parameters()))
    ledger("resumed after Ctrl-C, SIGTERM, kill -9 = uninterrupted, weights", apart, peer="torch", bound=0)


def test_csv_is_one_run(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.folder, folder)
    saved = Checkpoints(folder)
    shutil.rmtree(saved.path(40))
    phased(folder, resume=True)
    lines = (folder / "log.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split(",") == list(tracking.COLUMNS)
    assert [int(float(line.split(",")[0])) for line in lines[1:]] == list(range(5, 41, 5))


def test_looking_changes_nothing(uninterrupted):
    """Neither evaluations nor samples nor the size of micro-batches have a part in what is learned."""
    config = replace(PHASED, eval_every=0, save_every=0, log_every=40)
    data = stream()
    blind = train(tiny(dropout=0.2), [Phase(data, 0.6), Phase(data, 1.0, "answers")], config, progress=False)
    assert same(blind.model, uninterrupted.model)


def test_second_phase_counts_only_answers():
    data = stream(2000)
    batches = t.Batches([Phase(data, 1.0, "answers"), Phase(data, 0.5)], TrainConfig(batch_size=4), 32)
    assert (batches.next(0.2)[1] >= 0).all()
    ids, targets = batches.next(0.7)
    place = next(i for i in range(len(data.ids)) if np.array_equal(data.ids[i:i + 32], ids[0]))
    want = np.where(data.mask[place + 1:place + 33] > 0, data.ids[place + 1:place + 33].astype(int), -100)
    assert np.array_equal(targets[0], want)


def test_shuffled_order_reads_each_window_once():
    data = TokenArray(np.arange(33))
    batches = t.Batches([Phase(data)], TrainConfig(batch_size=1, order="shuffled"), 4)
    first = [int(batches.next(0)[0][0, 0]) for _ in range(8)]
    assert sorted(first) == list(range(0, 32, 4))


def test_time_limit_ends_the_run_and_the_schedule():
    config = TrainConfig(max_steps=None, max_seconds=2.0, warmup_steps=2, batch_size=2, log_every=1)
    result = train(tiny(), stream(), config, progress=False)
    assert result.history[-1]["seconds"] >= 2.0
    assert result.history[-2]["seconds"] <= 2.0              # the log rounds to milliseconds
    begun = result.history[-2]["seconds"] / 2.0              # the schedule goes by the time at which a step begins
    assert result.history[-1]["lr"] == pytest.approx(t.learning_rate(config, result.step - 1, begun), abs=0.05 * config.lr)


# ------------------------------------------------------------------ checkpoints that survive

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


def test_the_best_checkpoint_is_the_best_that_was_saved(tmp_path):
    """Evaluated twice as often as saved; and going on from a checkpoint that was written before its evaluation."""
    config = TrainConfig(max_steps=60, lr=1e-2, warmup_steps=5, eval_every=5, save_every=10, device="cpu")
    train(tiny(), stream(), config, held=stream(400, 1), out=tmp_path, progress=False)
    rows = {int(r["step"]): r["held"] for r in tracking.read_log(tmp_path / "log.csv") if "held" in r and r["step"] % 10 == 0}
    step, loss = Checkpoints(tmp_path).best()
    assert (step, loss) == (min(rows, key=rows.get), pytest.approx(min(rows.values())))
    assert json.loads((Checkpoints(tmp_path).path(step) / "config.json").read_text())

    saved = Checkpoints(tmp_path)
    saved.mark_best(50, -1.0)                                    # nothing can be better: it must survive going on
    train(tiny(), stream(), replace(config, max_steps=80), held=stream(400, 1), out=tmp_path, resume="force", progress=False)
    assert saved.best() == (50, -1.0) and saved.is_whole(50)


@pytest.mark.parametrize("removed", ["newest", "all"])
def test_best_is_not_the_note_of_a_part_that_was_given_up(tmp_path, removed):
    """Step 20 was the best; it, or all, is deleted and the run goes on, or begins again, with a rate that does harm."""
    config = TrainConfig(max_steps=20, lr=1e-2, warmup_steps=5, eval_every=10, save_every=10, keep_last=9, device="cpu")
    train(tiny(), stream(), config, held=stream(400, 1), out=tmp_path, progress=False)
    saved = Checkpoints(tmp_path)
    assert saved.best()[0] == 20
    for step in saved.steps() if removed == "all" else [20]:
        shutil.rmtree(saved.path(step))
    train(tiny(), stream(), replace(config, max_steps=40, lr=1e-4), held=stream(400, 1), out=tmp_path,
          resume="force" if removed == "newest" else False, progress=False)
    held = {int(r["step"]): r["held"] for r in tracking.read_log(tmp_path / "log.csv") if "held" in r}
    assert saved.steps() == [10, 20, 30, 40]
    step, loss = saved.best()
    assert loss == pytest.approx(held[step])


def test_best_is_not_a_broken_one_that_was_given_up(tmp_path):
    """Step 20, the best, is damaged; the run goes on from 10, saves at other steps, and keeps the best of those."""
    config = TrainConfig(max_steps=20, lr=1e-2, warmup_steps=5, eval_every=10, save_every=10, keep_last=1, device="cpu")
    train(tiny(), stream(), replace(config, keep_last=2), held=stream(400, 1), out=tmp_path, progress=False)
    saved = Checkpoints(tmp_path)
    assert saved.steps() == [10, 20] and saved.best()[0] == 20
    weights = saved.path(20) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="is broken"):
        train(tiny(), stream(), replace(config, max_steps=45, lr=1e-4, save_every=7, eval_every=7), held=stream(400, 1),
              out=tmp_path, resume="force", progress=False)
    held = {int(r["step"]): r["held"] for r in tracking.read_log(tmp_path / "log.csv") if "held" in r and r["step"] > 10}
    assert saved.best() == (min(held, key=held.get), pytest.approx(min(held.values())))
    assert all(saved.is_whole(step) for step in saved.steps()) and max(saved.steps()) == 45


def test_best_is_not_a_checkpoint_that_could_not_be_written(tmp_path, monkeypatch):
    config = TrainConfig(max_steps=20, eval_every=10, save_every=10, device="cpu")
    save, failed = Checkpoints.save, []

    def full(self, step, *args):
        if step == 10:
            failed.append(step)
            raise OSError("no space left")
        return save(self, step, *args)
    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.warns(UserWarning, match="could not be written"):
        train(tiny(), stream(), config, held=stream(400, 1), out=tmp_path, progress=False)
    assert failed == [10] and Checkpoints(tmp_path).best()[0] == 20


def test_interrupted_between_two_renames_the_older_folder_stays(tmp_path, monkeypatch):
    folder = tmp_path / "step"
    t.write_folder(folder, {"a": lambda path: path.write_text("old")})
    rename, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:                # the older one is out of the way, the new one not yet in its place
            raise KeyboardInterrupt
        rename(source, target)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        t.write_folder(folder, {"a": lambda path: path.write_text("new")})
    assert (folder / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["step"]


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The first process trains until it is told to end; a second one with the same folder is refused, nothing mixes."""
    code = """
import sys
sys.path.insert(0, sys.argv[2])
import test_training as here
from minigpt.training import TrainConfig, train

def wait(row, model):
    if row["step"] == 1 and sys.argv[3] == "first":
        print("began", flush=True)
        sys.stdin.readline()

try:
    train(here.tiny(), here.stream(), TrainConfig(max_steps=3, batch_size=2, log_every=1), out=sys.argv[1],
          callbacks=[wait], progress=False)
    print("finished")
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
"""
    first = run_script(code, tmp_path / "run", Path(__file__).parent, "first")
    assert first.stdout.readline() == "began\n"
    second = run_script(code, tmp_path / "run", Path(__file__).parent, "second").communicate(timeout=300)
    assert second[0].startswith(f"BlockingIOError {tmp_path / 'run'} is being written by another process"), second
    assert first.communicate("\n", timeout=300)[0] == "finished\n"
    assert [row["step"] for row in tracking.read_log(tmp_path / "run" / "log.csv")] == [1, 2, 3]
    third = run_script(code, tmp_path / "run", Path(__file__).parent, "third").communicate(timeout=300)
    assert "holds checkpoints of an earlier run" in third[0] and list((tmp_path / "run").glob(".*")) == []


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
def test_full_disk_loses_nothing(tmp_path):
    """Writes really fail: from step 20 on, no file of the process may grow over 10 kB."""
    code = """
import resource, sys, warnings
sys.path.insert(0, sys.argv[2])
import test_training as here
from minigpt.training import Checkpoints, TrainConfig, train
config = TrainConfig(max_steps=int(sys.argv[3]), batch_size=2, log_every=10, save_every=10, keep_last=1)

def fill(row, model):
    if row["step"] == 10:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    if row["step"] == 20 and sys.argv[4] == "freed":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        result = train(here.tiny(), here.stream(), config, out=sys.argv[1], callbacks=[fill], progress=False)
        print("finished", result.step)
    except OSError as error:
        print("OSError", error)
print([str(c.message) for c in caught])
"""
    jobs = [run_script(code, tmp_path / kind, Path(__file__).parent, 30, kind) for kind in ("freed", "full")]
    freed, full = (job.communicate(timeout=300) for job in jobs)
    assert "finished 30" in freed[0], freed
    assert "step 20 could not be written" in freed[0] and "that of step 10 is kept" in freed[0]
    assert Checkpoints(tmp_path / "freed").newest() == 30
    assert "OSError the checkpoint of step 30 could not be written" in full[0], full
    assert Checkpoints(tmp_path / "full").newest() == 10 and list((tmp_path / "full").glob(".step*")) == []


def test_failing_evaluation_and_callback_do_not_end_the_run(tmp_path):
    held = stream(400)
    object.__setattr__(held, "mask", np.zeros((3, 3)))                  # breaks inside the evaluation, not before

    def broken(row, model):
        raise RuntimeError("no luck")

    with pytest.warns(UserWarning) as caught:
        result = train(tiny(), stream(), TrainConfig(max_steps=10, batch_size=2, eval_every=5, save_every=5), held=held,
                       out=tmp_path, callbacks=[broken], progress=False)
    texts = [str(w.message) for w in caught]
    assert result.step == 10 and Checkpoints(tmp_path).newest() == 10
    assert any("the evaluation at step 5 failed" in text for text in texts)
    assert any("no luck" in text for text in texts)


def test_dropout_is_on_again_after_a_failed_evaluation_or_sample():
    model = tiny(dropout=0.5)
    samples = tracking.Samples(Tokenizer.from_pretrained(), [""], every=1)
    for fails in (lambda: t.held_out_loss(model.train(), Phase(stream(400, 1)).data, rows=0), lambda: samples({"step": 1}, model.train())):
        with pytest.raises(ValueError):
            fails()
        assert model.training


def test_a_callback_that_fails_at_the_end_loses_nothing(tmp_path):
    class Ends:
        def __call__(self, row, model):
            pass

        def finish(self):
            raise OSError("no space left")
    with pytest.warns(UserWarning, match="finish failed"):
        result = train(tiny(), stream(), TrainConfig(max_steps=2, device="cpu"), out=tmp_path, progress=False,
                       callbacks=(c for c in [Ends()]))
    assert result.step == 2 and Checkpoints(tmp_path).newest() == 2


@pytest.mark.parametrize("damage", ["20,4.1e\n", "20,1,2,3,4,5,6,7,8,9,10,11\n", ",4\n", "\0\0x,\0\n", "\xff\xfe"])
def test_a_damaged_line_of_the_log_does_not_stop_a_run(tmp_path, damage):
    config = TrainConfig(max_steps=20, log_every=5, save_every=10, device="cpu")
    train(tiny(), stream(), config, out=tmp_path, progress=False)
    shutil.rmtree(Checkpoints(tmp_path).path(20))
    with open(tmp_path / "log.csv", "a", encoding="latin-1") as file:
        file.write(damage)
    with pytest.warns(UserWarning, match="damaged"):
        train(tiny(), stream(), config, out=tmp_path, resume=True, progress=False)
    assert [row["step"] for row in tracking.read_log(tmp_path / "log.csv")] == [5, 10, 15, 20]


def test_a_log_that_an_editor_has_saved_with_a_mark_is_read_whole(tmp_path):
    config = TrainConfig(max_steps=10, log_every=5, save_every=10, device="cpu")
    train(tiny(), stream(), config, out=tmp_path, progress=False)
    text = (tmp_path / "log.csv").read_text(encoding="utf-8")
    (tmp_path / "log.csv").write_text(text, encoding="utf-8-sig")
    train(tiny(), stream(), replace(config, max_steps=20), out=tmp_path, resume="force", progress=False)
    assert [row["step"] for row in tracking.read_log(tmp_path / "log.csv")] == [5, 10, 15, 20]


def test_nan_keeps_the_last_good_checkpoint(tmp_path):
    config = TrainConfig(max_steps=40, batch_size=2, log_every=5, save_every=5)

    def poison(row, model):
        if row["step"] == 10:
            with torch.no_grad():
                model.ln_f.weight[0] = float("nan")

    with pytest.raises(FloatingPointError, match=r"step 11: the loss is nan.*step-00000010.*lr=0\.00033"):
        train(tiny(), stream(), config, out=tmp_path, callbacks=[poison], progress=False)
    weights, _, state = Checkpoints(tmp_path).load(10)
    assert state["step"] == 10 and all(torch.isfinite(w).all() for w in weights.values())


# ------------------------------------------------------------------ bad input

def test_tokens_of_another_tokenizer(tmp_path):
    small = Tokenizer.train(load_text(limit=30), 300, ["<|endoftext|>"], progress=False)
    other = Tokenizer.train(load_text(limit=60)[30:], 300, ["<|endoftext|>"], progress=False)
    data = pack(load_text(limit=30), tmp_path / "a.tokens", small, progress=False)
    config = TrainConfig(max_steps=1, batch_size=1)
    with pytest.raises(ValueError, match="another tokenizer.*vocab_size is 100"):
        train(GPT2(replace(SHAPE, vocab_size=100)), data, config, progress=False)
    with pytest.raises(ValueError, match="tokenizer"):
        train(tiny(), data, config, tokenizer=other, progress=False)
    assert train(tiny(), data, config, tokenizer=small, progress=False).step == 1


def test_resume_with_other_settings_lists_them(tmp_path):
    config = TrainConfig(max_steps=4, batch_size=2, save_every=2)
    train(tiny(), stream(), config, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="earlier run"):
        train(tiny(), stream(), config, out=tmp_path, progress=False)
    changed = replace(config, max_steps=8, lr=3e-4, log_every=1)
    with pytest.raises(ValueError) as caught:
        train(tiny(dropout=0.1), stream(4000), changed, out=tmp_path, resume=True, progress=False)
    text = str(caught.value)
    for line in ("lr: 0.001 then, 0.0003 now", "max_steps: 4 then, 8 now", "model.dropout: 0.0 then, 0.1 now",
                 "phase 1 tokens: 5000 then, 4000 now"):
        assert line in text
    assert "log_every" not in text
    assert train(tiny(), stream(), changed, out=tmp_path, resume="force", progress=False).step == 8


@pytest.mark.parametrize("data, changes, words", [
    ([1, 2, 3], {}, "3 tokens are too few"), (np.zeros((4, 4)), {}, "one row of ids"),
    (stream(), {"block_size": 64}, "at most 32"),
    (np.full(400, 300), {}, "vocab_size is 300")])
def test_data_that_cannot_work(data, changes, words):
    with pytest.raises(ValueError, match=words):
        train(tiny(), data, TrainConfig(max_steps=1, device="cpu", **changes), progress=False)


def test_batch_that_cannot_fit():
    with pytest.raises(MemoryError, match=r"micro_batch=\d+ .*plan"):
        train(tiny(), stream(), TrainConfig(max_steps=1, batch_size=10**8, device="cpu"), progress=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs an address-space limit")
def test_running_out_of_memory_says_what_to_do():
    code = """
import resource, sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
import test_training as here
from minigpt.training import Stepper, TrainConfig
step = Stepper(here.tiny(), TrainConfig(micro_batch=4000))
ids = np.zeros((4000, 32), np.int64)
size = int(open("/proc/self/statm").read().split()[0]) * 4096 + 300_000_000
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    step(ids, ids, 1e-3)
except MemoryError as error:
    print(error)
"""
    out, err = run_script(code, Path(__file__).parent).communicate(timeout=300)
    assert "4000 windows at a time do not fit" in out and "micro_batch=2000" in out, err


# ------------------------------------------------------------------ several processes

RANKS = """
import json, sys
sys.path.insert(0, sys.argv[2])
import test_training as here
from minigpt.training import Phase, run_recipe, train
from dataclasses import replace
data = here.stream()
phases = lambda: [Phase(data, 0.6), Phase(data, 1.0, "answers")]
found = {}
for kind in ("ddp", "fsdp"):
    config = replace(here.SEVERAL, parallel=kind)
    result = train(here.tiny(), phases(), config, held=here.stream(400, 1), out=f"{sys.argv[1]}/{kind}", progress=False)
    found[kind] = [(r["loss"], r.get("held")) for r in result.history]
    assert any(hasattr(p, "full_tensor") for p in result.model.parameters()) == (kind == "fsdp")
# a recipe: rank 0 trains the tokenizer, packs and saves the whole model
result = run_recipe(here.small_recipe(), out=f"{sys.argv[1]}/recipe", changes=here.SMALL | {"parallel": "fsdp"}, progress=False)
found["recipe"] = [(r["loss"], r.get("held")) for r in result.history]
# and go on with what one process began
result = train(here.tiny(), phases(), replace(here.SEVERAL, parallel="fsdp"), held=here.stream(400, 1),
               out=f"{sys.argv[1]}/one", resume=True, progress=False)
found["one, then fsdp"] = [(r["loss"], r.get("held")) for r in result.history]
import torch.distributed as dist
if dist.get_rank() == 0:
    with open(f"{sys.argv[1]}/found.json", "w") as file:
        json.dump(found, file)
"""
SEVERAL = TrainConfig(max_steps=12, batch_size=8, micro_batch=2, lr=3e-3, warmup_steps=4, log_every=1, eval_every=6,
                      save_every=6, eval_windows=8, device="cpu", keep_last=3)


SMALL = {"max_steps": 6, "batch_size": 8, "save_every": 3, "eval_every": 3, "eval_windows": 2, "log_every": 1, "warmup_steps": 2}


def small_recipe() -> dict:
    """nano-stories with a model that takes no time."""
    recipe = t.load_recipe("nano-stories")
    recipe["model"] |= {"n_layer": 1, "n_embd": 32, "block_size": 64, "n_head": 2}
    return recipe | {"tokenizer": {"train": 400}}


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch runs no FSDP2 on a CPU (2.6 does not)")
def test_two_processes_are_one(tmp_path, ledger):
    """DDP and FSDP2 over gloo against one process; checkpoints move between one and two."""
    data, held = stream(), stream(400, 1)
    phases = [Phase(data, 0.6), Phase(data, 1.0, "answers")]
    one = train(tiny(), phases, SEVERAL, held=held, out=tmp_path / "one", progress=False)
    shutil.rmtree(Checkpoints(tmp_path / "one").path(12))
    script = tmp_path / "script.py"
    script.write_text(RANKS, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(script), str(tmp_path), str(Path(__file__).parent)], env=env, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    alone = t.run_recipe(small_recipe(), out=tmp_path / "alone", changes=SMALL, progress=False)
    for kind, rows in found.items():
        want = [(r["loss"], r.get("held")) for r in (alone if kind == "recipe" else one).history]
        assert len(rows) == len(want)
        apart = max(abs(a - b) for pair, other in zip(rows, want) for a, b in zip(pair, other) if b is not None)
        ledger(f"losses of two processes = one ({kind})", apart, peer="torch", bound=1e-5)
        assert apart < 1e-5, kind
    tensors = [GPT2.from_pretrained(tmp_path / name / "model").wte.weight for name in ("recipe", "alone")]
    assert torch.allclose(*tensors, atol=1e-4)
    for kind in ("ddp", "fsdp"):                                       # what two began, one goes on with
        shutil.rmtree(Checkpoints(tmp_path / kind).path(12))
        back = train(tiny(), phases, SEVERAL, held=held, out=tmp_path / kind, resume=True, progress=False)
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(back.history, one.history)) < 1e-5


def test_batch_must_divide_by_the_processes():
    with pytest.raises(ValueError, match="batch_size=9 is no multiple of the 2"):
        t.Batches([Phase(stream())], TrainConfig(batch_size=9), 32, Ranks(0, 2))


def test_stream_is_split_by_rank_and_resumes():
    datasets = pytest.importorskip("datasets")
    tokenizer = Tokenizer.from_pretrained()
    rows = datasets.Dataset.from_dict({"text": [f"number {i} is here" for i in range(64)]}).to_iterable_dataset(4)

    def read(sampler, batches):
        return [sampler.next_batch() for _ in range(batches)]

    texts = []
    for rank in (0, 1):
        sampler = StreamSampler(rows, tokenizer, 8, 2, ranks=Ranks(rank, 2))
        ids = [i for b in read(sampler, 6) for i in b.x.flatten()]
        texts.append({word for word in tokenizer.decode(ids).split() if word.isdigit()})
        assert all(np.array_equal(b.ids[:, 1:], b.y) for b in read(sampler, 1))
    assert len(texts[0]) > 8 and not texts[0] & texts[1]
    sampler = StreamSampler(rows, tokenizer, 8, 2, ranks=Ranks(1, 2))
    read(sampler, 3)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = [b.ids for b in read(sampler, 20)]                       # over the end of the stream
    again = StreamSampler(rows, tokenizer, 8, 2, ranks=Ranks(1, 2))
    again.load_state_dict(state)
    assert all(np.array_equal(a, b.ids) for a, b in zip(expected, read(again, 20), strict=True))
    alone = StreamSampler(rows, tokenizer, 8, 2)                        # another number of processes
    alone.load_state_dict(state)
    first = tokenizer.decode(alone.next_batch().x[0])
    assert f"number {2 * state['read']} is" in first


def test_stream_trains_and_resumes(tmp_path):
    datasets = pytest.importorskip("datasets")
    tokenizer = Tokenizer.train(load_text(limit=40), 300, ["<|endoftext|>"], progress=False)
    rows = datasets.Dataset.from_dict({"text": load_text(limit=40)}).to_iterable_dataset()
    config = TrainConfig(max_steps=8, batch_size=2, save_every=4, log_every=1)
    results = []
    for cut in (False, True):
        out = tmp_path / str(cut)
        for _ in range(1 + cut):
            data = Phase(StreamSampler(rows, tokenizer, 32, 2))
            result = train(tiny(), data, config, out=out, resume=True, progress=False)
            if cut:
                shutil.rmtree(Checkpoints(out).path(8))
        results.append(result)
    assert same(results[0].model, results[1].model)


# ------------------------------------------------------------------ plan

def test_plan_adds_up():
    made = plan("gpt2", "24gb", tokens=3.6e9, price=2.0, block_size=512)
    config = GPT2Config.preset("gpt2")
    need = [config.memory(n, 512, "bfloat16", training=True, device="cuda").peak for n in (made.largest, made.largest + 1)]
    assert need[0] <= 0.9 * made.available < need[1]
    assert made.parameters == 124_439_808 and made.fits and not made.measured
    assert made.hours == pytest.approx(3.6e9 / made.tokens_per_second / 3600)
    assert made.cost == pytest.approx(2 * made.hours)
    assert f"{made.largest} windows" in str(made)
    twice = plan("gpt2", "24gb", batch=2 * made.largest, block_size=512)
    assert not twice.fits and f"micro_batch={made.largest}" in str(twice)


@pytest.mark.parametrize("machine", t.MACHINES)
def test_plan_for_every_machine(machine):
    made = plan("nano", machine, batch=1, block_size=32)
    assert made.fits and made.measured == (machine == "cpu")
    assert made.dtype == {"cpu": "float32", "t4": "float16"}.get(machine, "bfloat16")


def test_plan_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="cpu, t4, 8gb, 24gb, h100"):
        plan("mini", "tpu")
    with pytest.raises(ValueError, match="not this one"):
        plan("mini", "h100", measure=True)
    assert plan("gpt2-xl", "8gb").largest == 0


# ------------------------------------------------------------------ seeing

def test_live_plot_writes_a_picture(tmp_path):
    plot = tracking.LivePlot(tmp_path / "loss.png", every=0, reference="nano-stories")
    train(tiny(), stream(), TrainConfig(max_steps=20, batch_size=2, log_every=10, eval_every=10), held=stream(400, 1),
          callbacks=[plot], progress=False)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    axes = tracking.loss_figure(plot.rows, plot.band).axes
    assert list(axes[0].lines[0].get_xdata()) == [10, 20]
    assert np.allclose(axes[1].lines[0].get_ydata(), [math.exp(row["held"]) for row in plot.rows])


def test_progress_line_has_what_it_promises(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    train(tiny(), stream(), TrainConfig(max_steps=10, batch_size=2, log_every=5))
    line = capsys.readouterr().err.split("\r")[-1]
    for part in ("10/10", "loss ", "tokens/s", "MFU", "<"):
        assert part in line


def test_tensorboard_gets_the_numbers(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = tracking.TensorBoardLog(tmp_path)
    result = train(tiny(), stream(), TrainConfig(max_steps=10, batch_size=2, log_every=5), callbacks=[board], progress=False)
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([row["loss"] for row in result.history])


def test_reference_curve_judges():
    band = tracking.reference_curve("nano-stories")
    assert len(band["step"]) == len(band["low"]) == len(band["high"]) > 10
    assert all(low <= high for low, high in zip(band["low"], band["high"]))
    row = {"step": band["step"][5], "loss": (band["low"][5] + band["high"][5]) / 2}
    assert tracking.against_reference([row], "nano-stories").endswith("normal")
    assert "higher" in tracking.against_reference([row | {"loss": 2 * row["loss"]}], "nano-stories")
    assert "lower" in tracking.against_reference([row | {"loss": 0.1}], "nano-stories")


# ------------------------------------------------------------------ recipes

@pytest.mark.parametrize("name", ["nano-stories", "mini-chat", "gpt2-small-wikipedia"])
def test_recipes_load_and_ship(name):
    recipe = t.load_recipe(name)
    options = recipe["train"] | {"betas": tuple(recipe["train"].get("betas", (0.9, 0.95)))}
    config = TrainConfig(**options)
    GPT2Config.preset(**{"name" if k == "preset" else k: v for k, v in recipe["model"].items()})
    assert recipe["name"] == name and config.max_steps


def test_mini_chat_is_the_recipe_of_the_shipped_model():
    """The figures of the shipped model's card: phases, batch, schedule, optimizer, dropout."""
    recipe = t.load_recipe("mini-chat")
    first, second = recipe["phase"]
    assert first["chats"] == second["chats"] == ["train.jsonl.xz", "extra.jsonl.xz"]
    assert (first["until"], first["loss"], second["loss"]) == (0.7, "all", "answers")
    assert first["plain"] == ["story", "paragraph"] and "plain" not in second and recipe["held"] == {"chats": "held.jsonl"}
    config = TrainConfig(**recipe["train"] | {"betas": tuple(recipe["train"]["betas"])})
    assert t.learning_rate(config, 0, 0.0) == pytest.approx(5e-6) and t.learning_rate(config, 183, 0.02) == pytest.approx(9.2e-4)
    assert t.learning_rate(config, 2700, 0.34) == 1.5e-3 and t.learning_rate(config, 8000, 1.0) == pytest.approx(1.5e-5)
    assert (config.batch_size, config.clip, config.betas, config.weight_decay) == (64, 1.0, (0.9, 0.95), 0.1)
    shape = GPT2Config.preset(recipe["model"].pop("preset"), **recipe["model"])
    assert shape.dropout == 0.1 and sum(shape.parts().values()) == 35_984_384


def test_recipe_runs_resumes_and_answers(tmp_path):
    recipe = small_recipe()
    assert recipe["expect"]["held_perplexity"] > 1
    first = t.run_recipe(recipe, out=tmp_path / "run", changes=SMALL, progress=False)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.vocab_size == 400 and first.history[-1]["held"] < math.log(400)
    loaded = GPT2.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([tokenizer.encode("The history of")])
    assert torch.allclose(loaded(ids), first.model(ids), atol=1e-5)
    shutil.rmtree(Checkpoints(tmp_path / "run").path(6))
    again = t.run_recipe(recipe, out=tmp_path / "run", changes=SMALL, resume=True, progress=False)
    assert same(first.model, again.model)


def test_recipe_with_chats_in_two_phases(tmp_path):
    """mini-chat's two phases, on the bundled conversations and a small model."""
    recipe = t.load_recipe("mini-chat")
    for phase in recipe["phase"]:
        phase["chats"] = "chats"
    recipe["held"] = {"chats": "held"}
    recipe["model"] |= {"n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 64}
    recipe.pop("samples")
    changes = {"max_steps": 4, "batch_size": 2, "compile": False, "eval_windows": 4, "log_every": 1, "warmup_steps": 2}
    result = t.run_recipe(recipe, out=tmp_path / "run", changes=changes, progress=False)
    assert result.step == 4 and {"held", "held_answers"} <= result.history[-1].keys()
    sizes = sorted(len(TokenFile(p)) for p in (tmp_path / "run" / "data").glob("train-*.tokens"))
    assert len(sizes) == 2 and sizes[0] < sizes[1]                     # the first phase has the plain stories too


def test_recipe_with_packed_tokens(tmp_path):
    """What `minigpt data pack` writes, in place of texts: the same windows, so the same losses."""
    tokenizer = Tokenizer.train(load_text(limit=60), 300, ["<|endoftext|>"], progress=False)
    tokenizer.save_pretrained(tmp_path / "words")
    for name, rows in (("a", load_text(limit=60)), ("b", load_text(limit=70)[60:])):
        pack(rows, tmp_path / f"{name}.tokens", tokenizer, progress=False)
    recipe = {"model": {"preset": "nano", "n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 32},
              "tokenizer": {"name": str(tmp_path / "words")}, "phase": [{"tokens": "a.tokens"}], "held": {"tokens": "b.tokens"},
              "tensorboard": True, "train": {"max_steps": 3, "batch_size": 2, "log_every": 1, "eval_windows": 4}}
    run = t.run_recipe(recipe, out=tmp_path / "run", folder=tmp_path, progress=False)
    torch.manual_seed(0)
    plain = train(GPT2(run.model.config), TokenFile(tmp_path / "a.tokens"), TrainConfig(**recipe["train"]),
                  held=TokenFile(tmp_path / "b.tokens"), progress=False)
    assert [r["loss"] for r in run.history] == [r["loss"] for r in plain.history]
    assert run.history[-1]["held"] == plain.history[-1]["held"]
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    for change, words in (({"held": {"share": 0.1}}, "can't be split"), ({"tokenizer": {"name": "gpt2"}}, "packed with the tokenizer"),
                          ({"tokenizer": {"train": 300}}, "no text to train a tokenizer"),
                          ({"phase": [{"tokens": "c.tokens"}]}, "c.tokens")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            t.run_recipe(recipe | change, out=tmp_path / "other", folder=tmp_path, progress=False)


def test_command_line_from_text_to_model(tmp_path, monkeypatch):
    """tokenizer train, data pack, train; then a resume that is refused, and one that is forced."""
    from typer.testing import CliRunner
    from minigpt.engine.cli import app
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("\n\n".join(load_text(limit=60)), encoding="utf-8")

    def call(*words: str):
        result = CliRunner().invoke(app, list(words))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    call("tokenizer", "train", "book.txt", "words", "--vocab-size", "300")
    call("data", "pack", "book.txt", "a.tokens", "--tokenizer", "words")
    line = ["train", "--tokens", "a.tokens", "--held", "a.tokens", "--tokenizer", "words", "--out", "run", "--tensorboard"]
    small = [x for s in ("block_size=32", "batch_size=2", "eval_windows=2", "max_steps=4") for x in ("--set", s)]
    assert "step 4" in call(*line, *small) and list(Path("run/tensorboard").glob("events.*"))
    assert GPT2.from_pretrained("run/model").config.vocab_size == 300
    assert Tokenizer.from_pretrained("run/model").vocab_size == 300
    with pytest.raises(ValueError, match="max_steps: 4 then, 6 now"):
        call(*line, *small, "--set", "max_steps=6", "--resume")
    assert "step 6" in call(*line, *small, "--set", "max_steps=6", "--force")
    for more in (["--text", "book.txt"], ["nano-stories"]):
        with pytest.raises(ValueError, match="leave"):
            call(*line, *more)


@pytest.mark.parametrize("text, words", [
    ('[phase]\ntext = "stories"', "with two brackets"), ('tokenizer = 3\n[[phase]]\ntext = "a"', "tokenizer must be a section"),
    ('[[phase]]\nuntil = 1.0', "needs text, chats or tokens"), ('[[phase]]\ntext = []', "needs text, chats or tokens"),
    ('[[phase]]\nchats = "a"\nstream = true', "stream = true needs text"),
    ('[train]\nlearning = 1\n[[phase]]\ntext = "stories"', "knows no 'learning'"), ('name = "x"', "has no"),
    ("name = ", "no TOML"), ('[[phase]]\ntexts = "a"', "knows no 'texts'"), ('extra = 1', "the recipe knows no 'extra'")])
def test_bad_recipes_are_explained(tmp_path, text, words):
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        t.load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("documents", [1, 2, 40])
def test_a_book_without_marks_can_be_trained_on(tmp_path, documents):
    """One document would go to one side of the split as a whole: then its end is held out."""
    books = [f"Chapter {n}. " + "The fox met the dog. " * 60 for n in range(documents)]
    (tmp_path / "book.txt").write_text("\n<|endoftext|>\n".join(books), encoding="utf-8")
    rest, held = (t.recipe_rows({"text": "book.txt"}, tmp_path, 0.05, side) for side in (0, 1))
    assert 0.01 < len("".join(held)) / len("".join(rest + held)) < 0.6
    assert abs(sum(map(len, rest + held)) - sum(len(book) for book in books)) <= 2 * documents      # nothing lost, nothing twice
    result = t.run_recipe(make_recipe([str(tmp_path / "book.txt")], [], "nano", None, 270), out=tmp_path / "run", progress=False,
                          changes={"max_steps": 1, "batch_size": 1, "block_size": 16, "device": "cpu"})
    assert math.isfinite(result.history[-1]["held"])


def test_what_is_held_out_is_not_in_the_plain_copies(tmp_path):
    chats = [{"kind": "story", "messages": [{"role": "user", "content": f"Story {n}"}, {"role": "assistant", "content": f"It was {n}."}]}
             for n in range(200)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats), encoding="utf-8")
    part = {"chats": "chats.jsonl", "plain": ["story"]}
    sides = [t.recipe_rows(part, tmp_path, 0.1, side) for side in (0, 1)]
    said = [{row if isinstance(row, str) else row["messages"][1]["content"] for row in rows} for rows in sides]
    assert said[0] | said[1] == {f"It was {n}." for n in range(200)} and not said[0] & said[1] and 5 < len(said[1]) < 40
    assert sum(isinstance(row, str) for row in sides[0]) == len(said[0])


def test_changed_data_and_a_changed_tokenizer_are_not_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("The fox met the dog. " * 100, encoding="utf-8")
    recipe = make_recipe([str(tmp_path / "a.txt")], [], "nano", None, 270)
    changes = {"max_steps": 1, "batch_size": 1, "block_size": 16, "device": "cpu"}

    def tokens():
        shutil.rmtree(tmp_path / "run" / "model", ignore_errors=True)
        for old in (tmp_path / "run").glob("step-*"):
            shutil.rmtree(old)
        (tmp_path / "run" / "log.csv").unlink(missing_ok=True)
        result = t.run_recipe(recipe, out=tmp_path / "run", changes=changes, progress=False)
        newest = max((tmp_path / "run" / "data").glob("train-*.tokens"), key=lambda p: p.stat().st_mtime_ns)
        return len(TokenFile(newest, Tokenizer.from_pretrained(tmp_path / "run" / "tokenizer"))), result.model.config.vocab_size
    first = tokens()
    assert tokens() == first
    (tmp_path / "a.txt").write_text("The fox met the dog. " * 200, encoding="utf-8")
    assert tokens()[0] > 1.5 * first[0]
    recipe["tokenizer"]["train"] = 265
    assert tokens()[1] < first[1]


def test_a_run_that_has_begun_keeps_its_tokenizer_and_tokens(tmp_path):
    """Its text changes, and then is gone: a second run is refused and damages nothing, and resuming goes on."""
    book = tmp_path / "book.txt"
    book.write_text("The fox met the dog. " * 100, encoding="utf-8")
    recipe = make_recipe([str(book)], [], "nano", None, 270)
    changes = {"max_steps": 2, "batch_size": 1, "block_size": 16, "device": "cpu"}
    t.run_recipe(recipe, out=tmp_path / "run", changes=changes, progress=False)

    def made():
        return {file: file.read_bytes() for part in ("tokenizer", "data") for file in (tmp_path / "run" / part).iterdir()}
    before = made()
    book.write_text("A bird sang to the hen. " * 300, encoding="utf-8")
    with pytest.warns(UserWarning, match="is kept, as this run began with it"), \
            pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        t.run_recipe(recipe, out=tmp_path / "run", changes=changes, progress=False)
    assert made() == before
    book.unlink()
    with pytest.warns(UserWarning, match="has changed or is gone"):
        result = t.run_recipe(recipe, out=tmp_path / "run", changes=changes, resume=True, progress=False)
    assert result.step == 2 and made() == before


def test_a_folder_of_texts_is_packed_anew_when_a_file_in_it_changes(tmp_path):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    book = tmp_path / "texts" / "more" / "a.txt"
    tokenizer = Tokenizer.from_pretrained()
    recipe = {"phase": [{"text": "texts"}]}

    def count():
        phases, _ = t.recipe_phases(recipe, SHAPE, TrainConfig(), tokenizer, tmp_path / "run", tmp_path)
        return len(phases[0].data)
    book.write_text("The fox met the dog. " * 10, encoding="utf-8")
    first = count()
    (tmp_path / "texts" / ".DS_Store").write_bytes(b"\0")     # nobody reads this one
    before = [file.stat().st_mtime_ns for file in (tmp_path / "run" / "data").iterdir()]
    assert count() == first and before == [file.stat().st_mtime_ns for file in (tmp_path / "run" / "data").iterdir()]
    book.write_text("The fox met the dog. " * 40, encoding="utf-8")
    assert count() > 3 * first


def test_a_stream_cannot_be_split_and_names_its_columns():
    recipe = {"phase": [{"text": "wikitext", "stream": True}], "held": {"share": 0.05}}
    with pytest.raises(ValueError, match="a stream can't be split"):
        t.recipe_phases(recipe, SHAPE, TrainConfig(), Tokenizer.from_pretrained(), Path("nowhere"))
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"body": "a"}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="no column 'text', but body"):
        StreamSampler(rows, Tokenizer.from_pretrained(), 8, 1).next_batch()


def test_unknown_recipe_lists_those_there_are():
    with pytest.raises(FileNotFoundError, match="gpt2-small-wikipedia, mini-chat, nano-stories"):
        t.load_recipe("maxi")


# ------------------------------------------------------------------ precision

def test_bfloat16_trains_like_float32():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        result = train(tiny(), stream(), TrainConfig(max_steps=30, lr=1e-2, warmup_steps=5, dtype=dtype, device="cpu"),
                       progress=False)
        assert result.model.wte.weight.dtype == torch.float32
        losses[dtype] = result.history[-1]["loss"]
    assert losses["float32"] < 4.5 and abs(losses["float32"] - losses["bfloat16"]) < 0.05


def test_float16_with_its_scaler_trains_like_float32_and_resumes_exactly(tmp_path):
    config = TrainConfig(max_steps=30, lr=1e-2, warmup_steps=5, dtype="float16", device="cpu", save_every=10)
    whole = train(tiny(), stream(), config, out=tmp_path, progress=False)
    float32 = train(tiny(), stream(), replace(config, dtype="float32"), progress=False)
    assert abs(whole.history[-1]["loss"] - float32.history[-1]["loss"]) < 0.05 and whole.history[-1]["loss"] < 4.5
    assert whole.model.wte.weight.dtype == torch.float32

    shutil.rmtree(Checkpoints(tmp_path).path(30))                # as if it had ended after step 20
    assert same(train(tiny(), stream(), config, out=tmp_path, resume=True, progress=False).model, whole.model)


def test_scaler_skips_infinite_gradients_and_then_finds_its_factor():
    """Against the rule of torch's GradScaler: halve and leave the weights alone, else step."""
    stepper, batches = t.Stepper(tiny(), TrainConfig(dtype="float16", device="cpu")), WindowSampler(stream(), 32, 8)
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40)
    moved = []
    for _ in range(40):
        window, factor, before = batches.next_batch(), stepper.scaler.get_scale(), stepper.model.wte.weight.clone()
        _, norm = stepper(window.x, window.y, lr=1e-2)
        moved.append(not torch.equal(before, stepper.model.wte.weight))
        assert moved[-1] == bool(torch.isfinite(norm))
        assert stepper.scaler.get_scale() == (factor if moved[-1] else factor / 2)
    assert not any(moved[:10]) and any(moved[-10:])
    assert all(bool(torch.isfinite(p).all()) for p in stepper.model.parameters())


def test_callers_generators_and_signals_are_given_back():
    handler = signal.getsignal(signal.SIGINT)
    train(tiny(), stream(), TrainConfig(max_steps=2, batch_size=1), progress=False)
    assert signal.getsignal(signal.SIGINT) is handler


def test_positions_belong_to_the_sampler():
    """Two ranks together read what one reads, in the same order."""
    data = stream()
    whole = t.Batches([Phase(data)], TrainConfig(batch_size=4), 32).next(0)[0]
    halves = [t.Batches([Phase(data)], TrainConfig(batch_size=4), 32, Ranks(r, 2)).next(0)[0] for r in (0, 1)]
    assert np.array_equal(whole, np.concatenate(halves))
    assert np.array_equal(whole, WindowSampler(data, 32, 4, seed=0).next_batch().x)


# ------------------------------------------------------------------ the exercises

def names() -> dict:
    """What the checks of chapter 04 look at."""
    chat = TokenArray(np.arange(100), mask=np.arange(100) % 2)
    return vars(t) | {"toy": t.Batches([Phase(chat, 0.7), Phase(chat, 1.0, "answers")], TrainConfig(batch_size=1), 6)}


@pytest.mark.parametrize("number, empty, check, solution", exercises("04"), ids=lambda v: v if len(v) == 4 else "")
def test_exercise(number, empty, check, solution, capsys):
    assert said(empty, check, names(), capsys) == "not solved yet"
    assert said(solution, check, names(), capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def linear_schedule(step, total, warmup, peak): return peak * (total - step) / total", "at step 0 it should be 0.1"),
    (2, "def counted_share(targets): return float((targets > 0).mean())", "for [[0, -100]] it is 0.5"),
    (3, "class EarlyStop:\n    def __init__(self, patience): self.should_stop = True\n    def __call__(self, row, model): pass", "too early"),
    (3, "class EarlyStop:\n    def __init__(self, patience): self.should_stop = False\n    def __call__(self, row, model): pass",
     "two failures in a row"),
    (4, "def days(weights, tokens, flops, mfu): return 2 * weights * tokens / (flops * mfu) / 86400", "about 0.21"),
])
def test_a_wrong_solution_is_told_why(number, wrong, words, capsys):
    assert words in said(wrong, exercises("04")[number - 1][2], names(), capsys)
