"""Export, run, check and look into the notebooks: everything that has to stay in step with them.

    python tools/notebooks.py export [NAME ...]    notebooks -> minigpt/*.py (all of them: also minigpt/_modidx.py), and their
                                                   texts -> minigpt/assets/course/
    python tools/notebooks.py run [NAME ...]       run in a fresh kernel, save clean outputs, stamp them
    python tools/notebooks.py check [NAME ...]     in step? clean? outputs fresh? (what tests/test_notebooks.py asserts)
    python tools/notebooks.py png NAME FOLDER      write the saved pictures of a notebook into FOLDER
    python tools/notebooks.py readme               write README.md from nbs/index.ipynb

NAME is a notebook of nbs/ without its ending (00_bpe); none means all.
"""
from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import course

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "minigpt"
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
WIDGET = "application/vnd.jupyter.widget-view+json"
VARIES = "# output varies"
# nbdev appends to a notebook's second module (`#| exports cli`) at every export; here each one is written anew.
EXPORT = """
import sys
from nbdev.doclinks import _build_modidx
from nbdev.export import nb_export
from nbdev.maker import ModuleMaker
for path in sys.argv[2:]:
    nb_export(path, "minigpt", mod_maker=lambda **kw: ModuleMaker(**kw | {"is_new": True}))
if int(sys.argv[1]):
    _build_modidx()
"""


def notebooks(names: list[str] | None = None) -> list[Path]:
    """The notebooks of nbs/ in their order (all, or those named); ValueError for an unknown name."""
    every = sorted(NBS.glob("*.ipynb"), key=lambda p: (p.stem != "index", p.stem))
    if not names:
        return every
    known = {p.stem: p for p in every}
    for name in names:
        if name not in known:
            raise ValueError(f"no notebook {name!r} in nbs/; there are: {', '.join(known)}")
    return [known[name] for name in names]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


# ------------------------------------------------------------------ export

def export(paths: list[Path], root: Path = ROOT, index: bool = True) -> None:
    """Export notebooks into `root`/minigpt, in a process of its own (nbdev reads the settings.ini of its folder)."""
    subprocess.run([sys.executable, "-c", EXPORT, str(int(index)), *map(str, paths)], cwd=root, check=True)


def out_of_step() -> list[str]:
    """The modules that differ from what the notebooks export (names in minigpt/), by a fresh export elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copy(ROOT / "settings.ini", root)
        shutil.copytree(NBS, root / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        (root / "minigpt").mkdir()
        (root / "minigpt" / "__init__.py").touch()
        export(sorted((root / "nbs").glob("*.ipynb")), root)
        made = {p.name: p.read_text(encoding="utf-8") for p in (root / "minigpt").glob("*.py")}
    here = {p.name: p.read_text(encoding="utf-8") for p in LIB.glob("*.py")}
    return sorted(name for name in made.keys() | here.keys() if made.get(name) != here.get(name))


# ------------------------------------------------------------------ clean

def cleaned(nb: dict) -> dict:
    """The notebook as nbdev_clean leaves it, without widget ids and standard error."""
    from execnb.nbio import dict2nb, nb2dict
    from nbdev.clean import clean_nb
    nb = json.loads(json.dumps(nb))
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
        for output in outputs:
            output.get("data", {}).pop(WIDGET, None)
        if "outputs" in cell:
            cell["outputs"] = [o for o in outputs if o.get("data") != {}]
    stamp = nb["metadata"].get("minigpt")
    nb = dict2nb(nb)
    clean_nb(nb, allowed_metadata_keys=["minigpt"])
    nb = nb2dict(nb)
    if stamp:
        nb["metadata"]["minigpt"] = stamp
    return nb


def write(path: Path, nb: dict) -> None:
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def is_clean(path: Path) -> bool:
    return cleaned(read(path)) == read(path)


# ------------------------------------------------------------------ stamp

def _imports(code: str) -> set[str]:
    """Modules of minigpt that a piece of code imports, by its text; lines of IPython's own (%pip) are left out."""
    code = re.sub(r"(?m)^(\s*)(%\w|!\w).*$", r"\1pass", code)
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "minigpt"}
        elif isinstance(node, ast.ImportFrom):
            module = ("minigpt." * bool(node.level) + (node.module or "")).rstrip(".")
            if module.split(".")[0] == "minigpt":
                found |= {module} | {f"{module}.{a.name}" for a in node.names}
    return {name.split(".")[1] if "." in name else "__init__" for name in found}


def fingerprint(nb: dict) -> str:
    """Hash of what a notebook's outputs are made from: its code, the modules that it imports, and the assets."""
    code = [source(c) for c in nb["cells"] if c["cell_type"] == "code"]
    todo, seen = {"__init__"}, {}
    for cell in code:
        todo |= _imports(cell)
    while todo:
        name = todo.pop()
        path = LIB / f"{name}.py"
        if name not in seen and path.exists():
            seen[name] = path.read_text(encoding="utf-8")
            todo |= _imports(seen[name])
    digest = hashlib.sha256(json.dumps([code, sorted(seen.items())]).encode())
    corpus = "#| default_exp rag" in "\n".join(code)  # only chapter 09 reads the notebooks' texts
    for path in sorted(p for p in (LIB / "assets").rglob("*") if p.is_file()):
        if path.parent.name == "course" and not corpus:
            continue
        data = path.read_bytes()
        if path.suffix not in {".safetensors", ".bin"}:
            data = data.replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(LIB).as_posix()} {hashlib.sha256(data).hexdigest()}".encode())
    return digest.hexdigest()[:16]


