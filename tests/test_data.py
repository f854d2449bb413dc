"""Chapter 01: readers, cleaning, the chat renderer, token files and the sampler."""
import bz2
import gzip
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minigpt import data
from minigpt.engine.tokenizer import Tokenizer
from minigpt.engine.vocabulary import CHAT_TEMPLATE
from minigpt.data import (
    ChatRenderer, MaskView, Rendered, TokenFile, WindowSampler, check_messages, dedupe,
    keep_lengths, load_chats, load_text, mix, oasst_threads, pack, split_held, text_of, tokenizer_hash)

ROOT = Path(__file__).resolve().parent.parent
U, A, S = "user", "assistant", "system"


def talk(*texts, system=None):
    messages = [{"role": A if n % 2 else U, "content": t} for n, t in enumerate(texts)]
    return [{"role": S, "content": system}] * (system is not None) + messages


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.from_pretrained()


@pytest.fixture(scope="module")
def renderer(tok):
    return ChatRenderer(tok)


@pytest.fixture(scope="module")
def stories():
    return load_text()


@pytest.fixture(scope="module")
def chats():
    return load_chats()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def repository(folder, files, splits, config="default"):
    """A dataset repository as it lies on the hub: data files and a card that names configs and splits."""
    for path, table in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".parquet"):
            pq.write_table(table, folder / path)
        else:
            (folder / path).write_text(json.dumps(table), encoding="utf-8")
    lines = [f"  - split: {split}\n    path: {pattern}" for split, pattern in splits.items()]
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n" + "\n".join(lines) + "\n---\n# A card\n")
    return folder


# ------------------------------------------------------------------ text

@pytest.mark.parametrize("name, opener", [("a.txt", open), ("a.txt.gz", gzip.open), ("a.txt.xz", lzma.open)])
def test_text_file_of_documents(tmp_path, name, opener):
    with opener(tmp_path / name, "wt", encoding="utf-8", newline="") as file:
        file.write("\ufeffEins, zwei.\r\n\r\nDréi.\r\n<|endoftext|>\r\n\r\n<|endoftext|>\r\nZwei 🦊\r\n")
    assert load_text(tmp_path / name) == ["Eins, zwei.\n\nDréi.", "Zwei 🦊"]


def test_text_folder_mixes_text_and_rows(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "deep" / "a.md").write_text("ay")
    (tmp_path / "c.jsonl").write_text('{"text": "see"}\n\n{"text": "sea"}\n')
    (tmp_path / "ignored.png").write_bytes(b"\0")
    pq.write_table(pa.table({"text": ["dee"]}), tmp_path / "d.parquet")
    assert sorted(load_text(tmp_path)) == ["ay", "bee", "dee", "sea", "see"]


@pytest.mark.parametrize("name, packer", [("a.gz", gzip), ("a.xz", lzma), ("a.bz2", bz2)])
@pytest.mark.parametrize("kind, load", [("txt", load_text), ("jsonl", load_text), ("jsonl", load_chats),
                                        ("json", load_chats)])
