"""Lesson 04: schedule, parameter groups, baselines and the loop, each against another way; its exercises."""
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from exercise_cells import exercises, said
from minigpt import training
from minigpt.training import (evaluating, get_batch, held_loss, learning_rate, make_optimizer, ngram_losses, seed_step,
                              train_model, train_step)
from small_runs import same, stream, tiny


pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, here and in the processes that the tests start


def test_cosine_schedule_is_transformers(ledger):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = transformers.get_cosine_schedule_with_warmup(optimizer, 20, 200)
    worst = 0.0
    for step in range(200):
        ours = learning_rate(step if step >= 20 else step - 1, step / 200, lr=1.0, warmup_steps=20, final_lr=0.0) if step else 0.0
        worst = max(worst, abs(ours - peer.get_last_lr()[0]))     # theirs warms up from 0, one step behind
        optimizer.step()
        peer.step()
    ledger("learning rate of the cosine schedule", worst, peer="transformers", bound=1e-9)
    assert worst < 1e-9


def test_wsd_is_flat_then_falls_and_follows_the_clock():
    wsd = {"schedule": "wsd", "stable": 0.5, "warmup_steps": 10, "lr": 2.0, "final_lr": 0.25}
    assert learning_rate(50, 0.49, **wsd) == 2.0
    assert learning_rate(50, 1.0, **wsd) == pytest.approx(0.5)
    assert learning_rate(50, 0.75, **wsd) == pytest.approx((2.0 + 0.5) / 2)


def test_only_matrices_decay():
    model = tiny()
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        decayed = name in ("wte.weight", "wpe.weight") or (".c_" in name and name.endswith("weight"))
        assert torch.allclose(p, before[name] * (0.95 if decayed else 1.0)), name


def test_cosine_by_the_clock_falls_from_where_the_warm_up_ended():
    """Steps of equal length, no number of steps known: no jump after the warm-up, however long it was."""
    for length in (0.001, 0.004):
        rates = [learning_rate(step, step * length, warmup_steps=50) for step in range(int(1 / length))]
        assert max(rates) == rates[49] == 1.0 and np.abs(np.diff(rates[49:])).max() < 0.01 * length / 0.001


def test_ngram_losses_by_counting_one_by_one():
    rng = np.random.default_rng(0)
    train, held, V, weight = rng.integers(0, 7, 400), rng.integers(0, 8, 90), 9, 3.0     # 7 and 8 are never seen
    ones, twos, before = Counter(train.tolist()), Counter(zip(train[:-1].tolist(), train[1:].tolist())), Counter(train[:-1].tolist())
    alone = [(ones[i] + 0.5) / (400 + 0.5 * V) for i in range(V)]
    pairs = list(zip(held[:-1].tolist(), held[1:].tolist()))
    want = (-sum(math.log(alone[b]) for _, b in pairs) / 89,
            -sum(math.log((twos[a, b] + weight * alone[b]) / (before[a] + weight)) for a, b in pairs) / 89)
    assert ngram_losses(train, held, V, weight) == pytest.approx(want)


def test_batches_are_windows_of_the_stream_and_their_targets():
    ids = torch.arange(100) * 3
    x, y = get_batch(ids, 8, 500)
    assert x.shape == y.shape == (500, 8) and torch.equal(x + 3, y)
    assert set(x[:, 0].tolist()) == set(range(0, 92 * 3, 3))      # every place, the last target among them


def test_held_loss_window_by_window():
    model, ids = tiny(dropout=0.3).train(), torch.from_numpy(stream(500).ids.astype(np.int64))
    with evaluating(model):
        each = [F.cross_entropy(model(ids[None, i:i + 32])[0], ids[i + 1:i + 33]).item() for i in range(0, 480, 32)]
    assert held_loss(model, ids, rows=4) == pytest.approx(np.mean(each), abs=1e-5)
    assert model.training
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.training


def test_a_step_in_pieces_is_the_step_of_the_whole_batch():
    x, y = torch.randint(290, (6, 16)), torch.randint(290, (6, 16))
    y[0, :15] = y[3, 4:] = -100
    models = []
    for micro_batch in (None, 1, 4):
        model = tiny()
        loss, norm = train_step(model, torch.optim.SGD(model.parameters(), lr=0.5), x, y, micro_batch=micro_batch, clip=0.3)
        models.append([loss.item(), norm.item(), *(p.detach() for p in model.parameters())])
    want = F.cross_entropy(tiny()(x).flatten(0, 1), y.flatten()).item()
    assert models[0][0] == pytest.approx(want, abs=1e-5) and models[0][1] > 0.3
    for other in models[1:]:
        assert other[:2] == pytest.approx(models[0][:2], abs=1e-5)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(other[2:], models[0][2:]))


def test_the_loop_is_the_same_however_often_it_looks():
    """With dropout on: evaluations and a callback that draws change nothing, bit for bit; groups keep their own rates."""
    ids, models, seen = torch.from_numpy(stream().ids.astype(np.int64)), [], []
    for every in (1, 100):
        model = tiny(dropout=0.2)
        optimizer = torch.optim.SGD([{"params": model.blocks.parameters(), "lr": 0.1}, {"params": model.wte.parameters(), "lr": 0.01}])
        rows = train_model(model, optimizer, ids, ids[:200], max_steps=6, warmup_steps=2, eval_every=every,
                           report=lambda row: seen.append((row["step"], torch.rand(3).sum())))
        models.append(model)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(10 * optimizer.param_groups[1]["lr"])
        assert rows[-1]["held"] == held_loss(model, ids[:200])
    assert same(*models) and [step for step, _ in seen] == [1, 2, 3, 4, 5, 6, 6] and not models[0].training


def test_the_seed_of_a_step_sets_all_generators():
    drawn = []
    for seed, step, rank in ((0, 5, 0), (0, 6, 0), (1, 5, 0), (0, 5, 1), (0, 5, 0)):
        seed_step(seed, step, rank)
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[4] and len({value for row in drawn for value in row}) == 12


def names() -> dict:
    """What the checks of lesson 04 look at."""
    return dict(vars(training))


@pytest.mark.parametrize("number, empty, check, solution", exercises("04"), ids=lambda v: v if len(v) == 4 else "")
def test_exercise(number, empty, check, solution, capsys):
    assert said(empty, check, names(), capsys) == "not solved yet"
    assert said(solution, check, names(), capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def linear_schedule(step, total, warmup, peak): return peak * (total - step) / total", "at step 0 it should be 0.1"),
    (2, "class EarlyStop:\n    def __init__(self, patience): self.should_stop = True\n    def __call__(self, row): pass", "too early"),
    (2, "class EarlyStop:\n    def __init__(self, patience): self.should_stop = False\n    def __call__(self, row): pass",
     "two failures in a row"),
    (3, "def lion(w, grad, m, lr, b1=0.9, b2=0.99, decay=0.1):\n    m = b2 * m + (1 - b2) * grad\n    return w - lr * m.sign(), m",
     "the weights should be"),
    (3, "def lion(w, grad, m, lr, b1=0.9, b2=0.99, decay=0.1):\n"
        "    return w - lr * (b1 * m + (1 - b1) * grad).sign(), b2 * m + (1 - b2) * grad", "with decay=1.0"),
])
def test_a_wrong_solution_is_told_why(number, wrong, words, capsys):
    assert words in said(wrong, exercises("04")[number - 1][2], names(), capsys)
