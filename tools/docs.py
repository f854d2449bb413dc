"""Build the docs site into _docs/: the notebooks with their saved outputs, the pages of nbs/, and the reference.

    python tools/docs.py     build; what is wrong, such as a broken link, is listed and is exit code 1

nbdev prepares the notebooks (proc_nbs), smalldocs renders them and writes the reference from the package's docstrings;
nothing is run. What smalldocs would fetch from elsewhere is replaced, so that the site works from a folder: formulas
become MathML, fonts are those of the reader's system. For readers who hear or type each picture has a text alternative,
and what folds the side bar is a button.
"""
import html
import json
import re
import shutil
import sys
from configparser import ConfigParser
from contextlib import chdir
from pathlib import Path

from latex2mathml.converter import convert
from nbdev.serve import proc_nbs
from notebooks import ROOT, kind_of, notebooks, title_of
from smalldocs.config import load
from smalldocs.site import Page, Site

sys.path.insert(0, str(ROOT))
from minigpt.web import write_page  # noqa: E402

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
FRAME = '<iframe src="try/index.html" title="Chat with minigpt" style="width: 100%; height: 36em; border: 0"></iframe>'
CHAT_HERE = f"""<p><button class="btn btn-primary" onclick="this.outerHTML = '{html.escape(FRAME)}'">Chat here</button></p>
"""


class Pages(Site):
    r"""smalldocs' site, whose formulas (\(...\) and \[...\], which it leaves to KaTeX) are MathML."""

    def render_page(self, page: Page) -> None:
        def formula(match: re.Match) -> str:
            display = "block" if match[1] == "display" else "inline"
            return f'<span class="math {match[1]}">{convert(html.unescape(match[2]), display=display)}</span>'
        super().render_page(page)
        page.html = re.sub(r'(?s)<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, page.html)
        page.env["math"] = False


def describe_pictures(text: str) -> str:
    """A notebook whose pictures have the captions and text alternatives that their cells' metadata name."""
    nb = json.loads(text)
    for cell in nb["cells"]:
        said = {key: value for key, value in cell["metadata"].items() if key in ("fig-cap", "fig-alt")}
        options = [f"#| {key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in said.items()]
        cell["source"] = "".join([*options, "#| fig-align: left\n" * bool(said), *cell["source"]])
    return json.dumps(nb, ensure_ascii=False)


def prepare() -> Path:
    """The folder from which smalldocs renders: what nbdev makes of nbs/. 00_bpe.ipynb becomes bpe.ipynb: as with
    nbdev-docs, the address of a page has no number."""
    with chdir(ROOT):
        folder = Path(proc_nbs(n_workers=0, force=True))
    for path in [p for p in folder.rglob("*") if p.suffix in (".ipynb", ".md")]:
        text = path.read_text(encoding="utf-8").replace(BADGE, "/colab-badge.svg")
        path.unlink()
        text = re.sub(r"(\]\((?:\.\./)*)\d\d_(\w+\.ipynb)", r"\1\2", text)
        text = describe_pictures(text) if path.suffix == ".ipynb" else text
        path.with_name(re.sub(r"^\d\d_", "", path.name)).write_text(text, encoding="utf-8")
    config = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    for path in notebooks():
        if kind_of(path) == "lesson":       # in the sidebar by number and title
            entry = {"text": f"{path.name[:2]} {title_of(path)[0]}", "href": path.name[3:]}
            config = config.replace(path.name, json.dumps(entry, ensure_ascii=False))
    (folder / "_quarto.yml").write_text(config, encoding="utf-8")
    return folder


def add_chat(target: Path) -> None:
    """The chat page with the shipped model at try/ (lesson 14). The link to it on the home page, which names the site's
    address so that it works in README.md as well, becomes a relative one, and a button opens the chat in its place."""
    write_page(target / "try")
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    link = f'href="{config["DEFAULT"]["doc_url"]}/try/index.html"'
    home = target / "index.html"
    before, found, after = home.read_text(encoding="utf-8").partition(link)
    rest, end, after = after.partition("</p>")
    assert found and end, f"nbs/index.ipynb has no paragraph with {link}"
    home.write_text(f'{before}href="try/index.html"{rest}{end}\n{CHAT_HERE}{after}', encoding="utf-8")


# smalldocs' search takes a query as one fuzzy phrase: "lora rank" found no lesson. Here all words must be there, and what
# one looks up (the reference, the engine room, tables) comes after what one reads.
SEARCH = {"threshold: 0.3,": "threshold: 0.1, useExtendedSearch: true,",
          "fuse.search(q, { limit }).map((h) => h.item)":
          "fuse.search(q).map((h) => h.item).sort((a, b) => late(a) - late(b)).slice(0, limit)",
          "let index = null,": "const late = (e) => /^(api|engine|benchmarks|exactness)/.test(e.href);\n  let index = null,"}


def mend_search(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    for old, new in SEARCH.items():
        assert old in text, f"smalldocs.js has changed: {old}"
        text = text.replace(old, new)
    script.write_text(text, encoding="utf-8")


def build(target: Path = ROOT / "_docs") -> list[str]:
    """Render the site into `target`; what smalldocs has to say against it."""
    folder = prepare()
    site = Pages(load(folder), quiet=True)
    site.build()
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(folder / "_docs", target)
    shutil.rmtree(folder)
    add_chat(target)
    mend_search(target / "site_libs" / "smalldocs.js")
    for path in target.rglob("*.html"):      # an icon in a named link is no picture; what folds a section is a button
        text = path.read_text(encoding="utf-8").replace(' role="img"></i>', ' aria-hidden="true"></i>')
        text = re.sub(r'(data-bs-target="(#[\w-]+)") role="navigation"', r'\1 href="\2" role="button"', text)
        path.write_text(text, encoding="utf-8")
    for path in target.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"@import url\([\"']?https?:[^)]*\);", "", text), encoding="utf-8")
    return [said for said in site.warnings if "output-file" not in said]  # which nbdev writes for Quarto


if __name__ == "__main__":
    wrong = build()
    print(*wrong, f"{len(wrong)} warnings", sep="\n")
    sys.exit(bool(wrong))
