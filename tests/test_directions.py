"""Imports point backwards, in modules and in the cells of notebooks, all read from their text.

The order of the lessons is the order of the numbers in their files' names. A lesson imports earlier lessons; deeper and
engine modules import lessons and engine modules below them; `engine.cli` is the last of all.
"""
import ast
import json
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import minigpt

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "minigpt"


def cells(path: Path) -> list[str]:
    """The code cells of a notebook, IPython's own lines (%pip, !ls) replaced by `pass`."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ("".join(cell["source"]) for cell in found if cell["cell_type"] == "code")
    return [re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", text) for text in code]


def module_of(path: Path) -> str | None:
    """The module that a notebook exports, without the package's name."""
    named = re.search(r"(?m)^#\|\s*default_exp\s+(\S+)", "\n".join(cells(path)))
    return named[1] if named else None


NOTEBOOKS = {path.relative_to(NBS).with_suffix("").as_posix(): path for path in sorted(NBS.rglob("*.ipynb"))
             if ".ipynb_checkpoints" not in path.parts}
LESSONS = {name: int(name[:2]) for name in NOTEBOOKS if re.match(r"\d\d_", name)}
NUMBER = {module_of(NOTEBOOKS[name]): number for name, number in LESSONS.items()}
MODULES = {".".join(path.relative_to(LIB).with_suffix("").parts): path for path in sorted(LIB.rglob("*.py"))
           if path.stem not in ("__init__", "_modidx") or path.parent == LIB and path.stem == "__init__"}


def home(module: str, name: str | None = None) -> str:
    """The module, without the package's name, from which `from module import name` takes something."""
    inside = module.removeprefix("minigpt").lstrip(".")
    if name and (under := f"{inside}.{name}".lstrip(".")) in MODULES:
        return under
    if not inside and name in minigpt._HOMES:
        return minigpt._HOMES[name]
    return inside or "__init__"


def imports(code: str, package: str = "minigpt") -> list[tuple[str, bool]]:
    """(module of ours, whether it is imported as soon as the code is) of each import in it.

    package: that of the code, for relative imports. Counted are also `importlib.import_module("minigpt.x")` and
    `minigpt.Name` with the module that the name comes from.
    """
    tree, found = ast.parse(code), []
    later = {id(inner) for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
             for inner in ast.walk(node)}
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Import):
            targets = [home(a.name) for a in node.names if a.name.split(".")[0] == "minigpt"]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            if module.split(".")[0] == "minigpt":
                targets = [home(module, a.name) for a in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "minigpt":
            targets = [minigpt._HOMES[node.attr]] if node.attr in minigpt._HOMES else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            targets = [home(name)] if name.startswith("minigpt") else []
        found += [(target, id(node) not in later) for target in targets]
    return found


def package_of(module: str) -> str:
    return ".".join(["minigpt", *module.split(".")[:-1]])


IMPORTS = {name: imports(path.read_text(encoding="utf-8"), package_of(name)) for name, path in MODULES.items()}


def at_once(module: str) -> set[str]:
    """All modules of ours that are imported when this one is, itself included."""
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [target for target, top in IMPORTS.get(name, []) if top]
    return seen


def later_lessons(module: str, number: int) -> list[str]:
    """Lessons after `number` that come along when a module is imported."""
    return sorted(name for name in at_once(module) if NUMBER.get(name, -1) > number)


# ------------------------------------------------------------------ modules

def test_every_module_is_found_and_known():
    assert {module_of(path) for name, path in NOTEBOOKS.items()} >= set(MODULES) - {"__init__"}
    for name, found in IMPORTS.items():
        assert {target for target, _ in found} <= set(MODULES) | {"engine", "deeper"}, name


def test_no_cycle_of_imports():
    graph = {name: {target for target, top in found if top and target != name} for name, found in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", NUMBER)
def test_a_lesson_imports_earlier_lessons_only(module):
    number = NUMBER[module]
    for target, top in IMPORTS[module]:
        if target != module:
            assert NUMBER.get(target, -1) < number, f"{module} imports {target}, a later lesson"
        assert not (top and target.startswith("deeper")), f"{module} imports {target}, which may be skipped"
    assert later_lessons(module, number) == []


@pytest.mark.parametrize("module", NUMBER)
def test_a_lesson_imports_lessons_at_its_top(module):
    waiting = {target for target, top in IMPORTS[module] if not top and target in NUMBER and target != module}
    assert not waiting, f"{module} imports {waiting} within functions"


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_imports_the_engine_when_it_is_called(name):
    top = {target for target, top in IMPORTS[module_of(NOTEBOOKS[name])] if top}
    assert not [target for target in top if target.startswith(("engine", "deeper"))]


def test_nobody_imports_the_command_line():
    """But the program itself, and the parts that `engine.cli` is made of."""
    users = {name for name, found in IMPORTS.items() if any(target == "engine.cli" for target, _ in found)}
    assert {name for name in users if not name.startswith("engine.cli")} == {"__main__"}


# ------------------------------------------------------------------ notebooks

@pytest.mark.parametrize("name", LESSONS)
def test_the_cells_of_a_lesson_import_what_came_before(name):
    for code in cells(NOTEBOOKS[name]):
        for target, _ in imports(code):
            assert not target.startswith("engine.cli"), code
            assert NUMBER.get(target, -1) <= LESSONS[name], f"{target} is a later lesson:\n{code}"
            assert later_lessons(target, LESSONS[name]) == [], f"{target} imports later lessons:\n{code}"


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name.startswith(("engine/", "deeper/"))])
def test_the_cells_of_other_notebooks_import_no_command_line(name):
    if not (module_of(NOTEBOOKS[name]) or "").startswith(("engine.cli", "__main__")):
        assert not [code for code in cells(NOTEBOOKS[name]) if "engine.cli" in {target for target, _ in imports(code)}]


# ------------------------------------------------------------------ the reader itself

@pytest.mark.parametrize("code, package, want", [
    ("from .bpe import BPETokenizer", "minigpt", [("bpe", True)]),
    ("from ..data import a, b", "minigpt.engine", [("data", True), ("data", True)]),
    ("from . import report", "minigpt.engine", [("engine.report", True)]),
    ("from minigpt import ChatSession, __version__", "minigpt", [("chat", True), ("__init__", True)]),
    ("import minigpt.engine.hub as hub", "minigpt", [("engine.hub", True)]),
    ("def f():\n    from minigpt.rag import RAG", "minigpt", [("rag", False)]),
    ("class A:\n    from minigpt.rag import RAG", "minigpt", [("rag", True)]),
    ("if True:\n    import minigpt.rag", "minigpt", [("rag", True)]),
    ("import minigpt\nx = lambda: minigpt.create_app()", "minigpt", [("__init__", True), ("engine.app", False)]),
    ("importlib.import_module('minigpt.lora')", "minigpt", [("lora", True)]),
    ("import torch\nfrom pathlib import Path", "minigpt", [])])
def test_imports_are_read_from_code(code, package, want):
    assert sorted(imports(code, package)) == sorted(want)


def test_lines_of_ipython_are_left_out(tmp_path):
    text = "if True:\n    %pip install x\n!ls\nfrom minigpt.bpe import x"
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": text.splitlines(keepends=True)}]}))
    [code] = cells(path)
    assert imports(code) == [("bpe", True)] and "%pip" not in code
