"""Lesson 04: schedule, parameter groups and held-out loss against torch and transformers; its exercises."""
import pytest
import torch

from exercise_cells import exercises, said
from minigpt import training
from minigpt.training import learning_rate, make_optimizer
from small_runs import tiny


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


def names() -> dict:
    """What the checks of lesson 04 look at."""
    return dict(vars(training))


@pytest.mark.parametrize("number, empty, check, solution", exercises("04"), ids=lambda v: v if len(v) == 4 else "")
def test_exercise(number, empty, check, solution, capsys):
    assert said(empty, check, names(), capsys) == "not solved yet"
    assert said(solution, check, names(), capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def linear_schedule(step, total, warmup, peak): return peak * (total - step) / total", "at step 0 it should be 0.1"),
    (2, "class EarlyStop:\n    def __init__(self, patience): self.should_stop = True\n    def __call__(self, row, model): pass", "too early"),
    (2, "class EarlyStop:\n    def __init__(self, patience): self.should_stop = False\n    def __call__(self, row, model): pass",
     "two failures in a row"),
])
def test_a_wrong_solution_is_told_why(number, wrong, words, capsys):
    assert words in said(wrong, exercises("04")[number - 1][2], names(), capsys)
