"""Several processes through torchrun against one; streams split by rank."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from exercise_cells import exercises, said
from minigpt.data import WindowSampler
from minigpt.engine.dataset_readers import load_text
from minigpt.engine.batches import Batches, Phase, StreamSampler
from minigpt.engine.checkpoint import Checkpoints
from minigpt.engine.ranks import Ranks
from minigpt.engine.recipes import run_recipe
from minigpt.engine.tokenizer import Tokenizer
from minigpt.engine.train_config import TrainConfig
from minigpt.engine.trainer import train
from minigpt.gpt2 import GPT2
from small_runs import SMALL, SEVERAL, ROOT, same, small_recipe, stream, tiny


pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, here and in the processes that the tests start


RANKS = """
import json, sys
sys.path.insert(0, sys.argv[2])
import small_runs as here
from minigpt.engine.batches import Phase
from minigpt.engine.recipes import run_recipe
from minigpt.engine.trainer import train
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
    alone = run_recipe(small_recipe(), out=tmp_path / "alone", changes=SMALL, progress=False)
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


WHOLE_NOWHERE = """
import torch
from minigpt.engine.ranks import join_ranks
from minigpt.deeper.distributed import distribute, whole_model
from minigpt.gpt2 import GPT2, GPT2Config
from peak_memory import forget_peak, status

ranks = join_ranks("cpu")
whole_model(distribute(GPT2(GPT2Config(100, 8, 1, 1, 8)), ranks, "fsdp"), ranks.rank)     # what torch loads for it
with torch.device("meta" if ranks.rank else "cpu"):
    model = GPT2(GPT2Config(256, 8, 20, 2, 256))
whole = 4 * sum(p.numel() for p in model.parameters())
base = forget_peak()
distribute(model, ranks, "fsdp")
sharding = status("VmHWM") - base
base = forget_peak()
copy = whole_model(model, ranks.rank)
assert (copy is None) == (ranks.rank > 0)
print(f"{ranks.rank} {sharding / whole:.2f} {(status('VmHWM') - base) / whole:.2f}", flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not hasattr(torch.cpu.Stream, "record_event"),
                    reason="reads /proc/self; FSDP2 on a CPU")
def test_a_sharded_model_is_whole_on_one_host_only(tmp_path):
    """Of two ranks, the second never needs more than its half and a tensor or two, neither for cutting nor for saving."""
    (tmp_path / "script.py").write_text(WHOLE_NOWHERE, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(tmp_path / "script.py")], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {int(line[0]): [float(x) for x in line.split()[1:]] for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 ")}
    assert found[1][0] < 0.75 and found[1][1] < 0.35, found


def test_batch_must_divide_by_the_processes():
    with pytest.raises(ValueError, match="batch_size=9 is no multiple of the 2"):
        Batches([Phase(stream())], TrainConfig(batch_size=9), 32, Ranks(0, 2))


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
    state = json.loads(json.dumps(alone.state_dict()))                  # stopped once more, behind the change
    expected = [b.ids for b in read(alone, 40)]                         # over the end of the stream
    again = StreamSampler(rows, tokenizer, 8, 2)
    again.load_state_dict(state)
    assert all(np.array_equal(a, b.ids) for a, b in zip(expected, read(again, 40), strict=True))


def test_a_stream_in_one_piece_goes_on_however_often_the_processes_change():
    datasets = pytest.importorskip("datasets")
    tokenizer = Tokenizer.from_pretrained()
    rows = datasets.Dataset.from_dict({"text": [f"number {i} is here" for i in range(64)]}).to_iterable_dataset()
    sampler, done = StreamSampler(rows, tokenizer, 8, 2), 0
    for world in (2, 1, 3):
        sampler.next_batch()
        state = json.loads(json.dumps(sampler.state_dict()))
        done += sampler.read * sampler.ranks.world
        sampler = StreamSampler(rows, tokenizer, 8, 2, ranks=Ranks(0, world))
        sampler.load_state_dict(state)
        assert f"number {done} is" in tokenizer.decode(sampler.next_batch().x[0])
        sampler.load_state_dict(state)


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


def test_positions_belong_to_the_sampler():
    """Two ranks together read what one reads, in the same order."""
    data = stream()
    whole = Batches([Phase(data)], TrainConfig(batch_size=4), 32).next(0)[0]
    halves = [Batches([Phase(data)], TrainConfig(batch_size=4), 32, Ranks(r, 2)).next(0)[0] for r in (0, 1)]
    assert np.array_equal(whole, np.concatenate(halves))
    assert np.array_equal(whole, WindowSampler(data, 32, 4, seed=0).next_batch().x)


# ------------------------------------------------------------------ the exercises

@pytest.mark.parametrize("number, empty, check, solution", exercises("deeper/distributed"), ids=lambda v: v if len(v) == 13 else "")
def test_exercise(number, empty, check, solution, capsys):
    assert said(empty, check, {"torch": torch}, capsys) == "not solved yet"
    assert said(solution, check, {"torch": torch}, capsys) == "correct"


@pytest.mark.parametrize("number, wrong, words", [
    (1, "def reduce_scatter(tensors): return [sum(tensors) for _ in tensors]", "it is "),
    (2, "def cards_needed(count, memory, rest): return int(16 * count / (memory - rest))", "it is "),
    (3, "def sharded_update(slices, gather, update): return [update(part) for part in slices]", "used on slices")])
def test_a_wrong_solution_is_told_why(number, wrong, words, capsys):
    assert words in said(wrong, exercises("deeper/distributed")[number - 1][2], {"torch": torch}, capsys)
