"""Run and check the notebooks: what has to stay in step with them, and no command of nbdev looks after.

    python tools/notebooks.py run [NAME ...]     run in a fresh kernel, save clean outputs, stamp them
    python tools/notebooks.py check [NAME ...]   exported? clean? outputs fresh? map and README of today?
    python tools/notebooks.py readme             the map in nbs/index.ipynb anew, then README.md from nbs/index.ipynb
    python tools/notebooks.py course             the lessons' texts anew into assets/course, for `minigpt ask`

NAME is a notebook's path in nbs/ without its ending: 00_bpe, engine/report. `run` without a name takes the stale ones,
with --all every one; --time only notes how long they run with all cores, as a reader's do, for the map.
"""
import argparse
import ast
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
from collections import namedtuple
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "minigpt"
PLATFORM = f"{sys.platform} {platform.machine()}"
VARIES = "# output varies"
# Runs at the start of every Python process that a notebook begins: notes which files of the package it opens.
WATCH = """import os, sys
log = os.open(os.path.join(os.path.dirname(__file__), "opened"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith({home!r}):
            os.write(log, (path + "\\n").encode())
sys.addaudithook(note)
"""


def notebooks(names: list[str] | tuple = ()) -> list[Path]:
    """The index, lessons, deeper and engine notebooks (all, or those named)."""
    every = sorted(NBS.rglob("*.ipynb"), key=lambda p: (p.stem != "index", p.parent != NBS, p))
    known = {name_of(p): p for p in every if not p.parent.name.startswith((".", "_"))}
    for name in names:
        if name not in known:
            raise SystemExit(f"no notebook {name!r} in nbs/; there are: {', '.join(known)}")
    return [known[name] for name in names or known]


def name_of(path: Path) -> str:
    return path.relative_to(NBS).with_suffix("").as_posix()


def kind_of(path: Path) -> str:
    """index, lesson, deeper or engine."""
    return path.parent.name if path.parent != NBS else "index" if path.stem == "index" else "lesson"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def as_text(nb: dict) -> str:
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def write(path: Path, nb: dict) -> None:
    path.write_text(as_text(nb), encoding="utf-8", newline="\n")


def source(cell: dict) -> str:
    return "".join(cell["source"])


def prose_words(text: str) -> int:
    """Words of a Markdown cell, without code blocks, folded solutions and addresses."""
    text = re.sub(r"<details>.*?</details>|```.*?```|\]\([^)]*\)|<[^>]+>", " ", text, flags=re.S)
    return len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text))


def code_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#|")]


def printed(cell: dict) -> str:
    """The text of a cell's outputs, pictures left out."""
    parts = []
    for o in cell.get("outputs", []):
        data = o.get("data", {})
        text = o.get("text") or data.get("text/html") or data.get("text/markdown") or data.get("text/plain") or ""
        if not any(kind.startswith("image/") for kind in data):
            parts.append("".join(text))
    return "\n".join(parts)


def stripped(nb: dict) -> dict:
    """The notebook without what a run leaves besides its results: standard error, and widgets with their random ids."""
    nb = json.loads(json.dumps(nb))
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr" and o.get("data") != {}]
    return nb


def running_code(nb: dict) -> list[str]:
    """The code cells that outputs come from: all but hidden ones that only import, or that are not run (Colab's)."""
    def only_imports(text: str) -> bool:
        body = ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", text)).body
        return "eval: false" in text or all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)
    code = [source(cell) for cell in nb["cells"] if cell["cell_type"] == "code"]
    return [text for text in code if not (re.match(r"#\|\s*hide\b", text) and only_imports(text))]


def fingerprint(nb: dict, used: list[str]) -> str:
    """Hash of the notebook's code and of the files that took part (`/` at the end: all of a folder, but for *.md)."""
    parts = running_code(nb)
    for name in used:
        for path in sorted((LIB / name).glob("*.[!m]*")) if name.endswith("/") else [LIB / name]:
            data = path.read_bytes() if path.exists() else b"gone"
            if path.suffix == ".py":       # its first docstring and nbdev's marks come from titles and names
                data = re.sub(rb'\A""".*?"""|\n# (%%|AUTOGENERATED)[^\n]*', b"", data, flags=re.S)
            parts.append(f"{name} {path.name} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def is_fresh(nb: dict) -> bool:
    stamp = nb["metadata"].get("minigpt", {})
    return "used" in stamp and stamp["sources"] == fingerprint(nb, stamp["used"])


def took_part(opened: list[str], home: Path) -> list[str]:
    """What opened files and listed folders stand for, by their names in the package: a compiled module for its text, a
    file of the shipped model for its folder, as its weights are opened out of Python's sight."""
    found = set()
    for path in map(Path, opened):
        if path.parent.name == "__pycache__":
            path = path.parent.parent / (path.name.partition(".")[0] + ".py")
        path = path.parent if path.parent.name == "minigpt-chat" else path
        if not path.is_dir() or path.is_relative_to(home / "assets"):
            found.add(path.relative_to(home).as_posix() + "/" * path.is_dir())
    return sorted(found)


def execute(path: Path, package: Path | None = None, more: list[str] | tuple = (), *, one_thread: bool = True
            ) -> tuple[dict, list[str]]:
    """Run a notebook in a fresh kernel, in an empty folder, offline: its copy with outputs, and what of the package
    took part, also in programs that it started. On one thread sums, and so trained models, are the same on machines
    of any size.

    package: the folder that holds the package `minigpt` which the notebook shall import; None: this repository.
    more: sources of further cells, run at the end in the same kernel; they are the last cells of the copy.
    """
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    nb.cells += [nbformat.v4.new_code_cell(code) for code in more]
    home = ((package or ROOT) / "minigpt").resolve()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryDirectory() as watching:
        Path(watching, "sitecustomize.py").write_text(WATCH.format(home=str(home) + os.sep), encoding="utf-8")
        env = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONHASHSEED": "0",
               "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join([watching, str(home.parent)]),
               **({"OMP_NUM_THREADS": "1"} if one_thread else {})}
        client = NotebookClient(nb, timeout=600, kernel_name="python3", store_widget_state=False,
                                coalesce_streams=True, resources={"metadata": {"path": folder}})
        client.execute(env=os.environ | env)
        opened = Path(watching, "opened").read_text(encoding="utf-8").splitlines()
    return stripped(json.loads(nbformat.writes(nb))), took_part(opened, home)


