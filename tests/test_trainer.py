"""The training loop: the step against torch, exact resume with real signals, runs that survive, bad input, precision."""
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minigpt.data import WindowSampler
from minigpt.deeper.packing import pack
from minigpt.engine.dataset_readers import load_text
from minigpt.engine import tracking
from minigpt.data import TokenArray
from minigpt.engine.batches import Batches, Phase
from minigpt.engine.checkpoint import Checkpoints
from minigpt.engine.stepper import Stepper
from minigpt.engine.tokenizer import Tokenizer
from minigpt.engine.train_config import TrainConfig
from minigpt.engine.trainer import Run, check_memory, train
from minigpt.engine.ranks import Ranks
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.engine.batches import held_out_loss
from small_runs import SHAPE, PHASED, gradients, run_script, same, stream, tiny


pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, here and in the processes that the tests start


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
    ours = held_out_loss(model, data, rows=2)
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


def test_compile_that_fails_goes_on_without():
    code = """
import sys, warnings, numpy as np, torch, torch._inductor.config as inductor
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.engine.stepper import Stepper
from minigpt.engine.train_config import TrainConfig
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




RESUME = """
import os, random, signal, sys
import numpy as np, torch
sys.path.insert(0, sys.argv[3])
import small_runs as here
from minigpt.engine.batches import Phase
from minigpt.engine.trainer import train

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
    batches = Batches([Phase(data, 1.0, "answers"), Phase(data, 0.5)], TrainConfig(batch_size=4), 32)
    assert (batches.next(0.2)[1] >= 0).all()
    ids, targets = batches.next(0.7)
    place = next(i for i in range(len(data.ids)) if np.array_equal(data.ids[i:i + 32], ids[0]))
    want = np.where(data.mask[place + 1:place + 33] > 0, data.ids[place + 1:place + 33].astype(int), -100)
    assert np.array_equal(targets[0], want)


def test_shuffled_order_reads_each_window_once():
    data = TokenArray(np.arange(33))
    batches = Batches([Phase(data)], TrainConfig(batch_size=1, order="shuffled"), 4)
    first = [int(batches.next(0)[0][0, 0]) for _ in range(8)]
    assert sorted(first) == list(range(0, 32, 4))


def test_time_limit_ends_the_run_and_the_schedule():
    config = TrainConfig(max_steps=None, max_seconds=2.0, warmup_steps=2, batch_size=2, log_every=1)
    result = train(tiny(), stream(), config, progress=False)
    assert result.history[-1]["seconds"] >= 2.0
    assert result.history[-2]["seconds"] <= 2.0              # the log rounds to milliseconds
    begun = result.history[-2]["seconds"] / 2.0              # the schedule goes by the time at which a step begins
    assert result.history[-1]["lr"] == pytest.approx(config.rate_at(result.step - 1, begun), abs=0.05 * config.lr)


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


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The first process trains until it is told to end; a second one with the same folder is refused, nothing mixes."""
    code = """
import sys
sys.path.insert(0, sys.argv[2])
import small_runs as here
from minigpt.engine.train_config import TrainConfig
from minigpt.engine.trainer import train

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
import small_runs as here
from minigpt.engine.checkpoint import Checkpoints
from minigpt.engine.train_config import TrainConfig
from minigpt.engine.trainer import train
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
    for fails in (lambda: held_out_loss(model.train(), Phase(stream(400, 1)).data, rows=0), lambda: samples({"step": 1}, model.train())):
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
import small_runs as here
from minigpt.engine.stepper import Stepper
from minigpt.engine.train_config import TrainConfig
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


def test_live_plot_writes_a_picture(tmp_path):
    plot = tracking.LivePlot(tmp_path / "loss.png", every=0, lines={"bigram": 3.3})
    train(tiny(), stream(), TrainConfig(max_steps=20, batch_size=2, log_every=10, eval_every=10), held=stream(400, 1),
          callbacks=[plot], progress=False)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    axes = tracking.loss_figure(plot.rows, plot.lines).axes
    assert list(axes[0].lines[-1].get_ydata()) == [3.3, 3.3] and axes[0].lines[-1].get_label() == "bigram"
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
    stepper, batches = Stepper(tiny(), TrainConfig(dtype="float16", device="cpu")), WindowSampler(stream(), 32, 8)
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


# ------------------------------------------------------------------ an optimizer of one's own

def test_a_given_optimizer_keeps_its_groups_rates():
    """Two groups, one at half the config's rate and one at twice: in each step both follow the schedule, at these shares."""
    model, config = tiny(), TrainConfig(max_steps=8, lr=1e-2, warmup_steps=2, log_every=1)
    blocks = list(model.blocks.parameters())
    rest = [p for p in model.parameters() if not any(p is q for q in blocks)]
    own = torch.optim.AdamW([{"params": blocks, "lr": 5e-3}, {"params": rest, "lr": 2e-2}])
    seen = []
    train(model, stream(), config, optimizer=own, progress=False,
          callbacks=[lambda row, _: seen.append((row["lr"], *(group["lr"] for group in own.param_groups)))])
    want = [config.rate_at(step, step / 8) for step in range(8)]
    assert np.allclose(seen, [(lr, 0.5 * lr, 2 * lr) for lr in want])
    train(model, stream(), config, optimizer=own, progress=False, callbacks=[
        lambda row, _: seen.append((row["lr"], *(group["lr"] for group in own.param_groups)))])
    assert seen[8:] == seen[:8]                        # a second run with it does not begin at the end of the first


