"""Operations, memory and plans, counted another way."""
import pytest
import torch

from exercise_cells import exercises, said
from minigpt.deeper import resources
from minigpt.deeper.resources import data_sheet_flops, estimate_memory, flops_per_token
from minigpt.engine.plan import MACHINES, plan
from minigpt.llama import LlamaConfig
from minigpt.gpt2 import GPT2, GPT2Config
from small_runs import SHAPE, tiny


pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, here and in the processes that the tests start


def test_flops_count_the_products():
    """6 x (parameters without position table, norms and biases) + attention, against a count of each product."""
    B, T = 3, 32
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):    # counts no fused attention
        tiny()(torch.zeros(B, T, dtype=torch.long))
    assert 3 * counter.get_total_flops() == B * T * flops_per_token(SHAPE, T)


def test_plan_adds_up():
    made = plan("gpt2", "24gb", tokens=3.6e9, price=2.0, block_size=512)
    config = GPT2Config.preset("gpt2")
    need = [estimate_memory(config, n, 512, "bfloat16", training=True, device="cuda").peak for n in (made.largest, made.largest + 1)]
    assert need[0] <= 0.9 * made.total < need[1]
    assert made.parameters == 124_439_808 and made.fits and not made.measured
    assert made.hours == pytest.approx(3.6e9 / made.tokens_per_second / 3600)
    assert made.cost == pytest.approx(2 * made.hours)
    assert f"{made.largest} windows" in str(made)
    twice = plan("gpt2", "24gb", batch=2 * made.largest, block_size=512)
    assert not twice.fits and f"micro_batch={made.largest}" in str(twice)


@pytest.mark.parametrize("machine", MACHINES)
def test_plan_for_every_machine(machine):
    made = plan("nano", machine, batch=1, block_size=32)
    assert made.fits and made.measured == (machine == "cpu")
    assert made.dtype == {"cpu": "float32", "t4": "float16"}.get(machine, "bfloat16")


def test_plan_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="cpu, t4, 8gb, 24gb, h100"):
        plan("mini", "tpu")
    with pytest.raises(ValueError, match="'llama'"):
        plan(LlamaConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=50))
    with pytest.raises(ValueError, match="not this one"):
        plan("mini", "h100", measure=True)
    assert plan("gpt2-xl", "8gb").largest == 0


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("Tesla T4", 65),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 PCIe", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA RTX A4000", None), ("NVIDIA A1000", None), ("Quadro RTX 4000", None)])
def test_data_sheets_are_of_the_very_card(name, tflops):
    """The figures of NVIDIA's data sheets, 16 bits, dense; a card that is only named alike is measured instead."""
    assert data_sheet_flops(name) == (tflops and tflops * 1e12)


def test_the_kept_rows_of_a_block_are_counted():
    """16 rows of C float32 numbers a token and block, by torch's own hooks, against what estimate_memory adds for a block."""
    from torch.autograd.graph import saved_tensors_hooks

    def kept(n_layer: int) -> int:
        torch.manual_seed(0)
        model = GPT2(GPT2Config(512, 64, n_layer, 2, 128))
        weights, found = {p.data_ptr() for p in model.parameters()}, {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in weights:
                found[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
            return t
        with saved_tensors_hooks(pack, lambda t: t):
            loss = model(torch.zeros(4, 64, dtype=torch.long)).sum()
        assert loss.requires_grad
        return sum(size for size, _ in found.values())
    shapes = [GPT2Config(512, 64, n, 2, 128) for n in (2, 3)]
    said = [estimate_memory(shape, 4, 64, training=True).activations for shape in shapes]
    assert (kept(3) - kept(2)) / (said[1] - said[0]) == pytest.approx(1.0, abs=0.08)


# ------------------------------------------------------------------ the exercises

def names() -> dict:
    """What the checks of deeper/resources look at: the fit of Besiroglu et al. (2024) among them."""
    return vars(resources) | {"small": GPT2Config.preset("gpt2"), "sizes": torch.logspace(6.5, 11.5, 400, dtype=torch.float64),
                              "fitted_loss": lambda N, D: 1.8172 + 482.01 / N ** 0.3478 + 2085.43 / D ** 0.3658}


@pytest.mark.parametrize("number, empty, check, solution", exercises("deeper/resources"), ids=lambda v: v if len(v) == 11 else "")
def test_exercise(number, empty, check, solution, capsys):
    assert said(empty, check, names(), capsys) == "not solved yet"
    assert said(solution, check, names(), capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def days(weights, tokens, flops, mfu): return 2 * weights * tokens / (flops * mfu) / 86400", "about 0.21"),
    (2, "def sgd_peak(need): return need.peak", "keeps no running means"), (2, "def sgd_peak(need): return need.weights", "it is "),
    (3, "def best_for(flops, hours): return 1e9, 1e9", "should be 4.84e+18"),
    (3, "def best_for(flops, hours): return 1e7, flops * hours * 3600 / 6e7", "can be had")])
def test_a_wrong_solution_is_told_why(number, wrong, words, capsys):
    assert words in said(wrong, exercises("deeper/resources")[number - 1][2], names(), capsys)