def run(path: Path, only_time: bool = False) -> None:
    """Run a notebook, save its outputs and stamp; or only note how long it runs with all cores."""
    start, nb = time.perf_counter(), read(path)
    ran, used = execute(path, one_thread=not only_time)
    seconds, before = round(time.perf_counter() - start), nb["metadata"].get("minigpt", {})
    if only_time:
        nb["metadata"]["minigpt"] = before | {"seconds": seconds}
    else:
        ran["metadata"]["minigpt"] = {"sources": fingerprint(ran, used), "used": used, "platform": PLATFORM,
                                      "seconds": before.get("seconds", seconds)}
    write(path, nb if only_time else ran)
    nbdev(ROOT, f"nbdev_clean({str(path)!r})")
    print(f"{name_of(path)}: {seconds} s", flush=True)


# The deeper notebooks, by the number of the lesson that one has read before them.
DEEPER = {"00": "fast_bpe", "01": "packing curation", "03": "attention_patterns hooks resources", "04": "optimizers distributed",
          "05": "beam_search speculative constrained fast_decoding", "06": "text_metrics human_eval calibration",
          "08": "sft_packing dpo", "09": "quantization", "10": "retrieval", "12": "token_bars", "15": "architecture_ablation"}


def title_of(path: Path) -> tuple[str, str]:
    """The title of a notebook and the line below it, without Markdown's signs."""
    head = [line for line in source(read(path)["cells"][0]).splitlines() if line.strip()]
    return head[0].removeprefix("# ").strip(), head[1].removeprefix("> ").strip().rstrip(".")


def minutes(nb: dict) -> int:
    """How long a notebook takes to read: 200 words or 15 lines of code a minute."""
    texts = {kind: [source(cell) for cell in nb["cells"] if cell["cell_type"] == kind] for kind in ("markdown", "code")}
    return round(sum(map(prose_words, texts["markdown"])) / 200 + sum(len(code_lines(text)) for text in texts["code"]) / 15)


def course_map() -> str:
    """The table of the lessons: title and what it gives (its second line), how long it is to read and to run, and the
    deeper notebooks that go on from there."""
    rows = ["| lesson | to read | to run | deeper, each of which may be skipped |", "|---|---|---|---|"]
    every = {name_of(path): path for path in notebooks()}
    for path in [path for path in every.values() if kind_of(path) == "lesson"]:
        title, about = title_of(path)
        seconds = read(path)["metadata"].get("minigpt", {}).get("seconds")
        names = [f"deeper/{name}" for name in DEEPER.get(path.name[:2], "").split()]
        more = [f"[{title_of(every[name])[0]}]({name}.ipynb) ({minutes(read(every[name]))} min)"
                for name in names if name in every]
        rows.append(f"| [{path.name[:2]} {title}]({path.name}) <br>{about} | {minutes(read(path))} min "
                    f"| {f'{seconds} s' if seconds else '-'} | {'<br>'.join(more)} |")
    return "\n".join(rows)


def index_with_map() -> dict:
    """nbs/index.ipynb, where the map, from its table to the end of its cell, is as the notebooks give it today."""
    nb = read(NBS / "index.ipynb")
    cell = next(cell for cell in nb["cells"] if cell.get("id") == "map")
    cell["source"] = (source(cell).partition("\n|")[0] + "\n" + course_map()).splitlines(keepends=True)
    return nb


