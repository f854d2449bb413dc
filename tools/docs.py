"""Build the docs site into _docs/: the notebooks with their saved outputs, the pages of nbs/, and the reference.

    python tools/docs.py       build; what is wrong (broken links, settings that nobody reads) is listed, and is exit code 1

nbdev prepares the notebooks (proc_nbs), smalldocs renders them and writes the reference from the package's docstrings;
nothing is run. What smalldocs would fetch from elsewhere is replaced, so that the site works from a folder: formulas
become MathML, fonts are those of the reader's system.
"""
from __future__ import annotations

import html
import json
import re
import shutil
import sys
from configparser import ConfigParser
from contextlib import chdir
from pathlib import Path

import yaml
from latex2mathml.converter import convert
from nbdev.serve import proc_nbs
from smalldocs.site import build as render

from notebooks import ROOT, notebooks, title_of

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def page_name(name: str) -> str:
    """00_bpe.ipynb becomes bpe.ipynb: as with nbdev_docs, the address of a page has no number."""
    return re.sub(r"^\d+_", "", name)


def config() -> dict:
    """_quarto.yml with what settings.ini knows; lessons stand in the sidebar by number and title."""
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    ini = ini["DEFAULT"]
    text = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    for path in notebooks():
        if number := re.match(r"\d+", path.name):
            entry = {"text": f"{number[0]} {title_of(path)[0]}", "href": page_name(path.name)}
            text = text.replace(path.name, json.dumps(entry, ensure_ascii=False))
    spec = yaml.safe_load(text)
    spec["website"] |= {
        "title": ini["lib_name"], "description": ini["description"], "site-url": ini["doc_url"], "repo-url": ini["git_url"],
        "repo-branch": ini["branch"]}
    spec["website"]["navbar"]["tools"] = [{"icon": "github", "href": ini["git_url"]}]
    spec["smalldocs"] = {"api": {"packages": [ini["lib_name"]], "root": "..", "source": f"{ini['git_url']}/blob/{ini['branch']}"}}
    return spec


def prepare() -> Path:
    """The folder from which smalldocs renders: what nbdev makes of nbs/, by the addresses of the pages."""
    with chdir(ROOT):
        folder = Path(proc_nbs(n_workers=0, force=True))
    for path in [p for p in folder.rglob("*") if p.suffix in (".ipynb", ".md")]:
        text = path.read_text(encoding="utf-8").replace(BADGE, "/colab-badge.svg")
        path.unlink()
        text = re.sub(r"(\]\((?:\.\./)*)\d\d_(\w+\.ipynb)", r"\1\2", text)
        path.with_name(page_name(path.name)).write_text(text, encoding="utf-8")
    (folder / "_quarto.yml").write_text(yaml.safe_dump(config(), allow_unicode=True), encoding="utf-8")
    return folder


def as_mathml(page: str) -> str:
    r"""Formulas, which smalldocs leaves as \(...\) and \[...\] for KaTeX, as MathML; KaTeX's tags go."""
    def formula(match: re.Match) -> str:
        display = "block" if match[1] == "display" else "inline"
        return f'<span class="math {match[1]}">{convert(html.unescape(match[2]), display=display)}</span>'
    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, page, flags=re.S)
    page = re.sub(r'<link[^>]*katex[^>]*>|<script[^>]*src="[^"]*katex[^"]*"[^>]*>\s*</script>', "", page)
    return re.sub(r"<script>(?:(?!</script>).)*(renderMathInElement|katex)(?:(?!</script>).)*</script>", "", page, flags=re.S)


def build(target: Path = ROOT / "_docs") -> list[str]:
    """Render the site into `target`; what smalldocs has to say against it."""
    folder = prepare()
    site = render(folder, quiet=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(folder / "_docs", target)
    shutil.rmtree(folder)
    for path in target.rglob("*.html"):
        path.write_text(as_mathml(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in target.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"@import\s*(?:url\(\s*[\"']?https?:[^)]*\)|[\"']https?:[^\"']*[\"'])[^;]*;", "", text), encoding="utf-8")
    return [said for said in site.warnings if "output-file" not in said]  # which nbdev writes for Quarto


if __name__ == "__main__":
    wrong = build()
    print(*wrong, f"{len(list((ROOT / '_docs').rglob('*.html')))} pages in _docs, {len(wrong)} warnings", sep="\n")
    sys.exit(bool(wrong))
