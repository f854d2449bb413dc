"""The package as a whole: versions, README, what an import costs, what ships, the wheel and the sdist."""
import ast
import configparser
import os
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
import notebooks as tool  # noqa: E402

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


def test_readme_is_the_index_notebook():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == tool.readme(), "python tools/notebooks.py readme"


def test_ci_runs_the_readmes_test_line():
    lines = [l for l in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "-m pytest" in l]
    assert "pip install -e '.[dev]'" in lines[0]
    assert "grep -m 1 -- '-m pytest' README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


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
    for path in sorted((ROOT / "minigpt").glob("*.py")):
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

# Import name -> the requirement that brings it, where the names differ.
BROUGHT_BY = {"huggingface_hub": "huggingface_hub", "IPython": "ipywidgets", "fastapi": "gradio", "starlette": "gradio",
              "uvicorn": "gradio", "pydantic": "gradio"}
# Imported only where somebody asks for it, with a message that says what to install.
OPTIONAL = {"tiktoken", "lm_eval", "tensorboard", "pypdf", "faiss", "sentence_transformers"}


def foreign_imports() -> dict[str, set[str]]:
    """Packages that the modules import: name -> "module" for imports at the top, "module, later" for others."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "minigpt").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in (n.split(".")[0] for n in names):
                if name not in sys.stdlib_module_names | {"tomllib"} and name != "minigpt":  # 3.10 has no tomllib
                    found.setdefault(name, set()).add(path.stem + ", later" * bool(node.col_offset))
    return found


def required() -> set[str]:
    import re
    return {re.match(r"[\w-]+", r)[0].lower().replace("-", "_") for r in ini()["requirements"].split()}


def test_requirements_cover_the_imports():
    for name, where in foreign_imports().items():
        if name in OPTIONAL:
            assert all(place.endswith(", later") for place in where), f"{name} is imported at the top of {where}"
        else:
            assert BROUGHT_BY.get(name, name).lower() in required(), f"{name}, imported by {where}, is not required"


def test_no_requirement_is_idle():
    imported = {BROUGHT_BY.get(name, name).lower() for name in foreign_imports()}
    assert required() <= imported | {"gradio"}


# ------------------------------------------------------------------ distributions

def test_distributions_are_small_and_complete(distributions):
    sdist, wheel = distributions
    assert wheel.stat().st_size < 45e6 and sdist.stat().st_size < 45e6
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "minigpt").rglob("*")
            if p.is_file() and "__pycache__" not in p.parts}
    with zipfile.ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if n.startswith("minigpt/")}
        [metadata] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        meta = HeaderParser().parsestr(archive.read(metadata).decode())
        [entries] = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        assert "minigpt = minigpt.engine.cli:main" in archive.read(entries).decode().replace("=", " = ").replace("  ", " ")
    assert packed == here
    assert meta["Version"] == minigpt.__version__ and meta["Requires-Python"] == ">=3.10"
    unconditional = [r for r in meta.get_all("Requires-Dist") if "extra ==" not in r]
    assert len(unconditional) == len(ini()["requirements"].split())
    with tarfile.open(sdist) as archive:
        inside = {n.partition("/")[2] for n in archive.getnames()}
    assert here | {"setup.py", "settings.ini", "README.md", "LICENSE", "CHANGELOG.md"} <= inside


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
