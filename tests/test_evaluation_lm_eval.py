"""Chapter 06: the lm-eval adapter, through lm-eval's own command line, against lm-eval's own `hf` model."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import minigpt

from minigpt.engine.tokenizer import Tokenizer
from minigpt.engine.choices import load_questions
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.engine.lm_eval_adapter import TASKS, MiniGPTLM, _read_settings

pytest.importorskip("lm_eval")
ROOT = Path(__file__).resolve().parent.parent
LM_EVAL = shutil.which("lm_eval", path=str(Path(sys.executable).parent))
GENERATE = """task: local_generate
custom_dataset: !function minigpt.engine.lm_eval_tasks.bundled_set
dataset_kwargs:
  bundled: cloze
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs:
  until: [".", "the"]
  max_new_tokens: 8
  do_sample: false
  repetition_penalty: 1.0
metric_list:
  - metric: exact_match
metadata:
  version: 1.0
"""
ROLLING = """task: local_rolling
custom_dataset: !function minigpt.engine.lm_eval_tasks.bundled_set
dataset_kwargs:
  bundled: goals
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{goal}} {{sol1}} {{sol2}} {{goal}} {{sol2}} {{sol1}} {{goal}} {{sol1}} {{sol2}}"
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of ours, exported: 24 positions only, so that rolling and truncation need windows."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config.preset("mini", n_layer=2, n_embd=64, n_head=4, block_size=24)).eval()
    for name, p in model.named_parameters():
        if "wte" not in name:
            p.data *= 3
    model.wte.weight.data *= 8
    folder = tmp_path_factory.mktemp("lm_eval") / "exported"
    model.save_pretrained(folder, Tokenizer.from_pretrained())
    return folder


