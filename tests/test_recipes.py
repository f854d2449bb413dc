"""Recipes: read, checked, packed, run, resumed, and started from the command line."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from minigpt.deeper.packing import TokenFile, pack
from minigpt.engine.dataset_readers import load_text
from minigpt.engine.batches import StreamSampler
from minigpt.engine.checkpoint import Checkpoints
from minigpt.engine.recipes import load_recipe, recipe_phases, recipe_rows, run_recipe
from minigpt.engine.runs import make_recipe
from minigpt.engine.tokenizer import Tokenizer
from minigpt.engine.train_config import TrainConfig
from minigpt.engine.trainer import train
from minigpt.gpt2 import GPT2, GPT2Config, count_parts
from small_runs import SHAPE, SMALL, same, small_recipe


pytestmark = pytest.mark.usefixtures("one_thread")  # sums in one order, here and in the processes that the tests start


@pytest.mark.parametrize("name", ["nano-stories", "mini-chat", "gpt2-small-wikipedia"])
def test_recipes_load_and_ship(name):
    recipe = load_recipe(name)
    options = recipe["train"] | {"betas": tuple(recipe["train"].get("betas", (0.9, 0.95)))}
    config = TrainConfig(**options)
    GPT2Config.preset(**{"name" if k == "preset" else k: v for k, v in recipe["model"].items()})
    assert recipe["name"] == name and config.max_steps


def test_mini_chat_is_the_recipe_of_the_shipped_model():
    """The figures of the shipped model's card: phases, batch, schedule, optimizer, dropout."""
    recipe = load_recipe("mini-chat")
    first, second = recipe["phase"]
    assert first["chats"] == second["chats"] == ["train.jsonl.xz", "extra.jsonl.xz"]
    assert (first["until"], first["loss"], second["loss"]) == (0.7, "all", "answers")
    assert first["plain"] == ["story", "paragraph"] and "plain" not in second and recipe["held"] == {"chats": "held.jsonl"}
    config = TrainConfig(**recipe["train"] | {"betas": tuple(recipe["train"]["betas"])})
    assert config.rate_at(0, 0.0) == pytest.approx(5e-6) and config.rate_at(183, 0.02) == pytest.approx(9.2e-4)
    assert config.rate_at(2700, 0.34) == 1.5e-3 and config.rate_at(8000, 1.0) == pytest.approx(1.5e-5)
    assert (config.batch_size, config.clip, config.betas, config.weight_decay) == (64, 1.0, (0.9, 0.95), 0.1)
    shape = GPT2Config.preset(recipe["model"].pop("preset"), **recipe["model"])
    assert shape.dropout == 0.1 and sum(count_parts(shape).values()) == 35_984_384


def test_recipe_runs_resumes_and_answers(tmp_path):
    recipe = small_recipe()
    assert recipe["expect"]["held_perplexity"] > 1
    first = run_recipe(recipe, out=tmp_path / "run", changes=SMALL, progress=False)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.vocab_size == 400 and first.history[-1]["held"] < math.log(400)
    loaded = GPT2.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([tokenizer.encode("The history of")])
    assert torch.allclose(loaded(ids), first.model(ids), atol=1e-5)
    shutil.rmtree(Checkpoints(tmp_path / "run").path(6))
    again = run_recipe(recipe, out=tmp_path / "run", changes=SMALL, resume=True, progress=False)
    assert same(first.model, again.model)


def test_recipe_with_chats_in_two_phases(tmp_path):
    """mini-chat's two phases, on the bundled conversations and a small model."""
    recipe = load_recipe("mini-chat")
    for phase in recipe["phase"]:
        phase["chats"] = "chats"
    recipe["held"] = {"chats": "held"}
    recipe["model"] |= {"n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 64}
    recipe.pop("samples")
    changes = {"max_steps": 4, "batch_size": 2, "compile": False, "eval_windows": 4, "log_every": 1, "warmup_steps": 2}
    result = run_recipe(recipe, out=tmp_path / "run", changes=changes, progress=False)
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
    run = run_recipe(recipe, out=tmp_path / "run", folder=tmp_path, progress=False)
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
            run_recipe(recipe | change, out=tmp_path / "other", folder=tmp_path, progress=False)


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
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("documents", [1, 2, 40])
def test_a_book_without_marks_can_be_trained_on(tmp_path, documents):
    """One document would go to one side of the split as a whole: then its end is held out."""
    books = [f"Chapter {n}. " + "The fox met the dog. " * 60 for n in range(documents)]
    (tmp_path / "book.txt").write_text("\n<|endoftext|>\n".join(books), encoding="utf-8")
    rest, held = (recipe_rows({"text": "book.txt"}, tmp_path, 0.05, side) for side in (0, 1))
    assert 0.01 < len("".join(held)) / len("".join(rest + held)) < 0.6
    assert abs(sum(map(len, rest + held)) - sum(len(book) for book in books)) <= 2 * documents      # nothing lost, nothing twice
    result = run_recipe(make_recipe([str(tmp_path / "book.txt")], [], "nano", None, 270), out=tmp_path / "run", progress=False,
                          changes={"max_steps": 1, "batch_size": 1, "block_size": 16, "device": "cpu"})
    assert math.isfinite(result.history[-1]["held"])


def test_what_is_held_out_is_not_in_the_plain_copies(tmp_path):
    chats = [{"kind": "story", "messages": [{"role": "user", "content": f"Story {n}"}, {"role": "assistant", "content": f"It was {n}."}]}
             for n in range(200)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats), encoding="utf-8")
    part = {"chats": "chats.jsonl", "plain": ["story"]}
    sides = [recipe_rows(part, tmp_path, 0.1, side) for side in (0, 1)]
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
        result = run_recipe(recipe, out=tmp_path / "run", changes=changes, progress=False)
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
    run_recipe(recipe, out=tmp_path / "run", changes=changes, progress=False)

    def made():
        return {file: file.read_bytes() for part in ("tokenizer", "data") for file in (tmp_path / "run" / part).iterdir()}
    before = made()
    book.write_text("A bird sang to the hen. " * 300, encoding="utf-8")
    with pytest.warns(UserWarning, match="is kept, as this run began with it"), \
            pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run_recipe(recipe, out=tmp_path / "run", changes=changes, progress=False)
    assert made() == before
    book.unlink()
    with pytest.warns(UserWarning, match="has changed or is gone"):
        result = run_recipe(recipe, out=tmp_path / "run", changes=changes, resume=True, progress=False)
    assert result.step == 2 and made() == before


