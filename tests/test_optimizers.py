"""deeper/optimizers: Newton-Schulz against a decomposition, Muon and its AdamW against torch's, a run that is resumed."""
import io
import shutil

import pytest
import torch

from minigpt.deeper.optimizers import Muon, make_muon, orthogonalize
from minigpt.engine.train_config import TrainConfig
from minigpt.engine.trainer import train
from minigpt.training import make_optimizer
from small_runs import stream, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(make, shapes, n: int = 5) -> list[torch.Tensor]:
    """Parameters after some steps with gradients of very different sizes."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = make(parameters)
    for step in range(n):
        for p in parameters:
            p.grad = torch.randn(p.shape) * 10.0 ** (step - 2)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (1, 8)])
def test_orthogonalize_keeps_directions_and_evens_lengths(shape):
    torch.manual_seed(0)
    U, S, Vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = U @ torch.diag(torch.linspace(1, 0.05, len(S))) @ Vt
    got = U.T @ orthogonalize(matrix) @ Vt.T               # diagonal, if the directions were kept
    assert ((got.diagonal() > 0.6) & (got.diagonal() < 1.25)).all()
    assert (got - torch.diag(got.diagonal())).abs().max() < 1e-4


def test_muon_is_torchs():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    shapes = [(48, 16), (16, 48), (24, 24)]
    ours = steps(lambda ps: Muon(ps, lr=0.03, weight_decay=0.2, ns_dtype=torch.bfloat16), shapes)
    theirs = steps(lambda ps: torch.optim.Muon(ps, lr=0.03, weight_decay=0.2), shapes)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_its_adamw_is_torchs():
    shapes = [(8, 4), (5,)]
    ours = steps(lambda ps: Muon(ps, muon=False, lr=0.01, weight_decay=0.3, betas=(0.8, 0.9)), shapes)
    theirs = steps(lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.3, betas=(0.8, 0.9)), shapes)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="muon=False"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_every_weight_of_a_model_is_in_one_group():
    model = tiny()
    groups = make_muon(model).param_groups
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in groups[0]["params"]} == {name for name in names.values() if ".c_" in name and "weight" in name}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    adamw = {names[id(p)] for g in make_optimizer(model).param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == adamw


def test_a_state_that_was_saved_goes_on():
    def some(model, optimizer, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            model(torch.randint(290, (2, 16))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    whole, part = tiny(), tiny()
    some(whole, make_muon(whole), 0, 6)
    some(part, before := make_muon(part), 0, 3)
    torch.save(before.state_dict(), box := io.BytesIO())
    box.seek(0)
    after = make_muon(part)
    after.load_state_dict(torch.load(box, weights_only=True))
    some(part, after, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))


def test_train_takes_it_and_resumes_bit_for_bit(tmp_path):
    config = TrainConfig(max_steps=6, batch_size=2, lr=0.02, warmup_steps=2, save_every=3, device="cpu")
    whole = tiny(dropout=0.1)
    train(whole, stream(), config, optimizer=make_muon, out=tmp_path / "a", progress=False)
    shutil.copytree(tmp_path / "a" / "step-00000003", tmp_path / "b" / "step-00000003")
    part = tiny(dropout=0.1)
    train(part, stream(), config, optimizer=make_muon, out=tmp_path / "b", resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))