def readme() -> str:
    """README.md as nbs/index.ipynb gives it: its texts, its code cells and their printed outputs; exported cells and
    hidden ones stay out, links to notebooks and pages lead into nbs/."""
    parts = []
    for cell in read(NBS / "index.ipynb")["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?!https?:|#)([^)]+\.(?:ipynb|md|png)\b)", r"](nbs/\1", text))
        elif not re.match(r"\s*#\|\s*(export|hide|default_exp)", text):
            shown = "\n".join(line for line in text.splitlines() if line != VARIES)
            parts.append(f"```python\n{shown.strip()}\n```")
            if said := printed(cell).strip():
                parts.append(f"```text\n{said}\n```")
    return "\n\n".join(parts) + "\n"


def write_course(folder: Path = LIB / "assets" / "course") -> None:
    """The Markdown cells of lessons and deeper notebooks, as notebooks. What stands there is a snapshot, cut anew
    on purpose: nothing holds it to the lessons' every word."""
    for old in folder.glob("*.ipynb"):
        old.unlink()
    for path in notebooks():
        if kind_of(path) in ("lesson", "deeper"):
            cells = [cell | {"metadata": {}} for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
            write(folder / path.name, {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


Exercise = namedtuple("Exercise", "number text unsolved checks solution said")  # text: before it; said: by its checks


def exercises(nb: dict) -> list[Exercise]:
    """The exercises of a notebook, in order.

    The form: a code cell that begins with `# exercise NAME.K`, code cells that check it and print `exercise NAME.K: ..`
    (`correct` when solved), then a Markdown cell with a python block in <details>. ValueError where one differs.
    """
    found, cells = [], nb["cells"]
    for i, cell in enumerate(cells):
        number = re.match(r"# exercise (\w+\.\d+)\s*\n", source(cell))
        if cell["cell_type"] != "code" or not number:
            continue
        checks = list(takewhile(lambda after: after["cell_type"] == "code", cells[i + 1:]))
        after = "".join(map(source, cells[i + len(checks) + 1:][:1]))
        folded = re.search(r"<details>.*?```python\n(.*?)```.*?</details>", after, re.S)
        if not checks or not folded:
            raise ValueError(f"exercise {number[1]}: a check and a markdown cell with <details> must follow it")
        found.append(Exercise(number[1], source(cells[i - 1]), source(cell), "\n".join(map(source, checks)), folded[1],
                              "\n".join(map(printed, checks)).strip()))
    return found


def nbdev(folder: Path, *calls: str) -> None:
    """nbdev's own commands, in a process of their own, in the folder whose settings they read."""
    code = "from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; "
    subprocess.run([sys.executable, "-c", code + "; ".join(calls)], cwd=folder, check=True)


def from_nbdev() -> tuple[list[str], list[str]]:
    """Modules that differ from a fresh export, notebooks that nbdev_clean would change, by nbdev's work on a copy."""
    def texts(folder: Path, kind: str) -> dict[str, str]:
        files = [p for p in folder.rglob(kind) if p.parent.name[0] != "."]
        return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in files}
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for file in {"settings.ini", "pyproject.toml"} & set(os.listdir(ROOT)):
            shutil.copy(ROOT / file, copy)
        shutil.copytree(NBS, copy / "nbs", ignore=shutil.ignore_patterns(".*"))
        (copy / "minigpt").mkdir()
        (copy / "minigpt" / "__init__.py").touch()
        nbdev(copy, "nbdev_export()", "nbdev_clean()")
        kinds = {"minigpt": "*.py", "nbs": "*.ipynb"}.items()
        pairs = [(texts(ROOT / folder, kind), texts(copy / folder, kind)) for folder, kind in kinds]
    return tuple(sorted(n for n in here.keys() | made.keys() if here.get(n) != made.get(n)) for here, made in pairs)


def wrong(paths: list[Path]) -> list[str]:
    """What is out of step, each with the command that mends it."""
    modules, dirty = from_nbdev()
    found = [f"minigpt/{name} is not what the notebooks export: nbdev-export, or delete it" for name in modules]
    found += [f"nbs/{name} is not clean: nbdev-clean" for name in dirty]
    if index_with_map() != read(NBS / "index.ipynb") or readme() != (ROOT / "README.md").read_text(encoding="utf-8"):
        found.append("the map in nbs/index.ipynb or README.md is not of today: python tools/notebooks.py readme")
    return found + [f"nbs/{name_of(p)}.ipynb has stale outputs: python tools/notebooks.py run {name_of(p)}"
                    for p in paths if not is_fresh(read(p)) or stripped(read(p)) != read(p)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "check", "readme", "course"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--time", action="store_true", help="note the seconds, on a machine that does nothing else")
    args = parser.parse_args()
    paths = notebooks(args.names)
    if args.what == "check":
        found = wrong(paths)
        print("\n".join(found) or "all in step")
        return bool(found)
    if args.what == "run":
        for path in paths:
            if args.names or args.all or not is_fresh(read(path)):
                run(path, args.time)
    elif args.what == "readme":
        write(NBS / "index.ipynb", index_with_map())
        (ROOT / "README.md").write_text(readme(), encoding="utf-8", newline="\n")
    else:
        write_course()
    return 0


if __name__ == "__main__":
    sys.exit(main())
