"""engine/dataset_readers: texts and conversations from files, folders and (laid out like it) the hub."""
import bz2
import gzip
import json
import lzma
import os
import random
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minigpt.data import text_of
from minigpt.chat_format import check_messages
from minigpt.engine.dataset_readers import DATA, load_chats, load_text, oasst_threads
from minigpt.engine.files import ASSETS
from minigpt.engine.tokenizer import Tokenizer
from small_data import A, talk

ROOT = Path(__file__).resolve().parent.parent


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
    with pytest.warns(UserWarning, match="'stories' is read from .*stories; what ships under this name is .*txt"):
        assert load_text("stories") == ["mine"]
    with pytest.warns(UserWarning, match="'chats' is read from"):
        assert load_chats("chats") == [{"messages": talk("q", "a")}]
    assert len(load_text()) > 2000 and len(load_chats()) > 1000  # the default is the bundled set all the same


@pytest.mark.parametrize("name, load", [
    ("stories", load_text), ("chats", load_chats), ("held", load_chats), ("gpt2", Tokenizer.from_pretrained),
    ("gpt2-xl", Tokenizer.from_pretrained), ("minigpt-chat", Tokenizer.from_pretrained)])
def test_one_rule_for_all_names_that_ship(tmp_path, monkeypatch, name, load):
    """What lies here goes before what ships, with a warning; what is wrong with it is an error, never passed over."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shipped = load(name)
    Path(name).mkdir()
    with pytest.warns(UserWarning, match=f"'{name}' is read from .*{name}; what ships under this name is"):
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}.*(is empty|needs tokenizer.json)"):
            load(name)
    Path(name).rmdir()
    texts = lambda found: found.merges if isinstance(found, Tokenizer) else found
    assert texts(load(name)) == texts(shipped)


def test_no_name_is_what_ships_whatever_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("stories", "chats", "minigpt-chat"):
        Path(name).mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_text()) > 2000 and len(load_chats()) > 1000
        assert Tokenizer.from_pretrained().merges == Tokenizer.from_pretrained(ASSETS / "minigpt-chat").merges


def test_bundled_sets():
    stories, chats, held = load_text("stories"), load_chats("chats"), load_chats("held")
    assert len(stories) > 2000 and 300 < len(held) < 500 and 300 < len(chats) <= 1500
    assert sum(p.stat().st_size for p in DATA.iterdir()) < 3_000_000
    assert (DATA / "stories.txt").stat().st_size < 2_000_000
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
    best = ["Why is the sky blue?", "Air scatters blue light.", "And at dusk?", "The way is longer."]  # not the thanks
    assert texts() == [best, ["¿Qué es el sol?", "Una estrella."]]
    assert texts(languages=["en"]) == texts()[:1] and texts(languages=["es"]) == texts()[1:]
    assert texts(best=2, languages=["en"]) == [best, ["Why is the sky blue?", "It is not."]]
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


def test_follow_ups_without_an_answer_take_no_place_among_the_best():
    """The best `n` are counted among those that lead to an answer: with n=1 a question of rank 1 goes on."""
    rows = [oasst_row("q", None, "prompter", "Q"), oasst_row("a", "q", "assistant", "A", rank=0),
            oasst_row("t", "a", "prompter", "thanks", rank=0), oasst_row("b", "a", "prompter", "and?", rank=1),
            oasst_row("c", "b", "assistant", "more"), oasst_row("d", "a", "prompter", "why?", rank=2),
            oasst_row("e", "d", "assistant", "so")]
    found = lambda best: [[m["content"] for m in t["messages"]] for t in oasst_threads(rows, best=best)]
    assert found(1) == [["Q", "A", "and?", "more"]]
    assert found(2) == found(None) == [["Q", "A", "and?", "more"], ["Q", "A", "why?", "so"]]


def test_ultrachat_200k(tmp_path):
    schema = pa.schema([("prompt", S_), ("prompt_id", S_),
                        ("messages", pa.list_(pa.struct([("content", S_), ("role", S_)])))])
    row = {"prompt": "Hi", "prompt_id": "ab12", "messages": talk("Hi", "Hello.", "Bye", "See you.")}
    table = pa.Table.from_pylist([row, row], schema)
    folder = repository(tmp_path / "HuggingFaceH4" / "ultrachat_200k",
                        {f"data/{s}-00000-of-00001.parquet": table for s in ("train_sft", "test_sft", "train_gen")},
                        {s: f"data/{s}-*" for s in ("train_sft", "test_sft", "train_gen")})
    assert load_chats(folder, split="test_sft") == [{"messages": row["messages"]}] * 2


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
    ('{"messages": [', r"line 2: not valid JSON"), ('{"text": "Peel them."', r"line 2: not valid JSON .*, column 22"),
    ("[" * 100_000, r"line 2: not valid JSON .nested too deeply"),
    ('{"question": "Q?"}', r"line 2: no conversation here, the row has 'question'"),
    ('{"text": "only a text"}', r"line 2: no conversation here"),
    ("[1, 2, 3]", r"line 2: expected an object"),
    ("7", r"line 2: expected an object"),
    ('{"messages": []}', r"line 2: expected a list of messages"),
    (json.dumps({"messages": talk(system="s")}), r"line 2: a system message alone is no conversation"),
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
from minigpt.engine.dataset_readers import load_chats, load_text
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