@pytest.mark.parametrize("make", [
    lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.99)),
    lambda model: torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9)])
def test_a_given_optimizer_is_the_one_that_steps(make, tmp_path):
    """Against a loop of one's own; and stopped after half of it and resumed, bit for bit."""
    lr = make(tiny()).param_groups[0]["lr"]
    config = TrainConfig(max_steps=6, lr=lr, warmup_steps=0, schedule="constant", weight_decay=0.0, clip=1e9, batch_size=2,
                         save_every=3, log_every=3)
    plain, sampler = tiny(), WindowSampler(stream(), 32, 2)
    optimizer = make(plain)
    for _ in range(6):
        window = sampler.next_batch()
        F.cross_entropy(plain(torch.from_numpy(window.x)).flatten(0, 1), torch.from_numpy(window.y).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = train(tiny(), stream(), config, optimizer=make, out=tmp_path, progress=False).model
    assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))
    shutil.rmtree(Checkpoints(tmp_path).path(6))
    assert same(ours, train(tiny(), stream(), config, optimizer=make, out=tmp_path, resume=True, progress=False).model)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="not the model's"):
        train(tiny(), stream(), TrainConfig(max_steps=1), optimizer=torch.optim.SGD(tiny().parameters()), progress=False)


def test_a_stepper_of_ones_own_makes_the_steps():
    """One that pushes the rate of the step into the first weight, and nothing else."""
    class Adds(Stepper):
        def __call__(self, ids, targets, lr):
            with torch.no_grad():
                self.bare.wte.weight[0, 0] += lr
            return torch.tensor(1.0), torch.tensor(1.0)
    model, config = tiny(), TrainConfig(max_steps=4, warmup_steps=0, schedule="constant", lr=0.5)
    before = model.wte.weight[0, 0].item()
    train(model, stream(), config, stepper=Adds, progress=False)
    assert model.wte.weight[0, 0].item() == pytest.approx(before + 4 * 0.5)
    with pytest.raises(ValueError, match="a stepper has its own"):
        train(model, stream(), config, stepper=Adds, loss=F.cross_entropy)


def test_killed_between_the_last_checkpoint_and_its_evaluation(tmp_path):
    """The step's line of the log and its evaluation are made up for, so that the result is the uninterrupted one's."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[2])
import small_runs as here
from minigpt.engine import trainer
evaluate = trainer.evaluate_run
trainer.evaluate_run = lambda run, *args, **options: os._exit(9) if run.step == 40 else evaluate(run, *args, **options)
trainer.train(here.tiny(), here.stream(), here.PHASED, held=here.stream(400, 1), out=sys.argv[1], progress=False)
"""
    process = run_script(code, tmp_path / "killed", Path(__file__).parent)
    assert process.communicate(timeout=300) and process.returncode == 9
    folder = tmp_path / "killed"
    assert Checkpoints(folder).newest() == 40 and tracking.read_log(folder / "log.csv")[-1]["step"] < 40
    whole = train(tiny(), stream(), PHASED, held=stream(400, 1), out=tmp_path / "whole", progress=False)
    again = train(tiny(), stream(), PHASED, held=stream(400, 1), out=folder, resume=True, progress=False)
    assert repr(again) == repr(whole) and Checkpoints(folder).best() == Checkpoints(tmp_path / "whole").best()
    keys = ("step", "loss", "held", "held_answers")
    rows = [[{k: row[k] for k in keys if k in row} for row in tracking.read_log(f / "log.csv")] for f in (folder, tmp_path / "whole")]
    assert rows[0] == rows[1]


def test_a_stopped_run_says_so():
    def press(row, model):
        if row["step"] == 2:
            signal.raise_signal(signal.SIGINT)
    result = train(tiny(), stream(), TrainConfig(max_steps=9, log_every=1, batch_size=1), callbacks=[press], progress=False)
    assert result.stopped == "SIGINT" and result.step == 3 and "stopped by SIGINT" in repr(result)


def test_one_window_that_cannot_fit_is_not_told_to_take_one_window():
    """GPT-2 XL with a window of 1,024 tokens asks for more than any of our machines has; meta, so that it needs none."""
    with torch.device("meta"):
        model = GPT2(GPT2Config(50257, 10**6, 2, 2, 4096))
    run = Run(model, TrainConfig(micro_batch=1), None, Stepper(tiny(), TrainConfig()), Ranks())
    with pytest.raises(MemoryError) as caught:
        check_memory(run)
    assert "micro_batch" not in str(caught.value) and "smaller block_size" in str(caught.value)


def test_other_micro_batches_are_another_run_where_dropout_draws(tmp_path):
    """Masks are drawn for each pass; without dropout the pieces may change."""
    config = TrainConfig(max_steps=2, batch_size=4, micro_batch=2, save_every=1)
    for dropout in (0.0, 0.1):
        out = tmp_path / str(dropout)
        train(tiny(dropout=dropout), stream(), config, out=out, progress=False)
        shutil.rmtree(Checkpoints(out).path(2))
    train(tiny(), stream(), replace(config, micro_batch=4), out=tmp_path / "0.0", resume=True, progress=False)
    with pytest.raises(ValueError, match="micro_batch: 2 then, 4 now"):
        train(tiny(dropout=0.1), stream(), replace(config, micro_batch=4), out=out, resume=True, progress=False)
