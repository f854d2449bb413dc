"""The notebooks are the source: in step with the package, clean, fresh, and each runs from its first cell to its last,
in an empty folder and from the installed wheel alone, with its exercises unsolved and then solved."""
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import notebooks as tool  # noqa: E402

EVERY = [pytest.param(path, id=path.stem) for path in tool.notebooks()]
CHAPTERS = [pytest.param(path, id=path.stem) for path in tool.notebooks() if path.stem != "index"]


def test_package_is_what_the_notebooks_export():
    assert tool.out_of_step() == [], "run: python tools/notebooks.py export"


@pytest.mark.parametrize("path", EVERY)
def test_clean_and_stamped(path):
    assert tool.is_clean(path), f"run: python tools/notebooks.py run {path.stem}"
    assert tool.is_stamped(path), f"outputs are older than the code: python tools/notebooks.py run {path.stem}"


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A folder in which the wheel is installed, and nothing else: no repository beside it."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder,
                    wheel], check=True)
    return folder


@pytest.mark.parametrize("path", EVERY)
def test_runs_and_saved_outputs_are_true(path, installed):
    """One run of each notebook: its outputs are those saved, its exercises wait to be solved, and their solutions
    are right by their own checks."""
    saved = tool.read(path)
    waiting = tool.exercises(saved)
    where = "import minigpt\nprint(minigpt.__file__)"
    fresh = tool.execute(path, package=installed, more=[*tool.solved_cells(waiting), where])
    count = len(saved["cells"])
    found = tool.differences(saved, fresh)
    assert not found, "\n\n".join(found)
    *solved, imported = fresh["cells"][count:]
    assert Path(tool.printed(imported).strip()).is_relative_to(installed), "the notebook ran from the repository"
    for now, exercise in zip(tool.exercises({"cells": fresh["cells"][:count]}), waiting):
        assert now.said == exercise.said
    for cell, exercise in zip(solved, waiting, strict=True):
        assert tool.printed(cell).strip() == f"exercise {exercise.number}: correct"


@pytest.mark.parametrize("path", CHAPTERS)
def test_exercises_are_three_to_five_and_unsolved(path):
    found = tool.exercises(tool.read(path))
    number = path.stem.partition("_")[0]
    assert 3 <= len(found) <= 5
    assert [e.number for e in found] == [f"{number}.{k}" for k in range(1, len(found) + 1)]
    for exercise in found:
        assert exercise.said.startswith(f"exercise {exercise.number}: not solved yet"), exercise.said
        assert "..." in exercise.unsolved or "None" in exercise.unsolved


@pytest.mark.parametrize("source, said", [
    ("# exercise 00.1\nx = ...\n", "a check and a markdown cell"),
])
def test_an_exercise_without_its_parts_is_told(source, said):
    nb = {"cells": [{"cell_type": "code", "source": source, "outputs": []},
                    {"cell_type": "markdown", "source": "no solution"}]}
    with pytest.raises(ValueError, match=said):
        tool.exercises(nb)


def test_a_wrong_solution_is_not_correct(tmp_path):
    """What the test above relies on: the same machinery calls a wrong answer wrong."""
    cells = [("code", "# exercise 09.1\ndef double(x):\n    ...\n"),
             ("code", "def check():\n    return 'correct' if double(2) == 4 else f'got {double(2)}'\n\n"
                      "print('exercise 09.1:', check())"),
             ("markdown", "<details><summary>Solution</summary>\n\n```python\ndef double(x):\n    return 3 * x\n```\n"
                          "</details>")]
    path = tmp_path / "wrong.ipynb"
    tool.write(path, {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [
        {"cell_type": kind, "id": f"c{i}", "metadata": {}, "source": text}
        | ({"outputs": [], "execution_count": None} if kind == "code" else {}) for i, (kind, text) in enumerate(cells)]})
    fresh = tool.execute(path, more=tool.solved_cells(tool.exercises(tool.read(path))))
    assert [tool.printed(fresh["cells"][i]).strip() for i in (1, 3)] == [
        "exercise 09.1: got None", "exercise 09.1: got 6"]


def test_a_changed_module_makes_outputs_stale():
    nb = tool.read(tool.notebooks()[1])
    before = tool.fingerprint(nb)
    code = next(c for c in nb["cells"] if c["cell_type"] == "code")
    code["source"] = [*code["source"], "\n1 + 1"]
    assert tool.fingerprint(nb) != before


@pytest.mark.parametrize("path", CHAPTERS)
def test_opens_in_colab_and_installs_itself(path):
    cells = tool.read(path)["cells"]
    badge = f"https://colab.research.google.com/github/minigpt/minigpt/blob/main/nbs/{path.name}"
    assert any(badge in tool.source(cell) for cell in cells[:3]), "no Open in Colab badge at the top"
    first = tool.source(next(cell for cell in cells if cell["cell_type"] == "code"))
    assert 'find_spec("minigpt") is None' in first and "%pip install -q minigpt" in first


@pytest.mark.parametrize("a, b, same", [
    ("loss 1.234", "loss 1.235", True), ("loss 1.2", "loss 1.5", False), ("7 tokens", "8 tokens", False),
    ("a 1.0", "b 1.0", False), ("1,000 ids", "1,000 ids", True)])
def test_texts_are_compared_up_to_rounding(a, b, same):
    assert tool.same_text(a, b) is same


@pytest.mark.parametrize("seconds, words", [
    (None, "-"), (0.2, "5 s"), (25.0, "25 s"), (25.1, "30 s"), (57, "1 min"), (71, "1 min 15 s")])
def test_minutes_in_words(seconds, words):
    assert tool.in_words(seconds) == words