def this_platform() -> str:
    return f"{sys.platform} {platform.machine()}"


def is_stamped(path: Path) -> bool:
    nb = read(path)
    return nb["metadata"].get("minigpt", {}).get("sources") == fingerprint(nb)


# ------------------------------------------------------------------ run

def execute(path: Path, timeout: int = 600) -> dict:
    """Run a notebook in a fresh kernel, in an empty folder, offline; its cleaned copy with outputs."""
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    env = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1",
           "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
    if os.environ.get("MINIGPT_NO_REPO"):  # the installed package alone
        del env["PYTHONPATH"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        client = NotebookClient(nb, timeout=timeout, kernel_name="python3", store_widget_state=False,
                                coalesce_streams=True, resources={"metadata": {"path": folder}})
        client.execute(env=os.environ | env)
    return cleaned(json.loads(nbformat.writes(nb)))


def run(path: Path) -> float:
    """Run a notebook, save its outputs and stamp; seconds it took."""
    start = time.perf_counter()
    nb = execute(path)
    nb["metadata"]["minigpt"] = {"sources": fingerprint(nb), "platform": this_platform()}
    write(path, cleaned(nb))
    return time.perf_counter() - start


# ------------------------------------------------------------------ compare

def _kinds(cell: dict) -> list:
    return [(o["output_type"], sorted(o.get("data", {})), o.get("name")) for o in cell.get("outputs", [])]


def _texts(cell: dict) -> str:
    parts = []
    for o in cell.get("outputs", []):
        data = o.get("data", {})
        text = o.get("text") or data.get("text/html") or data.get("text/markdown") or data.get("text/plain") or ""
        if not any(kind.startswith("image/") for kind in data):
            parts.append("".join(text))
    return "\n".join(parts)


def same_text(a: str, b: str, tolerance: float = 0.05) -> bool:
    """Equal but for numbers, and those within `tolerance` (processors round differently); whole numbers exactly."""
    if NUMBER.split(a) != NUMBER.split(b):
        return False
    for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)):
        u, v = float(x.replace(",", "") or 0), float(y.replace(",", "") or 0)
        if "." not in x and "e" not in x.lower():
            if u != v:
                return False
        elif abs(u - v) > tolerance * max(abs(u), abs(v)) + 1e-3:
            return False
    return True


def differences(saved: dict, fresh: dict) -> list[str]:
    """What differs between saved and fresh outputs: kinds always, texts on the platform that made the saved ones."""
    strict = saved["metadata"].get("minigpt", {}).get("platform") == this_platform()
    found = []
    for old, new in zip(saved["cells"], fresh["cells"]):
        if old["cell_type"] != "code":
            continue
        first = source(old).strip().split("\n")[0][:60]
        if _kinds(old) != _kinds(new):
            found.append(f"cell {old['id']} ({first}): kinds {_kinds(old)} saved, {_kinds(new)} now")
        elif strict and VARIES not in source(old) and not same_text(_texts(old), _texts(new)):
            found.append(f"cell {old['id']} ({first}): saved\n{_texts(old)}\nnow\n{_texts(new)}")
    return found


# ------------------------------------------------------------------ pictures

def pictures(path: Path, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for i, cell in enumerate(read(path)["cells"]):
        for j, output in enumerate(cell.get("outputs", [])):
            if "image/png" in output.get("data", {}):
                target = folder / f"{path.stem}-{i:03d}-{j}.png"
                target.write_bytes(base64.b64decode("".join(output["data"]["image/png"])))
                made.append(target)
    return made


# ------------------------------------------------------------------ README.md

def readme() -> str:
    """README.md as nbs/index.ipynb gives it: its texts, its code cells and their printed outputs; exported cells and
    those marked `#| hide` stay out, links to notebooks lead into nbs/."""
    parts = []
    for cell in read(NBS / "index.ipynb")["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?!https?:|#)([^)]+\.ipynb)", r"](nbs/\1", text))
        elif not re.match(r"\s*#\|\s*(exports|hide|default_exp)", text):
            shown = "\n".join(line for line in text.splitlines() if line != VARIES)
            parts.append(f"```python\n{shown.strip()}\n```")
            printed = _texts(cell).strip()
            if printed:
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["export", "run", "check", "png", "readme"])
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    try:
        if args.what == "png":
            print(*pictures(notebooks(args.names[:1])[0], Path(args.names[1])), sep="\n")
            return 0
        if args.what == "readme":
            (ROOT / "README.md").write_text(readme(), encoding="utf-8", newline="\n")
            return 0
        paths = notebooks(args.names)
    except ValueError as error:
        parser.error(str(error))
    if args.what == "export":
        export(paths, index=not args.names)
        course.write()
        return 0
    if args.what == "run":
        for path in paths:
            print(f"{path.stem}: {run(path):.0f} s", flush=True)
        return 0
    bad = [f"{name} differs from its notebook: export again" for name in out_of_step()]
    if readme() != (ROOT / "README.md").read_text(encoding="utf-8"):
        bad.append("README.md differs from nbs/index.ipynb: python tools/notebooks.py readme")
    bad += [f"assets/course/{name} differs from nbs/: export again" for name in course.out_of_step()]
    for path in paths:
        if not is_clean(path):
            bad.append(f"{path.stem} is not clean: run it again")
        if not is_stamped(path):
            bad.append(f"{path.stem} has stale outputs: run it again")
    print("\n".join(bad) or "all in step")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