def test_a_folder_of_texts_is_packed_anew_when_a_file_in_it_changes(tmp_path):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    book = tmp_path / "texts" / "more" / "a.txt"
    tokenizer = Tokenizer.from_pretrained()
    recipe = {"phase": [{"text": "texts"}]}

    def count():
        phases, _ = recipe_phases(recipe, SHAPE, TrainConfig(), tokenizer, tmp_path / "run", tmp_path)
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
        recipe_phases(recipe, SHAPE, TrainConfig(), Tokenizer.from_pretrained(), Path("nowhere"))
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"body": "a"}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="no field 'text', but body"):
        StreamSampler(rows, Tokenizer.from_pretrained(), 8, 1).next_batch()


def test_unknown_recipe_lists_those_there_are():
    with pytest.raises(FileNotFoundError, match="gpt2-small-wikipedia, mini-chat, nano-stories"):
        load_recipe("maxi")


@pytest.mark.parametrize("text, words", [
    ('text = 5', "text = 5 must be a text or a list of texts"), ('text = ["a", 5]', "must be a text or a list of texts"),
    ('chats = 5', "chats = 5"), ('tokens = ["a"]', "tokens = .'a'. must be a text"), ('text = "a"\nuntil = "x"', "until = 'x'"),
    ('text = "a"\nuntil = 5', "until = 5 must be a number from 0 to 1"), ('text = "a"\nplain = [1]', "a list of texts"),
    ('text = "a"\nstream = "no"', "stream = 'no' must be true or false"), ('text = "a"\n[held]\nshare = "x"', "share = 'x'"),
    ('text = "a"\n[tokenizer]\ntrain = "x"', "train = 'x' must be a whole number"),
    ('text = "a"\n[tokenizer]\ntrain = true', "train = True"), ('text = "a"\n[samples]\nprompts = "a"', "prompts = 'a'"),
    ('text = "a"\n[samples]\nevery = 1.5', "every = 1.5"), ('text = "a"\n[train]\nbetas = 5', "betas = 5"),
    ('text = ["a", "b"]\nstream = true', "stream = true needs text, the name")])
def test_values_of_another_kind_are_named(tmp_path, text, words):
    (tmp_path / "r.toml").write_text("[[phase]]\n" + text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("head, words", [("out = 5", "out = 5 must be a text"), ("tensorboard = 1", "tensorboard = 1"),
                                         ("train = 'x'", "train must be a section"), ("samples = 3", "samples must be a section")])
def test_values_of_the_whole_recipe_are_named(tmp_path, head, words):
    (tmp_path / "r.toml").write_text(f'{head}\n[[phase]]\ntext = "a"', encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("changes, words", [({"betas": 5}, "betas"), ({"betas": [0.9, "x"]}, "betas"), ({"betas": [0.9, 1.5]}, "betas"),
                                            ({"seed": -1}, "seed=-1"), ({"log_every": -1}, "log_every=-1"), ({"learning": 1}, "'learning'"),
                                            ({"warmup_steps": -5}, "warmup_steps=-5")])
def test_settings_that_cannot_be_are_named_before_any_work(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        run_recipe("nano-stories", out=tmp_path / "run", changes=changes)
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_is_looked_for_in_a_folder_that_can_be_named(tmp_path):
    """mini-chat ships without its data."""
    with pytest.raises(FileNotFoundError, match=r"train.jsonl.xz.*--folder"):
        run_recipe("mini-chat", out=tmp_path / "run", folder=tmp_path)