def test_damaged_packed_files_name_the_file(tmp_path, name, packer, kind, load):
    rng = random.Random(0)
    rows = [json.dumps({"text": str(rng.random()), "messages": talk(str(rng.random()), "b")}) for _ in range(2000)]
    text = "\n".join(rows) if kind != "json" else "[" + ",\n".join(rows) + "]"
    whole, path = packer.compress(text.encode()), tmp_path / name.replace("a.", f"a.{kind}.")
    path.write_bytes(whole)
    assert len(load(path)) == (1 if kind == "txt" else 2000)
    middle = len(whole) // 2
    spoilt = whole[:middle] + bytes(b ^ 255 for b in whole[middle:middle + 8]) + whole[middle + 8:]
    for damaged in (whole[:middle], whole[:-6], b"no packed file"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{re.escape(path.name)} is damaged or cut short .*again$"):
            load(path)
    path.write_bytes(spoilt)  # may give wrong text before the packer sees it
    with pytest.raises(ValueError, match=re.escape(path.name)):
        load(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_text_that_is_not_utf8_names_the_file(tmp_path, name):
    raw = '{"text": "un caf\xe9"}\n'.encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(ValueError, match=f"{re.escape(name)} is not UTF-8 .byte 0xe9.: save it as UTF-8") as error:
        load_text(tmp_path / name)
    assert not isinstance(error.value, UnicodeDecodeError)


def test_a_folder_called_like_a_text_file(tmp_path):
    (tmp_path / "old.txt").mkdir()
    (tmp_path / "old.txt" / "b.txt").write_text("bee")
    (tmp_path / "rows.jsonl").mkdir()
    (tmp_path / "a.txt").write_text("ay")
    assert sorted(load_text(tmp_path)) == ["ay", "bee"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_with_readme_is_read_once(streaming):
    """datasets takes it for a set of texts, one document a line, and leaves out the rows."""
    with tempfile.TemporaryDirectory(prefix="notes-") as folder:  # datasets reads "test" in a path as a split's name
        folder = Path(folder)
        (folder / "README.md").write_text("# My texts\n")
        for name in "abc":
            (folder / f"{name}.txt").write_text(f"{name} one\n{name} two\n")
        (folder / "d.jsonl").write_text(json.dumps({"text": "dee", "messages": talk("q", "a")}) + "\n")
        assert list(load_text(folder, streaming=streaming)) == ["a one\na two", "b one\nb two", "c one\nc two", "dee"]
        assert [c["messages"] for c in load_chats(folder, streaming=streaming)] == [talk("q", "a")]


def test_an_own_path_goes_before_a_bundled_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_text("stories") == load_text() and load_chats("chats") == load_chats()
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "a.txt").write_text("mine")
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "a.jsonl").write_text(json.dumps({"messages": talk("q", "a")}))
    with pytest.warns(UserWarning, match="'stories' is read from .*stories; the bundled set of this name is .*txt"):
        assert load_text("stories") == ["mine"]
    with pytest.warns(UserWarning, match="'chats' is read from"):
        assert load_chats("chats") == [{"messages": talk("q", "a")}]
    assert len(load_text()) > 2000 and len(load_chats()) > 1000  # the default is the bundled set all the same


def test_bundled_sets():
    stories, chats, held = load_text("stories"), load_chats("chats"), load_chats("held")
    assert len(stories) > 2000 and 300 < len(held) < 500 and 300 < len(chats) <= 1500
    assert sum(p.stat().st_size for p in data.DATA.iterdir()) < 3_000_000
    assert (data.DATA / "stories.txt").stat().st_size < 2_000_000
    assert len({c["kind"].split(":")[0] for c in chats}) >= 20
    asked = {text_of(c) for c in chats} | set(stories)
    assert not asked & {text_of(c) for c in held}  # what measures is not what trains


def test_wikipedia_layout_streams_from_a_repository_folder(tmp_path):
    """The columns and configs of wikimedia/wikipedia; the same rows as datasets.load_dataset gives."""
    import datasets
    rows = [{"id": str(n), "url": f"https://simple.wikipedia.org/wiki/{n}", "title": f"T{n}", "text": f"Text {n}."}
            for n in range(20)]
    folder = repository(tmp_path / "wikipedia", {
        "20231101.simple/train-00000-of-00002.parquet": pa.Table.from_pylist(rows[:12]),
        "20231101.simple/train-00001-of-00002.parquet": pa.Table.from_pylist(rows[12:]),
    }, {"train": "20231101.simple/train-*"}, config="20231101.simple")
    expected = datasets.load_dataset(str(folder), "20231101.simple", split="train")["text"]
    assert load_text(folder, config="20231101.simple") == list(expected) == [r["text"] for r in rows]
    stream = load_text(str(folder), config="20231101.simple", streaming=True, limit=3)
    assert next(stream) == "Text 0." and list(stream) == ["Text 1.", "Text 2."]
    with pytest.raises(ValueError, match="20231101.xx"):
        load_text(folder, config="20231101.xx")
    with pytest.raises(ValueError, match="split='test'"):
        load_text(folder, config="20231101.simple", split="test")


def test_streaming_reads_no_more_than_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nbroken\n')
    assert load_text(tmp_path / "a.jsonl", limit=2) == ["one", "two"]
    stream = load_text(tmp_path / "a.jsonl", streaming=True)
    assert [next(stream), next(stream)] == ["one", "two"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not valid JSON"):
        next(stream)


# ------------------------------------------------------------------ conversations: the schemas of the hub

S_, I_, B_, F_ = pa.string(), pa.int32(), pa.bool_(), pa.float64()
OASST = pa.schema([
    ("message_id", S_), ("parent_id", S_), ("user_id", S_), ("created_date", S_), ("text", S_), ("role", S_),
    ("lang", S_), ("review_count", I_), ("review_result", B_), ("deleted", B_), ("rank", I_), ("synthetic", B_),
    ("model_name", S_), ("detoxify", pa.struct([(n, F_) for n in (
        "toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")])),
    ("message_tree_id", S_), ("tree_state", S_),
    ("emojis", pa.struct([("name", pa.list_(S_)), ("count", pa.list_(I_))])),
    ("labels", pa.struct([("name", pa.list_(S_)), ("value", pa.list_(F_)), ("count", pa.list_(I_))]))])


def oasst_row(id, parent, role, text, rank=None, lang="en", deleted=False, tree="t"):
    return {"message_id": id, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50.983374+00:00",
            "text": text, "role": role, "lang": lang, "review_count": 3, "review_result": True, "deleted": deleted,
            "rank": rank, "synthetic": False, "model_name": None,
            "detoxify": {n: 0.001 for n in OASST.field("detoxify").type.names}, "message_tree_id": tree,
            "tree_state": "ready_for_export", "emojis": {"name": ["+1"], "count": [2]},
            "labels": {"name": ["quality"], "value": [0.75], "count": [3]}}


def test_oasst1(tmp_path):
    rows = [
        oasst_row("1", None, "prompter", "Why is the sky blue?"),
        oasst_row("2", "1", "assistant", "It is not.", rank=2),
        oasst_row("3", "1", "assistant", "Air scatters blue light.", rank=0),
        oasst_row("4", "1", "assistant", "Deleted.", rank=1, deleted=True),
        oasst_row("5", "3", "prompter", "And at dusk?", rank=1),
        oasst_row("6", "3", "prompter", "Thank you!", rank=0),
        oasst_row("7", "5", "assistant", "The way is longer."),
        oasst_row("8", None, "prompter", "¿Qué es el sol?", lang="es", tree="u"),
        oasst_row("9", "8", "assistant", "Una estrella.", lang="es", tree="u"),
        oasst_row("10", None, "prompter", "Nobody answered.", tree="v")]
    folder = repository(tmp_path / "oasst1", {
        "data/train-00000-of-00001-b42a775f407cee45.parquet": pa.Table.from_pylist(rows, OASST),
        "data/validation-00000-of-00001-134b8fd0c89408b6.parquet": pa.Table.from_pylist(rows[7:9], OASST)},
        {"train": "data/train-*", "validation": "data/validation-*"})
    texts = lambda **kw: [[m["content"] for m in c["messages"]] for c in load_chats(folder, **kw)]
    assert texts() == [["Why is the sky blue?", "Air scatters blue light."], ["¿Qué es el sol?", "Una estrella."]]
    assert texts(languages=["en"]) == texts()[:1] and texts(languages=["es"]) == texts()[1:]
    assert texts(best=2, languages=["en"]) == [
        ["Why is the sky blue?", "Air scatters blue light.", "And at dusk?", "The way is longer."],
        ["Why is the sky blue?", "It is not."]]
    assert texts(split="validation", streaming=True) == [["¿Qué es el sol?", "Una estrella."]]
    assert all(check_messages(c["messages"], answered=True) for c in load_chats(folder, best=None))
    with pytest.raises(ValueError, match="empty"):
        load_chats(folder, languages=["de"])


@pytest.mark.parametrize("field, value", [
    ("message_id", None), ("parent_id", ...), ("parent_id", 1.5), ("role", 3), ("text", None), ("lang", ...)])
def test_tree_rows_that_lack_a_field_name_the_line(tmp_path, field, value):
    bad = oasst_row("3", "1", "assistant", "No.")
    bad = {k: v for k, v in (bad | {field: value}).items() if v is not ...}
    rows = [oasst_row("1", None, "prompter", "Why?"), oasst_row("2", "1", "assistant", "So."), bad]
    path = tmp_path / "oasst.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=rf"oasst.jsonl, line 3: '{field}' of a message tree"):
        load_chats(path)
    assert [c["messages"] for c in load_chats(path, skip_bad=True)] == [talk("Why?", "So.")]
    path.write_text("\n".join(map(json.dumps, [*rows[:2], bad | {"deleted": True}])))
    assert len(load_chats(path)) == 1  # a deleted message is not read anyway


def test_oassts_file_of_whole_trees_is_told_apart(tmp_path):
    message = oasst_row("1", None, "prompter", "Why?") | {"replies": [oasst_row("2", "1", "assistant", "So.")]}
    row = {"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": message}
    path = tmp_path / "oasst_ready.trees.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    with pytest.raises(ValueError, match=r"trees.jsonl.gz, line 1: .* This file has a tree in each row: take the one"):
        load_chats(path)
    with pytest.raises(ValueError, match="empty"):
        load_chats(path, skip_bad=True)


def test_oasst_threads_equal_a_brute_force_search():
    """All paths of a random forest, found by walking up from every assistant message."""
    rng = random.Random(0)
    rows = {}
    for n in range(300):
        parent = rng.choice([None, *rows][-40:]) if n > 5 else None
        role = "prompter" if parent is None or rows[parent]["role"] == "assistant" else "assistant"
        rows[str(n)] = oasst_row(str(n), parent, role, f"text {n}", rank=rng.choice([None, 0, 1, 2]))
    answered = {r["parent_id"] for r in rows.values() if r["role"] == "assistant"}
    ends = [r for r in rows.values() if r["role"] == "assistant"
            and not any(q["parent_id"] == r["message_id"] and q["message_id"] in answered for q in rows.values())]
    expected = set()
    for row in ends:
        path = []
        while row is not None:
            path.append(row["text"])
            row = rows.get(row["parent_id"])
        expected.add(tuple(reversed(path)))
    found = [tuple(m["content"] for m in t["messages"]) for t in oasst_threads(rows.values(), best=None)]
    assert len(found) == len(set(found)) and set(found) == expected and len(found) > 50


def test_ultrachat_200k(tmp_path):
    schema = pa.schema([("prompt", S_), ("prompt_id", S_),
                        ("messages", pa.list_(pa.struct([("content", S_), ("role", S_)])))])
    row = {"prompt": "Hi", "prompt_id": "ab12", "messages": talk("Hi", "Hello.", "Bye", "See you.")}
    table = pa.Table.from_pylist([row, row], schema)
    folder = repository(tmp_path / "HuggingFaceH4" / "ultrachat_200k",
                        {f"data/{s}-00000-of-00001.parquet": table for s in ("train_sft", "test_sft", "train_gen")},
                        {s: f"data/{s}-*" for s in ("train_sft", "test_sft", "train_gen")})
    assert load_chats(folder, split="test_sft") == [{"messages": row["messages"]}] * 2
    assert data.HUB_SPLITS["HuggingFaceH4/ultrachat_200k"] == "train_sft"


def test_hub_name_takes_the_default_split(tmp_path, monkeypatch):
    """The relative path of a folder looks just like the hub name: `owner/name` finds the split it needs."""
    test_ultrachat_200k(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(load_chats("HuggingFaceH4/ultrachat_200k", limit=1)) == 1


def test_open_platypus(tmp_path):
    schema = pa.schema([(n, S_) for n in ("input", "output", "instruction", "data_source")])
    rows = [{"input": "", "output": "4", "instruction": "2+2?", "data_source": "MATH/PRM-800K"},
            {"input": "1, 2", "output": "3", "instruction": "Add.", "data_source": "leetcode_ne"}]
    folder = repository(tmp_path / "Open-Platypus",
                        {"data/train-00000-of-00001-4fe2df04669d1669.parquet": pa.Table.from_pylist(rows, schema)},
                        {"train": "data/train-*"})
    assert load_chats(folder) == [{"messages": talk("2+2?", "4"), "kind": "MATH/PRM-800K"},
                                  {"messages": talk("Add.\n\n1, 2", "3"), "kind": "leetcode_ne"}]


def test_openhermes(tmp_path):
    """One list in openhermes2_5.json, most of its many columns null in most rows."""
    empty = dict.fromkeys(("custom_instruction", "topic", "model_name", "model", "skip_prompt_formatting", "category",
                           "views", "language", "id", "title", "idx", "hash", "avatarUrl", "system_prompt"))
    turns = [{"from": "human", "value": "Q?", "weight": None}, {"from": "gpt", "value": "A.", "weight": 1.0}]
    rows = [{**empty, "conversations": turns, "source": "airoboros2.2", "category": "orca"},
            {**empty, "conversations": [{"from": "system", "value": "Be brief.", "weight": 0.0}, *turns],
             "source": "platypus", "model": "gpt-4"}]
    folder = repository(tmp_path / "OpenHermes-2.5", {"openhermes2_5.json": rows}, {"train": "openhermes2_5.json"})
    expected = [{"messages": talk("Q?", "A."), "kind": "orca"},
                {"messages": talk("Q?", "A.", system="Be brief."), "kind": "platypus"}]
    assert load_chats(folder) == load_chats(folder / "openhermes2_5.json") == expected
    assert list(load_chats(folder, streaming=True)) == expected


def test_alpaca(tmp_path):
    rows = [{"instruction": "Name a colour.", "input": "", "output": "Red.", "text": "Below is an instruction..."},
            {"instruction": "Translate.", "input": "chat", "output": "cat", "text": "Below is..."}]
    schema = pa.schema([(n, S_) for n in ("instruction", "input", "output", "text")])
    folder = repository(tmp_path / "alpaca", {
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": pa.Table.from_pylist(rows, schema)},
        {"train": "data/train-*"})
    (tmp_path / "alpaca_data.json").write_text(json.dumps([{k: r[k] for k in r if k != "text"} for r in rows]))
    expected = [{"messages": talk("Name a colour.", "Red.")}, {"messages": talk("Translate.\n\nchat", "cat")}]
    assert load_chats(folder) == load_chats(tmp_path / "alpaca_data.json") == expected


@pytest.mark.parametrize("row", [
    {"messages": talk("Q?", "A.")},
    {"prompt": "Q?", "completion": "A."},
    {"prompt": talk("Q?"), "completion": [{"role": A, "content": "A."}]},
    {"prompt": "Q?", "chosen": "A.", "rejected": "B."},
    {"prompt": talk("Q?"), "chosen": [{"role": A, "content": "A."}], "rejected": [{"role": A, "content": "B."}]},
    {"chosen": talk("Q?", "A."), "rejected": talk("Q?", "B.")},
    {"prompt": "Q?", "completion": "A.", "label": True},
    {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]}])
def test_trl_and_other_layouts_through_parquet_and_jsonl(tmp_path, row):
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert load_chats(tmp_path / "rows.parquet") == load_chats(tmp_path / "rows.jsonl") == [
        {"messages": talk("Q?", "A.")}]


def test_pairs_layout_packed(tmp_path):
    with lzma.open(tmp_path / "train.jsonl.xz", "wt") as file:
        file.write('["story", ["Q?", "A.", "More?", "No."]]\n')
    assert load_chats(tmp_path / "train.jsonl.xz") == [{"messages": talk("Q?", "A.", "More?", "No."), "kind": "story"}]


# ------------------------------------------------------------------ bad input

@pytest.mark.parametrize("line, says", [
    ('{"messages": [', r"line 2: not valid JSON"), ("[" * 100_000, r"line 2: not valid JSON .nested too deeply"),
    ('{"question": "Q?"}', r"line 2: no conversation here, the row has 'question'"),
    ('{"text": "only a text"}', r"line 2: no conversation here"),
    ("[1, 2, 3]", r"line 2: expected an object"),
    ("7", r"line 2: expected an object"),
    ('{"messages": []}', r"line 2: expected a list of messages"),
    ('{"messages": "hi"}', r"line 2: expected a list of messages"),
    ('{"messages": [{"role": "user"}]}', r"line 2, message 0: the field 'content' is missing"),
    ('{"messages": [{"role": "user", "content": 3}]}', r"line 2, message 0: 'content' must be a text"),
    ('{"conversations": [{"from": "human"}]}', r"line 2, message 0: 'content' must be a text"),
    (json.dumps({"messages": talk("a", "b")[::-1]}), r"message 0: the role is 'assistant' where 'user' is due"),
    (json.dumps({"messages": talk("a") + talk("b", "c")}), r"message 1: the role is 'user' where 'assistant'"),
    (json.dumps({"messages": talk("a", "b") + talk("c", system="s")}), r"message 2: the role is 'system'"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', r"message 0: the role is 'tool'"),
    ('{"conversations": ["hi", "hello"]}', r"line 2, message 0: the field 'role' is missing"),
    ('{"conversations": 3}', r"line 2: expected a list of messages, got '3'"),
    ('{"conversations": [{"from": ["human"], "value": "x"}]}', r"line 2, message 0: 'role' must be a text"),
    ('{"instruction": "a", "input": 3, "output": "b"}', r"line 2: 'input' must be a text, not 3"),
    ('{"instruction": ["a"], "output": "b"}', r"line 2: 'instruction' must be a text, not \['a'\]"),
    ('{"prompt": 3, "completion": "x"}', r"line 2, message 0: the field 'role' is missing"),
    ('{"prompt": "x", "completion": 3}', r"line 2, message 1: the field 'role' is missing"),
    ('{"chosen": 3}', r"line 2, message 0: the field 'role' is missing"),
    (json.dumps({"messages": talk("a")}), r"line 2: no assistant message")])
def test_bad_rows_name_file_and_line(tmp_path, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": talk("a", "b")}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=says) as error:
        load_chats(path)
    assert "bad.jsonl" in str(error.value)
    if "JSON" not in says:
        assert len(load_chats(path, skip_bad=True)) == 1


@pytest.mark.parametrize("load", [load_text, load_chats])
def test_empty_and_missing_sources(tmp_path, load):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: the dataset is empty"):
        load(tmp_path / "empty.jsonl")
    for name in (tmp_path / "none.jsonl", "none.jsonl", "../none", "none/two/three", "C:\\none"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load(name)
    (tmp_path / "page.html").write_text("<p>")
    with pytest.raises(ValueError, match="page.html: expected a file that ends in"):
        load(tmp_path / "page.html")


def test_unknown_hub_name_offline_says_what_to_do():
    code = """
from minigpt.data import load_chats, load_text
for load in (load_text, load_chats):
    for streaming in (False, True):
        try:
            list(load('nobody/no-such-set', streaming=streaming))
        except FileNotFoundError as error:
            print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                         env=os.environ | {"HF_HUB_OFFLINE": "1"}).stdout
    for says in ("the dataset 'nobody/no-such-set'", "unset HF_HUB_OFFLINE", "path of a local file or folder",
                 "Offline there are: stories, chats, held"):
        assert out.count(says) == 4


def test_missing_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"line 1: no text in the field 'text': the row has 'body'"):
        load_text(tmp_path / "a.jsonl")
    assert load_text(tmp_path / "a.jsonl", field="body") == ["x"]


# ------------------------------------------------------------------ cleaning, splitting, mixing

def test_dedupe_keeps_the_first_of_each():
    rng = random.Random(1)
    texts = [rng.choice(["a b", "A  b", "a\nB", "a c", "ac", "A C "]) for _ in range(200)]
    expected = list({re.sub(r"\s+", " ", t.lower()).strip(): t for t in reversed(texts)}.values())
    assert sorted(dedupe(texts)) == sorted(expected)
    doubled = [{"messages": talk("q", "a")}, {"messages": talk("Q", "A")}, {"messages": talk("q", "b")}]
    assert list(dedupe(doubled)) == [doubled[0], doubled[2]]
    assert list(dedupe(doubled, key=data.first_text)) == doubled[:1]


def test_keep_lengths_is_inclusive():
    texts = ["x" * n for n in range(10)]
    assert list(keep_lengths(texts, 3, 5)) == texts[3:6]
    assert list(keep_lengths(texts, 8)) == texts[8:] and list(keep_lengths(texts)) == texts[1:]


def test_split_is_stable_under_reordering_and_growth(stories, chats):
    rng = random.Random(2)
    for items in (stories, chats):
        train, held = split_held(items, 0.1)
        assert len(train) + len(held) == len(items) and 0.07 < len(held) / len(items) < 0.13
        names = {text_of(x) for x in held}
        other = rng.sample(items, len(items) // 2) + [items[0]]
        assert {text_of(x) for x in split_held(other, 0.1)[1]} == names & {text_of(x) for x in other}
        assert names <= {text_of(x) for x in split_held(items, 0.2)[1]}  # a larger share only adds
    assert split_held(stories, 0) == (stories, []) and split_held(stories, 1) == ([], stories)


def test_same_question_goes_to_the_same_side():
    rows = [{"messages": talk(f"question {n}", f"answer {k}")} for n in range(200) for k in range(3)]
    train, held = split_held(rows, 0.3)
    asked = lambda side: {c["messages"][0]["content"] for c in side}
    assert not asked(train) & asked(held) and held and train


def test_split_does_not_depend_on_the_process():
    code = "from minigpt.data import split_held; print(split_held([str(n) for n in range(50)], 0.3)[1])"
    outs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                           env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert outs == {f"{split_held([str(n) for n in range(50)], 0.3)[1]}\n"}


def test_mix_follows_the_weights():
    sources = [[("a", n) for n in range(6000)], [("b", n) for n in range(6000)], [("c", 0)]]
    mixed = list(mix(sources, [3, 1, 0], seed=5))
    share = Counter(name for name, _ in mixed)
    assert abs(share["a"] / len(mixed) - 0.75) < 0.02 and share["c"] == 0
    for name in "ab":
        numbers = [n for m, n in mixed if m == name]
        assert numbers == list(range(len(numbers)))  # each source in its own order
    assert share["a"] == 6000 and mixed == list(mix(sources, [3, 1, 0], seed=5))
    assert mixed != list(mix(sources, [3, 1, 0], seed=6))
    again = Counter(mix([["x"] * 500, ["y"] * 3], [1, 1], stop="all"))
    assert again["x"] == 500 and 400 < again["y"] < 600


@pytest.mark.parametrize("bad", [([["a"]], [1, 2], {}), ([["a"]], [-1], {}), ([["a"]], [0], {}), ([], [], {}),
                                 ([["a"]], [1], {"stop": "never"})])
def test_mix_refuses_bad_weights(bad):
    with pytest.raises(ValueError):
        mix(*bad[:2], **bad[2])


# ------------------------------------------------------------------ rendering

PIECES = ["Hello", " there", "  ", "\n", "\n\n", "\t", "é", "日本", "🦊", "!", "<|im_end|>", "<|im_start|>",
          "<|endoftext|>", "assistant\n", " 12", "'s", "\u00a0", "\r\n", "\x1c", "\u2028", "#"]


def random_chats(n, pieces, seed=0):
    rng = random.Random(seed)
    text = lambda: "".join(rng.choice(pieces) for _ in range(rng.randrange(0, 9)))
    return [talk(*(text() for _ in range(2 * rng.randrange(1, 4))),
                 system=rng.choice([None, text() + "x"])) for _ in range(n)]


def reference_mask(ids, tok):
    """1 from behind each `<|im_start|>assistant\\n` up to its `<|im_end|>`, found in the ids alone."""
    start, end = tok.special_tokens["<|im_start|>"], tok.special_tokens["<|im_end|>"]
    head = [start, *tok.encode_ordinary("assistant\n")]
    mask, on = [0] * len(ids), False
    for n, i in enumerate(ids):
        mask[n] = int(on)
        on = (on and i != end) or ids[n + 1 - len(head):n + 1] == head if n + 1 >= len(head) else False
    return mask


def test_ids_equal_apply_chat_template(tmp_path, tok, renderer, chats, ledger):
    """transformers, with the tokenizer and template that we save, gives our ids; 0 conversations differ."""
    from transformers import AutoTokenizer
    tok.save_pretrained(tmp_path / "tok")
    hf = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert hf.chat_template == CHAT_TEMPLATE
    plain = [p for p in PIECES if "<|" not in p]
    every = [c["messages"] for c in chats + load_chats("held")] + random_chats(300, plain)
    differ = 0
    for messages in every:
        ids = hf.apply_chat_template(messages, tokenize=True, return_dict=False)
        differ += list(ids) != renderer.render(messages).ids
        asked = messages[:-1]
        ids = hf.apply_chat_template(asked, tokenize=True, return_dict=False, add_generation_prompt=True)
        differ += list(ids) != renderer.prompt(asked)
    ledger("chats whose ids differ from apply_chat_template", differ, peer="transformers", bound=0)
    assert differ == 0 and len(every) > 2000


def test_mask_counts_the_answers_and_their_end(tok, renderer, chats):
    for messages in [c["messages"] for c in chats] + random_chats(200, PIECES, seed=1):
        rendered = renderer.render(messages)
        assert rendered.mask == reference_mask(rendered.ids, tok)
        counted = [tok.decode(ids) for ids in runs(rendered)]
        assert counted == [m["content"].strip() + "<|im_end|>" for m in messages if m["role"] == A]


def runs(rendered):
    found, on = [], 0
    for i, counts in zip(*rendered):
        if counts and not on:
            found.append([])
        if counts:
            found[-1].append(i)
        on = counts
    return found


def test_text_cannot_open_a_turn(tok, renderer):
    special = set(tok.special_tokens.values())
    for messages in random_chats(300, PIECES, seed=2):
        ids = renderer.render(messages).ids
        turns = [m for m in messages if m["role"] != S]
        assert [i for i in ids if i in special] == [0] + [1, 2] * len(turns)


def test_system_text_goes_before_the_first_user_text(tok, renderer):
    with_system = renderer.render(talk("Hi", "Hello", "Bye", "Bye", system=" Be kind. "))
    assert with_system == renderer.render(talk("Be kind.\n\nHi", "Hello", "Bye", "Bye"))
    assert renderer.render(talk("Hi", "Yo", system="  ")) == renderer.render(talk("Hi", "Yo"))


def test_cut_at_a_turn(tok, renderer):
    for messages in random_chats(40, PIECES[:4] + ["a longer run of words here"], seed=3):
        whole = renderer.render(messages)
        ends = [0]  # lengths at which an answer is complete
        for n, (i, counts) in enumerate(zip(*whole)):
            if counts and i == renderer.im_end:
                ends.append(n + 2)
        for room in range(0, len(whole.ids) + 2):
            cut = renderer.render(messages, max_length=room)
            want = max(e for e in ends if e <= room)
            assert cut.ids == whole.ids[:want] and cut.mask == whole.mask[:want]


def test_unanswered_end_is_kept_unless_cut(renderer):
    messages = talk("one", "two", "three")
    assert renderer.render(messages).ids[-1] == renderer.newline[-1]
    assert sum(renderer.render(messages).mask) == sum(renderer.render(messages[:2]).mask)


def test_prompt_drops_the_oldest_and_keeps_system_and_question(tok, renderer):
    messages = talk("first question", "first answer", "second", "reply", "the last", system="Rules.")
    lengths = set()
    for room in range(len(renderer.prompt(messages)) + 1, 0, -1):
        try:
            ids = renderer.prompt(messages, max_length=room)
        except ValueError as error:
            assert "shorten" in str(error)
            break
        text = tok.decode(ids)
        assert len(ids) <= room and text.count("Rules.\n\n") == 1 and "the last" in text
        assert text.startswith("<|endoftext|><|im_start|>user\nRules.") and text.endswith("<|im_start|>assistant\n")
        lengths.add(len(ids))
    assert len(lengths) == 3  # all, without one exchange, without both
    assert messages == talk("first question", "first answer", "second", "reply", "the last", system="Rules.")
    with pytest.raises(ValueError, match="must end with a user message"):
        renderer.prompt(messages[:3])


def test_stop_ids_and_missing_special_tokens(renderer):
    assert renderer.stop_ids == {0, 2}
    with pytest.raises(ValueError, match=r"<\|im_start\|>, <\|im_end\|>"):
        ChatRenderer(Tokenizer.from_pretrained("gpt2"))


def test_mask_view_escapes_and_marks(tok, renderer):
    view = MaskView(renderer.render(talk("<b>?", "<i>")), tok)
    page = view._repr_html_()
    assert "&lt;b&gt;?" in page and "<b>" not in page and page.count("<span") == 3
    assert repr(view).endswith("[<i><|im_end|>]\n") and repr(view).count("[") == 1


# ------------------------------------------------------------------ token files

def naive_stream(rows, tok, max_length=None):
    renderer, ids, mask = ChatRenderer(tok), [], []
    for row in rows:
        if isinstance(row, str):
            one = Rendered([0, *tok.encode_ordinary(row)], [1] * (1 + len(tok.encode_ordinary(row))))
        else:
            one = renderer.render(row["messages"], max_length)
            if not any(one.mask):
                continue
        ids += one.ids
        mask += one.mask
    return ids, mask


def test_pack_equals_the_naive_stream(tmp_path, tok, stories, chats):
    texts = pack(stories[:300], tmp_path / "t.bin", tok, chunk=20_000)
    assert texts.mask is None and texts.ids.dtype == np.uint16
    assert texts.ids.tolist() == naive_stream(stories[:300], tok)[0]
    assert texts.header["n_documents"] == 300 == (texts.ids == 0).sum()
    rows = chats[:200] + stories[:20] + chats[200:300]
    both = pack(iter(rows), tmp_path / "sub" / "c.bin", tok, max_length=60, chunk=10_000)
    ids, mask = naive_stream(rows, tok, 60)
    assert both.ids.tolist() == ids and both.mask.tolist() == mask
    head = both.header
    assert head["n_tokens"] == len(ids) == len(both) and head["n_targets"] == sum(mask)
    assert head["n_documents"] + head["n_dropped"] == len(rows) and head["n_dropped"] > 0
    assert head["vocab_size"] == both.vocab_size == 20_000 and head["tokenizer"] == tokenizer_hash(tok)
    assert sorted(p.name for p in tmp_path.rglob("*.bin*")) == ["c.bin", "t.bin"]  # no parts are left


def test_file_layout_is_what_the_chapter_says(tmp_path, tok, chats):
    file = pack(chats[:50], tmp_path / "c.bin", tok)
    raw = (tmp_path / "c.bin").read_bytes()
    head = json.loads(raw[:4096])
    n = head["n_tokens"]
    assert raw[4095:4096] == b"\n" and len(raw) == 4096 + 3 * n
    assert np.frombuffer(raw, "<u2", n, 4096).tolist() == file.ids.tolist()
    assert np.frombuffer(raw, "u1", n, 4096 + 2 * n).tolist() == file.mask.tolist()


def test_processes_give_the_same_bytes(tmp_path, tok, chats):
    pack(chats, tmp_path / "one.bin", tok, max_length=100, chunk=30_000)
    pack(chats, tmp_path / "two.bin", tok, max_length=100, chunk=30_000, num_proc=2)
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("*.bin*")) == ["one.bin", "two.bin"]


def test_gpt2_vocabulary_fits(tmp_path):
    gpt2 = Tokenizer.from_pretrained("gpt2")
    file = pack(["Hello world"], tmp_path / "g.bin", gpt2)
    assert file.ids.tolist() == [50256, 15496, 995] and file.vocab_size == 50257


def test_errors_of_pack(tmp_path, tok, stories, chats):
    pack(stories[:5], tmp_path / "a.bin", tok)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        pack(stories[:6], tmp_path / "a.bin", tok)
    assert TokenFile(tmp_path / "a.bin").header["n_documents"] == 5
    assert pack(stories[:6], tmp_path / "a.bin", tok, overwrite=True).header["n_documents"] == 6
    with pytest.raises(ValueError, match="the dataset is empty"):
        pack([], tmp_path / "b.bin", tok)
    with pytest.raises(ValueError, match="max_length=3 leaves room for no answer"):
        pack(chats[:9], tmp_path / "b.bin", tok, max_length=3)
    with pytest.raises(ValueError, match="<|im_start|>"):
        pack(chats[:9], tmp_path / "b.bin", Tokenizer.from_pretrained("gpt2"))
    with pytest.raises(TypeError, match="expected a text"):
        pack(["a", 3], tmp_path / "b.bin", tok)
    with pytest.raises(ValueError, match="a chat among texts"):
        pack(["a", chats[0]], tmp_path / "b.bin", tok)
    large = Tokenizer(tok.token_bytes + [b"x%d" % n for n in range(50_000)], tok.merges, tok.special_tokens)
    with pytest.raises(ValueError, match="at most 65,536"):
        pack(["a"], tmp_path / "b.bin", large)
    assert sorted(p.name for p in tmp_path.glob("*.bin*")) == ["a.bin"]


def test_errors_of_token_files(tmp_path, tok, stories):
    path = tmp_path / "a.bin"
    pack(stories[:5], path, tok)
    assert TokenFile(path, tok).ids[0] == 0
    with pytest.raises(ValueError, match="was packed with the tokenizer") as error:
        TokenFile(path, Tokenizer.from_pretrained("gpt2"))
    assert tokenizer_hash(tok) in str(error.value) and "50257" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no token file at"):
        TokenFile(tmp_path / "none.bin")
    raw = path.read_bytes()
    for bad in (raw[:-3], raw + b"\0\0", raw[:4096]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="cut short or changed"):
            TokenFile(path)
    path.write_bytes(b"not a token file")
    with pytest.raises(ValueError, match="not a token file"):
        TokenFile(path)


def test_hash_changes_with_each_part_of_a_tokenizer(tok):
    swapped = [tok.merges[1], tok.merges[0], *tok.merges[2:]]
    others = [Tokenizer(tok.token_bytes, swapped, tok.special_tokens),
              Tokenizer([*tok.token_bytes, b"<new>"], tok.merges, {**tok.special_tokens, "<new>": 20_000}),
              Tokenizer(tok.token_bytes[:-1], tok.merges[:-1], tok.special_tokens)]
    assert len({tokenizer_hash(t) for t in [tok, *others]}) == 4


SLOW = """
import sys, time
from minigpt.engine.tokenizer import Tokenizer
from minigpt.data import load_text, pack

def slowly(texts):
    for n, text in enumerate(texts):
        if n % 100 == 0:
            time.sleep(0.05)
        yield text

if __name__ == "__main__":
    pack(slowly(load_text()), sys.argv[1], Tokenizer.from_pretrained(), chunk=50_000, num_proc=int(sys.argv[2]))
"""


@pytest.mark.parametrize("how, num_proc", [
    ("kill", 1), pytest.param("interrupt", 2, marks=pytest.mark.skipif(os.name == "nt", reason="POSIX signals"))])
def test_interrupted_packing_goes_on_where_it_stopped(tmp_path, tok, stories, how, num_proc):
    """A process that is killed or gets Ctrl-C leaves no file but its parts; the next call makes only the rest."""
    script, target = tmp_path / "slow.py", tmp_path / "s.bin"
    script.write_text(SLOW)
    folder = tmp_path / "s.bin.parts"
    run = subprocess.Popen([sys.executable, str(script), str(target), str(num_proc)], stderr=subprocess.DEVNULL,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    for _ in range(600):
        time.sleep(0.05)
        if len(list(folder.glob("*.bin"))) >= 3 or run.poll() is not None:
            break
    assert run.poll() is None, "too fast to be interrupted"
    run.kill() if how == "kill" else run.send_signal(signal.SIGINT)
    assert run.wait(60) != 0 and not target.exists()
    damaged = sorted(folder.glob("*.bin"))[0]
    damaged.write_bytes(damaged.read_bytes()[:5000])  # as a power failure may leave it
    made = {p: p.stat().st_mtime_ns for p in folder.glob("*.bin")}
    assert len(made) >= 3
    kept = {}

    def watched(rows):
        yield from rows
        kept.update({p: p.stat().st_mtime_ns for p in made})
    file = pack(watched(stories), target, tok, chunk=50_000)
    assert {p for p in made if kept[p] != made[p]} == {damaged}  # the others were not written again
    assert file.ids.tolist() == naive_stream(stories, tok)[0] and not folder.exists()


def test_of_two_processes_one_packs(tmp_path, tok, stories):
    """A second process with the same target, and no overwrite, does not say that it packed, and changes nothing."""
    script, target = tmp_path / "slow.py", tmp_path / "s.bin"
    script.write_text(SLOW)
    first = subprocess.Popen([sys.executable, str(script), str(target), "1"], env=os.environ | {"PYTHONPATH": str(ROOT)})
    for _ in range(600):
        time.sleep(0.05)
        if (tmp_path / "s.bin.parts").exists():
            break
    with pytest.raises(BlockingIOError, match="s.bin is being written by another process"):
        pack(stories[:10], target, tok)
    assert first.wait(120) == 0
    with pytest.raises(FileExistsError, match="s.bin exists"):
        pack(stories[:10], target, tok)
    assert TokenFile(target, tok).header["n_documents"] == len(stories)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.bin", "slow.py"]


def test_what_is_no_regular_file_is_not_packed_over(tmp_path, tok):
    read = iter(["a story", "another"])
    for path in (tmp_path, *([Path("/dev/null")] if os.name != "nt" else [])):
        with pytest.raises(OSError, match="is a folder|is no regular file"):
            pack(read, path, tok, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_changed_data_is_packed_anew(tmp_path, tok, stories):
    def breaks(rows):
        yield from rows
        raise OSError("gone")
    with pytest.raises(OSError, match="gone"):
        pack(breaks(stories[:200]), tmp_path / "a.bin", tok, chunk=20_000)
    changed = ["Something else.", *stories[1:250]]
    assert pack(changed, tmp_path / "a.bin", tok, chunk=20_000).ids.tolist() == naive_stream(changed, tok)[0]


def test_packing_reads_ahead_only_a_little(tmp_path, tok):
    """An endless source is not read at once: with two processes at most a few chunks are in memory."""
    read = []

    def endless():
        for n in range(10_000):
            read.append(n)
            if len(read) > 2000:
                raise OSError("read too far ahead")
            yield "word " * 100
    with pytest.raises(OSError):
        pack(endless(), tmp_path / "a.bin", tok, chunk=5_000, num_proc=2)
    assert len(list((tmp_path / "a.bin.parts").glob("*.bin"))) >= 2001 // 10 - 3 * 2 - 2


# ------------------------------------------------------------------ sampling

@pytest.fixture(scope="module")
def chat_file(tmp_path_factory, tok, chats):
    return pack(chats, tmp_path_factory.mktemp("tokens") / "chats.bin", tok)


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_windows_are_pieces_of_the_stream(chat_file, order):
    sampler = WindowSampler(chat_file, 32, 5, order=order)
    ids, mask = chat_file.ids.tolist(), chat_file.mask.tolist()
    starts = sampler.starts(0, 15).tolist()
    for step in range(3):
        batch = sampler.next_batch()
        assert batch.ids.shape == (5, 33) and batch.ids.dtype == np.int64 and batch.mask.dtype == bool
        for row in range(5):
            at = starts[5 * step + row]
            assert batch.x[row].tolist() == ids[at:at + 32] and batch.y[row].tolist() == ids[at + 1:at + 33]
            assert batch.mask[row].tolist() == [bool(m) for m in mask[at + 1:at + 33]]


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_resume_is_exact_across_epochs(chat_file, order):
    make = lambda seed=3: WindowSampler(chat_file, 512, 7, seed=seed, order=order)
    whole = make()
    batches = [whole.next_batch().ids for _ in range(60)]  # more than two epochs
    first = make()
    for _ in range(23):
        first.next_batch()
    state = json.loads(json.dumps(first.state_dict()))
    assert all(type(v) is int for v in state.values()) and len(state) <= 5
    second = make(seed=99)
    second.load_state_dict(state)
    for want in batches[23:]:
        assert (second.next_batch().ids == want).all()
    assert not (batches[0] == make(seed=4).next_batch().ids).all()


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_ranks_and_batch_sizes_read_the_same_windows(chat_file, order):
    one = WindowSampler(chat_file, 64, 12, order=order)
    expected = np.concatenate([one.next_batch().ids for _ in range(8)])
    small = WindowSampler(chat_file, 64, 4, order=order)
    assert (np.concatenate([small.next_batch().ids for _ in range(24)]) == expected).all()
    ranks = [WindowSampler(chat_file, 64, 4, order=order, rank=r, world_size=3) for r in range(3)]
    got = np.concatenate([np.concatenate([s.next_batch().ids for s in ranks]) for _ in range(8)])
    assert (got == expected).all() and ranks[0].state_dict() == ranks[2].state_dict() == one.state_dict()


def test_shuffled_reads_each_window_once_an_epoch(chat_file):
    sampler = WindowSampler(chat_file, 64, 1, order="shuffled")
    n = (len(chat_file) - 1) // 64
    epochs = [sampler.starts(e * n, n).tolist() for e in range(3)]
    assert all(sorted(e) == list(range(0, 64 * n, 64)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])


def test_random_places_reach_both_ends_and_are_even(tmp_path, tok):
    file = pack(["a b c d e f g"], tmp_path / "a.bin", tok)
    starts = WindowSampler(file, 3, 1, seed=1).starts(0, 3000)
    counts = np.bincount(starts)
    assert len(counts) == len(file) - 3  # the last window ends with the last token
    assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


def test_errors_of_the_sampler(tmp_path, tok, chat_file):
    short = pack(["a b"], tmp_path / "a.bin", tok)
    with pytest.raises(ValueError, match="too few for a window of block_size"):
        WindowSampler(short, len(short), 1)
    assert WindowSampler(short, len(short) - 1, 1).next_batch().ids.tolist() == [short.ids.tolist()]
    with pytest.raises(ValueError, match="order='sorted'"):
        WindowSampler(chat_file, 8, 1, order="sorted")
    with pytest.raises(ValueError, match="rank=2"):
        WindowSampler(chat_file, 8, 1, rank=2, world_size=2)
    sampler = WindowSampler(chat_file, 8, 1)
    for wrong in ({**sampler.state_dict(), "n_tokens": 5}, {**sampler.state_dict(), "block_size": 9}, {"seed": 0}):
        with pytest.raises(ValueError, match="the sampler's state has"):
            sampler.load_state_dict(wrong)


# ------------------------------------------------------------------ the module and the exercises

def test_import_is_light():
    code = "import sys, minigpt.data; print([m for m in ('torch', 'datasets', 'matplotlib', 'pyarrow') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stderr


def test_solutions_pass_their_checks_and_wrong_ones_do_not(tok, renderer, chats):
    cells = json.loads((ROOT / "nbs" / "01_data.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(c["source"]) for c in cells]
    three = next(c for c in chats if len(c["messages"]) == 6)
    names = {"np": np, "tok": tok, "renderer": renderer, "three": three, **vars(data)}
    found = [n for n, t in enumerate(texts) if t.startswith("# exercise 01.")]
    assert 3 <= len(found) <= 5
    for at, end in zip(found, [*found[1:], len(texts)]):
        space = dict(names)
        exec(texts[at], space)
        function = re.search(r"def (\w+)", texts[at]).group(1)
        check = next(t for t in texts[at:end] if t.startswith("def check_"))
        exec(check, space)
        check = space[re.search(r"def (\w+)", check).group(1)]
        assert check(space[function]) == "not solved yet"
        solution = next(t for t in texts[at:end] if "<details>" in t)
        exec(re.search(r"```python\n(.*?)```", solution, re.S).group(1), space)
        assert check(space[function]) == "correct"
        fake = {"from_quiz": lambda row: talk("Q?", "no"), "last_answer_only": lambda r: r,
                "similarity": lambda a, b: 0.5, "pad_rows": lambda rows, pad: (np.ones((2, 3)), np.ones((2, 3)))}
        assert check(fake[function]) not in ("correct", "not solved yet")
