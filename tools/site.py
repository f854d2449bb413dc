"""Build the docs site into _docs/, without Quarto and without running a notebook.

    python tools/site.py            build
    python tools/site.py --check    build, and fail on a broken link

nbdev prepares the notebooks (their saved outputs are used), smalldocs renders them from _quarto.yml.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def prepare(folder: Path) -> Path:
    """Copy what the site is made from and let nbdev process it; the processed folder."""
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*", "_quarto.yml", "nbdev.yml"))
    shutil.copy(ROOT / "_quarto.yml", folder / "nbs")
    shutil.copytree(ROOT / "minigpt", folder / "minigpt", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    code = ("from nbdev.quarto import refresh_quarto_yml; from nbdev.doclinks import _build_modidx;"
            "from nbdev.serve import proc_nbs;"
            "refresh_quarto_yml(); _build_modidx(); proc_nbs(n_workers=0, force=True)")
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"PYTHONPATH": str(folder)})
    for name in ("styles.css", "favicon.svg"):
        shutil.copy(ROOT / "nbs" / name, folder / "_proc")
    return folder / "_proc"


def rename_pages(folder: Path) -> None:
    """00_bpe.ipynb becomes bpe.ipynb, in links and in the sidebar too; nbdev's `output-file` means the same."""
    pages = {p.name: re.sub(r"^\d+_", "", p.name) for p in folder.glob("*.ipynb")}
    for path in [*folder.glob("*.ipynb"), folder / "_quarto.yml"]:
        text = path.read_text(encoding="utf-8")
        for old, new in pages.items():
            # in page links and the sidebar, but not in addresses of Colab or of the repository
            text = re.sub(rf"(?<![\w/.-]){re.escape(old)}", new, text)
        path.write_text(text, encoding="utf-8")
    for old, new in pages.items():
        nb = json.loads((folder / old).read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            cell["source"] = [l for l in cell["source"] if not l.startswith("output-file:")] \
                if isinstance(cell["source"], list) else re.sub(r"(?m)^output-file:.*\n?", "", cell["source"])
        (folder / old).unlink()
        (folder / new).write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")


def build(target: Path = ROOT / "_docs") -> list[str]:
    """Render the site into `target`; what smalldocs' check has to say about the pages."""
    with tempfile.TemporaryDirectory() as temporary:
        pages = prepare(Path(temporary))
        rename_pages(pages)
        smalldocs = [sys.executable, "-c", "import sys; from smalldocs.cli import main; sys.exit(main())"]
        subprocess.run([*smalldocs, "render", "--quiet", str(pages)], check=True)
        checked = subprocess.run([*smalldocs, "check", str(pages)], capture_output=True, text=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(pages / "_docs", target)
    return [line for line in checked.stdout.splitlines() if "broken link" in line]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail on a broken link")
    args = parser.parse_args()
    broken = build()
    print(f"{len(list((ROOT / '_docs').glob('*.html')))} pages in {ROOT / '_docs'}")
    print(*broken, sep="\n")
    return int(args.check and bool(broken))


if __name__ == "__main__":
    sys.exit(main())
