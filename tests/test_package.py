"""The package as a whole: versions, README, addresses, what an import costs, what ships, the wheel and the sdist."""
import ast
import configparser
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import minigpt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import links  # noqa: E402
import notebooks  # noqa: E402

HEAVY = ("torch", "gradio", "datasets", "matplotlib", "transformers", "ipywidgets", "numpy")


def loaded(code: str) -> set[str]:
    """Which of the heavy packages a fresh process has imported after `code`."""
    code += f"\nimport sys; print('\\n' + ' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(out.stdout.splitlines()[-1].split())


def ini() -> configparser.SectionProxy:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_versions_agree():
    assert minigpt.__version__ == ini()["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = next(line for line in changelog.splitlines() if line.startswith("## "))
    assert latest.split()[1] == minigpt.__version__


def test_ci_runs_the_readmes_test_line():
    lines = [l for l in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "-m pytest" in l]
    assert "pip install -c constraints.txt -e '.[dev]'" in lines[0]
    assert "grep -m 1 -- '-m pytest' README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# ------------------------------------------------------------------ the address and the name

def test_addresses_are_those_of_the_settings():
    for path, text in links.written().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: python tools/links.py"


def test_every_lesson_opens_on_colab():
    """One of its first two cells has the badge, which leads to this very file; a hidden one installs the package."""
    for path in [path for path in notebooks.notebooks() if notebooks.kind_of(path) in ("lesson", "deeper")]:
        cells = [notebooks.source(cell) for cell in notebooks.read(path)["cells"]]
        place = f"/github/minigpt/minigpt/blob/main/{path.relative_to(ROOT).as_posix()})"
        assert any(cell.count("[![Open In Colab]") == 1 and place in cell for cell in cells[:2]), path.name
        install = [cell for cell in cells if 'find_spec("minigpt") is None' in cell]
        assert len(install) == 1 and install[0].startswith("#| hide\n#| eval: false\n"), path.name
        assert install[0].endswith('%pip install -q "minigpt @ git+https://github.com/minigpt/minigpt"'), path.name


def from_an_index(text: str) -> list[str]:
    """Commands in a text that ask a package index for minigpt: on PyPI that is another project."""
    found = []
    for command in re.findall(r"pip3? install[^\n`)&;|]*", text):
        words = re.findall(r"[^\s\"'\\]+", command)
        if any(re.fullmatch(r"minigpt(\[\w+\])?([=<>~!].*)?", word) and after != "@"
               for word, after in zip(words, [*words[1:], ""])):
            found.append(command)
    return found


@pytest.mark.parametrize("text, count", [
    ("%pip install -q minigpt\n", 1), ("/opt/bin/pip install minigpt).", 1), ("pip install 'minigpt[dev]>=0.1' x", 1),
    ('"pip install \\"minigpt==1\\""', 1), ('pip install "minigpt @ git+https://a.b/c"', 0), ("pip install minigpt-x", 0),
    ("pip install dist/minigpt-0.1.0-py3-none-any.whl", 0), ("pip install . && minigpt chat", 0)])
def test_asking_an_index_is_noticed(text, count):
    assert len(from_an_index(text)) == count


def test_nothing_installs_the_other_minigpt():
    if not (ROOT / ".git").exists():
        pytest.skip("which files belong to the repository is known in a clone only")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for path in (ROOT / name for name in names if name and not name.endswith((".safetensors", ".png", "test_package.py"))):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            if path.name == "requirements.txt":
                text = re.sub(r"(?m)^(?!#)", "pip install ", text)
            assert not from_an_index(text), path.relative_to(ROOT)


# ------------------------------------------------------------------ imports

def test_import_alone_is_light():
    assert loaded("import minigpt") == set()


def test_help_imports_nothing_heavy():
    code = ("import sys; sys.argv = ['minigpt', '--help']\nfrom minigpt.engine.cli import main\n"
            "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code")
    assert loaded(code) == set()


@pytest.mark.parametrize("name", minigpt.__all__)
def test_public_names_can_be_imported(name):
    assert getattr(minigpt, name).__module__.startswith("minigpt.")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'gpt5'"):
        minigpt.gpt5


def test_small_samples_stay_small():
    assets = ROOT / "minigpt" / "assets"
    samples = [p for p in assets.rglob("*") if p.is_file() and p.parent.name not in {"minigpt-chat", "gpt2"}]
    samples += [p for p in (ROOT / "tests").rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}]
    assert sum(p.stat().st_size for p in samples) < 4_000_000