def plain_command(arguments):
    """`lm_eval ...` as anybody types it, in a process of its own."""
    run = subprocess.run([LM_EVAL, *arguments], capture_output=True, text=True, encoding="utf-8", env=os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"})
    assert run.returncode == 0, run.stderr[-3000:]


def our_command(arguments):
    """`minigpt lm-eval ...`, here in this process."""
    minigpt("lm-eval", *arguments)


def run_lm_eval(command, model, folder, tasks, out, limit, *more):
    command(["--model", model, "--model_args", f"pretrained={folder}", "--tasks", ",".join(map(str, tasks)),
             "--device", "cpu", "--batch_size", "4", "--output_path", str(out), "--log_samples", "--limit", str(limit),
             *more])
    results = json.loads(next(out.rglob("results_*.json")).read_text(encoding="utf-8"))["results"]
    samples = {}
    for path in out.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[task] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return results, samples


def hf_results(folder, tasks, limit):
    """The same of lm-eval's own `hf` model, by its Python call (which need not list its thousands of tasks)."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    found = simple_evaluate(
        model="hf", model_args=f"pretrained={folder},dtype=float32,prefix_token_id=0", batch_size=4, device="cpu",
        tasks=[load_yaml(path, resolve_func=True) for path in tasks], limit=limit, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False))
    samples = {task: [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
               for task, rows in found["samples"].items()}
    return found["results"], samples


def flat(answers):
    """Numbers, truth values and texts of nested answers, in order, as texts (lm-eval's files write them so)."""
    return [text for a in answers for text in flat(a)] if isinstance(answers, (list, tuple)) else [str(answers)]


@pytest.fixture(scope="module")
def both(folder, tmp_path_factory):
    """Results and answers of all local tasks: ours by the plain command, and lm-eval's hf."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "local_generate.yaml").write_text(GENERATE, encoding="utf-8")
    (place / "local_rolling.yaml").write_text(ROLLING, encoding="utf-8")
    tasks = [*sorted(TASKS.glob("*.yaml")), *sorted(place.glob("*.yaml"))]
    ours = run_lm_eval(plain_command, "minigpt", folder, tasks, tmp_path_factory.mktemp("out"), 12)
    return ours, hf_results(folder, tasks, 12)


@pytest.mark.skipif(not LM_EVAL, reason="the lm_eval command is not beside this Python")
def test_scores_equal_those_of_lm_evals_hf_model(both, ledger):
    (ours, our_samples), (theirs, their_samples) = both
    assert set(ours) == set(theirs) and len(ours) == 6
    worst = 0.0
    for task, row in theirs.items():
        for metric, value in row.items():
            if isinstance(value, float) and "stderr" not in metric:
                worst = max(worst, abs(ours[task][metric] - value) / max(1.0, abs(value)))
    worst_logprob = 0.0
    for task in our_samples:
        a, b = flat(our_samples[task]), flat(their_samples[task])
        assert len(a) == len(b) >= 12
        if task == "local_generate":
            assert a == b                                                        # the texts
            continue
        for x, y in zip(a, b):
            if x in ("True", "False"):
                assert x == y, task                                              # would greedy say it?
            else:
                worst_logprob = max(worst_logprob, abs(float(x) - float(y)))
    ledger("lm-eval scores of the adapter against --model hf", worst, peer="lm_eval", bound=1e-5)
    ledger("lm-eval log-likelihoods (nats) of the adapter against --model hf", worst_logprob, peer="lm_eval", bound=1e-2)
    assert worst < 1e-5
    assert worst_logprob < 1e-2


@pytest.mark.skipif(not LM_EVAL, reason="the lm_eval command is not beside this Python")
def test_the_tasks_are_not_trivial(both):
    """The comparison would pass on equal nonsense: answers differ between items, texts are generated."""
    (results, samples), _ = both
    assert len({json.dumps(s) for s in samples["local_generate"]}) > 5
    assert len({json.dumps(s) for s in samples["minigpt_questions"]}) == 12
    assert len(load_questions("pairs")) > 20 and 0 < results["minigpt_pairs"]["acc,none"] < 1


def test_minigpt_lm_eval_knows_the_model(folder, tmp_path, monkeypatch):
    """`minigpt lm-eval` signs the model in, so that a task which knows nothing of minigpt can be run."""
    import lm_eval.tasks

    class FewTasks(lm_eval.tasks.TaskManager):  # lm-eval's own thousands take ten seconds to list
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", FewTasks)
    (tmp_path / "tasks").mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"q": f"{a} + {b} =", "o": [str(a + b), "cat"], "a": 0})
                              for a in range(3) for b in range(3)), encoding="utf-8")
    (tmp_path / "tasks" / "sums.yaml").write_text(
        "task: local_sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{json.dumps(str(rows))}\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_target: a\ndoc_to_choice: '{{o}}'\nmetric_list:\n  - metric: acc\nmetadata:\n  version: 1.0\n",
        encoding="utf-8")
    results, _ = run_lm_eval(our_command, "minigpt", folder, ["local_sums"], tmp_path / "out", 9, "--include_path",
                             str(tmp_path / "tasks"))
    assert 0 <= results["local_sums"]["acc,none"] <= 1


def test_signing_in_leaves_lm_evals_own_models_alone():
    """In a fresh process: lm-eval skips its own list of models when the registry is not empty."""
    code = ("from minigpt.engine.lm_eval_adapter import MiniGPTLM, sign_in\nfrom lm_eval.api.registry import get_model\n"
            "assert sign_in() and sign_in() and get_model('minigpt') is MiniGPTLM\n"
            "assert get_model('dummy').__name__ == 'DummyLM'")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_importing_the_adapter_signs_nothing_in():
    """In a fresh process; reading a task file does."""
    code = ("import minigpt.engine.lm_eval_adapter\nfrom lm_eval.api.registry import model_registry\n"
            "assert 'minigpt' not in model_registry.keys()\nimport minigpt.engine.lm_eval_tasks\n"
            "assert 'minigpt' in model_registry.keys()")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


# ------------------------------------------------------------------ settings and chats

@pytest.mark.parametrize("given, length, heat", [
    ({}, 256, 0), ({"max_gen_toks": 7, "max_new_tokens": 9}, 7, 0), ({"max_new_tokens": 9, "max_tokens": 3}, 9, 0),
    ({"max_tokens": 3}, 3, 0), ({"max_completion_tokens": 4, "until": None}, 4, 0), ({"temperature": 0.7}, 256, 0.7),
    ({"temperature": 0.7, "do_sample": False}, 256, 0), ({"temperature": 0.7, "do_sample": True}, 256, 0.7),
    ({"temperature": 0.0, "do_sample": False, "num_beams": 1}, 256, 0)])
def test_settings_mean_what_they_mean_to_lm_eval(given, length, heat):
    from lm_eval.models.utils import normalize_gen_kwargs
    theirs = normalize_gen_kwargs({"until": []} | {name: x for name, x in given.items() if x is not None})
    assert (theirs["max_gen_toks"], theirs.get("temperature", 0) if theirs["do_sample"] else 0) == (length, heat)
    options, until = _read_settings(given, [])
    assert (options.max_new_tokens, options.temperature, until) == (length, heat, [])


@pytest.mark.parametrize("given, words", [
    ({"num_beams": 4}, "num_beams"), ({"max_length": 9}, "max_length"), ({"temperature": -1}, "temperature")])
def test_settings_that_there_are_not_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        _read_settings(given, [])


def test_the_repetition_penalty_is_that_of_transformers(folder):
    """One prompt at a time: in lm-eval's batches the padding would count too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    lm = MiniGPTLM(str(folder), device="cpu")
    plain = 0
    for row in load_questions("cloze")[:6]:
        settings = {"max_new_tokens": 10, "repetition_penalty": 1.7}
        ids = words(row.context, return_tensors="pt").input_ids[:, -14:]
        said = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **settings)
        [ours] = lm.generate_until([SimpleNamespace(args=(words.decode(ids[0]), settings))])
        assert ours == words.decode(said[0, ids.size(1):], skip_special_tokens=True)
        plain += lm.generate_until([SimpleNamespace(args=(words.decode(ids[0]), {"max_new_tokens": 10}))]) != [ours]
    assert plain > 3


def test_the_last_turn_stays_open_where_lm_eval_asks(folder):
    """As transformers' `continue_final_message`, which lm-eval's other models use."""
    from transformers import AutoTokenizer
    words, lm = AutoTokenizer.from_pretrained(folder), MiniGPTLM(str(folder), device="cpu")
    said = [("user", "Hi <|im_end|> there"), ("assistant", "Hello."), ("user", "What is a fox?"), ("assistant", "It is"),
            ("user", "More?"), ("assistant", "The answer is ")]
    chat = [{"role": role, "content": text} for role, text in said]
    for n in (2, 4, 6):
        theirs = words.apply_chat_template(chat[:n], tokenize=False, continue_final_message=True)
        assert lm.apply_chat_template(chat[:n], add_generation_prompt=False) == theirs
        assert lm.apply_chat_template(chat[:n - 1]) == words.apply_chat_template(
            chat[:n - 1], tokenize=False, add_generation_prompt=True)
