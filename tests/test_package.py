"""The package as a whole: versions, README, what an import costs, what ships."""
import configparser
import subprocess
import sys
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
    code = ("import sys; sys.argv = ['minigpt', '--help']\nfrom minigpt.cli import main\n"
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
    import ast
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