def test_modules_hold_no_pickle_no_eval():
    """Untrusted files: weights are safetensors, state files load with weights_only, no code is run from data."""
    for path in sorted((ROOT / "minigpt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {a.name for a in node.names} & {"pickle", "dill", "joblib"}, path.name
            if isinstance(node, ast.Call):
                called = node.func
                name = called.id if isinstance(called, ast.Name) else ""
                assert name not in {"eval", "exec"}, f"{path.name}:{node.lineno}"
                if isinstance(called, ast.Attribute) and called.attr == "load" and ast.unparse(called) == "torch.load":
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert keywords.get("weights_only") == "True", f"{path.name}:{node.lineno}"


# ------------------------------------------------------------------ what the package needs

# Imported only where somebody asks for it, with a message that says what to install; or as a peer, if it is there.
OPTIONAL = {"tiktoken", "openai", "lm_eval", "tensorboard", "pypdf", "transformers", "tokenizers", "sacrebleu", "rouge_score",
            "playwright"}


def sources() -> dict[str, str]:
    """The code of each module and, cell by cell, of each notebook; lines of IPython's own (%pip) are left out."""
    found = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in (ROOT / "minigpt").rglob("*.py")}
    for path in (ROOT / "nbs").rglob("[!.]*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                found[f"{path.name} {cell['id']}"] = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", "".join(cell["source"]))
    return found


def foreign_imports() -> dict[str, set[str]]:
    """Packages that modules and notebooks import: name -> where; "where, later" for an import that is not at the top."""
    found: dict[str, set[str]] = {}
    for place, code in sources().items():
        for node in ast.walk(ast.parse(code)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in (n.split(".")[0] for n in names):
                if name not in sys.stdlib_module_names | {"tomllib", "minigpt"}:  # 3.10 has no tomllib
                    found.setdefault(name, set()).add(place + ", later" * bool(node.col_offset))
    return found


def plain(requirement: str) -> str:
    """The name that a requirement or a constraint begins with, as it is imported."""
    name = re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_")
    return {"markdown_it_py": "markdown_it"}.get(name, name)


def required(kind: str = "requirements") -> list[str]:
    return [plain(requirement) for requirement in ini()[kind].split()]


def test_requirements_are_what_is_imported():
    imports = foreign_imports()
    for name in OPTIONAL & imports.keys():
        assert all(place.endswith(", later") for place in imports[name]), f"{name} is imported at the top of {imports[name]}"
    needed = {name.lower(): where for name, where in imports.items() if name not in OPTIONAL}
    assert needed.keys() == set(required()), {name: needed.get(name) for name in needed.keys() ^ set(required())}


def test_constraints_bound_every_requirement():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    bounds = [line for line in lines if not line.startswith("#")]
    assert sorted(map(plain, bounds)) == sorted(required() + required("dev_requirements"))
    assert all(re.fullmatch(r"[\w-]+<=[\d.]+", bound) for bound in bounds)
    assert "<=2.13" in bounds[list(map(plain, bounds)).index("torch")]


# ------------------------------------------------------------------ distributions

TOP = {"pyproject.toml", "setup.py", "settings.ini", "constraints.txt", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
       "CONTRIBUTING.md"}


def test_distributions_are_small_and_complete(distributions):
    sdist, wheel = distributions
    assert wheel.stat().st_size < 45e6 and sdist.stat().st_size < 45e6
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "minigpt").rglob("*")
            if p.is_file() and "__pycache__" not in p.parts}
    assert "minigpt/py.typed" in here
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packed = {name for name in names if name.startswith("minigpt/")}
    assert packed == here
    assert {name.partition("/")[0] for name in names - packed} == {f"minigpt-{minigpt.__version__}.dist-info"}
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in inside if name.startswith("minigpt.egg-info/")}
    assert inside == here | TOP | made  # no tests: they need the notebooks and the tools


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        place = f"minigpt-{minigpt.__version__}.dist-info"
        meta = HeaderParser().parsestr(archive.read(f"{place}/METADATA").decode())
        entries = configparser.ConfigParser(delimiters=["="])
        entries.read_string(archive.read(f"{place}/entry_points.txt").decode())
        licences = [archive.read(f"{place}/licenses/{name}").decode() for name in meta.get_all("License-File")]
    assert meta["Version"] == minigpt.__version__ and meta["Requires-Python"] == ">=3.10"
    assert meta["License-Expression"] == "MIT" and licences[0].startswith("MIT License")
    assert licences[1].startswith("Modified MIT License\n\nSoftware Copyright (c) 2019 OpenAI\n")
    assert not [c for c in meta.get_all("Classifier") if c.startswith("License ::")]
    assert {"Programming Language :: Python :: 3.10", "Programming Language :: Python :: 3.13", "Typing :: Typed",
            "Development Status :: 3 - Alpha", "Intended Audience :: Education"} <= set(meta.get_all("Classifier"))
    places = dict(line.split(", ") for line in meta.get_all("Project-URL"))
    assert places["Source"] == links.ADDRESS and places.keys() == {"Documentation", "Source", "Issues", "Changelog"}
    assert dict(entries["console_scripts"]) == {"minigpt": "minigpt.engine.cli:main"}
    unconditional = [r for r in meta.get_all("Requires-Dist") if "extra ==" not in r]
    assert len(unconditional) == len(required())
    targets = re.findall(r"\]\(([^)]+)\)", meta.get_payload())
    assert len(targets) > 10 and all(re.match(r"https?://|#", target) for target in targets)


def test_twine_accepts_the_distributions(distributions):
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *distributions], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_chat_from_the_wheel_in_a_fresh_environment(wheel, tmp_path):
    """A new environment with the wheel and its requirements (lent by this one), an empty folder, no network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                               capture_output=True, text=True).stdout.strip())
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel],
                   check=True)
    paths = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "lent.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"),
        "PYTHONSAFEPATH": "1"}
    env.pop("HF_HUB_OFFLINE", None)

    def call(*command) -> str:
        done = subprocess.run(list(map(str, command)), cwd=tmp_path / "empty", env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()
    assert Path(call(python, "-c", "import minigpt; print(minigpt.__file__)")).is_relative_to(site)
    said = call(scripts / "minigpt", "chat", "What is a whale?", "--seed", "1")
    from minigpt.chat import ChatSession
    assert said == ChatSession(seed=1).reply("What is a whale?").strip()
    assert call(scripts / "minigpt", "--version").endswith(minigpt.__version__)
