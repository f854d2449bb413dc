"""Build the docs site into _docs/, without Quarto, without the network and without running a notebook.

    python tools/site.py                   build
    python tools/site.py --check           build, and fail on a broken link
    python tools/site.py --prepare FOLDER  only write the folder that Quarto can render: quarto render FOLDER
    python tools/site.py --links FOLDER    build nothing; fail on a broken link in the pages of FOLDER

The pages are the notebooks with their saved outputs, the Markdown pages of nbs/, and the reference of the public API
(tools/reference.py). smalldocs renders them from _quarto.yml; what it would fetch from elsewhere (web fonts, KaTeX) is
replaced, so that the site works from a folder: formulas become MathML, fonts are those of the reader's system.
"""
from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))
import notebooks as nb_tool  # noqa: E402
import reference  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
STATIC = ("styles.css", "fonts.scss", "favicon.svg", "colab-badge.svg")
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
CODE = re.compile(r"(```.*?```|\[[^\]]*\]\([^)]*\)|<details>.*?</details>)", re.S)


# ------------------------------------------------------------------ preparing the pages

def page_name(name: str) -> str:
    """00_bpe.ipynb becomes bpe.ipynb: the address of a page has no number."""
    return re.sub(r"^\d+_", "", name)


def renamed(text: str) -> str:
    """Links to notebooks by their pages' names, but for those into Colab or the repository."""
    return re.sub(r"(?<![\w/.-])((?:\.\./)?)(\d\d_\w+\.ipynb)", lambda m: m[1] + page_name(m[2]), text)


def without_missing(text: str) -> str:
    """Links to chapters that are not there become plain text."""
    there = {path.name for path in nb_tool.notebooks()}
    return re.sub(r"\[([^\]]+)\]\((\d\d_\w+\.ipynb)(#[\w-]*)?\)",
                  lambda m: m[0] if m[2] in there else m[1], text)


def with_reference(text: str, targets: dict[str, str]) -> str:
    """Names of the package in backticks, linked to the reference; code, links and folded solutions stay as they are."""
    def link(match: re.Match) -> str:
        return f"[{match[0]}](api/{targets[match[1]]})" if match[1] in targets else match[0]
    parts = CODE.split(text)
    parts[::2] = [re.sub(r"(?<!`)`([A-Za-z_]\w*)(?:\(\))?`(?!`)", link, part) for part in parts[::2]]
    return "".join(parts)


def shown_code(text: str, module: str) -> str | None:
    """A code cell as the site shows it; None for one that is only for the export."""
    lines = text.splitlines()
    if not lines or re.match(r"#\|\s*(default_exp|hide)\b", lines[0]):
        return None
    exports = re.match(r"#\|\s*exports\s*(\w*)", lines[0])
    if exports:
        lines[0] = f"# goes into minigpt/{exports[1] or module}.py"
    lines = [line for line in lines if line != nb_tool.VARIES and not line.startswith("#|")]
    return "\n".join(lines).strip("\n") or None


def as_markdown(cell: dict) -> dict:
    """A cell whose HTML outputs are Markdown (a block of raw HTML): for others, Quarto loads scripts from elsewhere."""
    def mended(output: dict) -> dict:
        page = output.get("data", {}).get("text/html")
        return output | {"data": {"text/markdown": ["```{=html}\n", *page, "\n```\n"]}} if page else output
    return cell | {"outputs": [mended(o) for o in cell["outputs"]]} if cell.get("outputs") else cell


def processed(nb: dict, targets: dict[str, str], quarto: bool = False) -> dict:
    """A notebook as a page: title and description in front, directives gone, names linked to the reference."""
    title, about = re.match(r"#\s+(.+)\s+>\s*(.+)\n?", nb_tool.source(nb["cells"][0])).groups()
    front = f"---\ntitle: {json.dumps(title)}\ndescription: {json.dumps(about, ensure_ascii=False)}\n---"
    cells = [{"cell_type": "raw", "id": "page-front", "metadata": {}, "source": front.splitlines(True)}]
    exp = re.search(r"(?m)^#\|\s*default_exp\s+(\w+)", "\n".join(map(nb_tool.source, nb["cells"])))
    for i, cell in enumerate(nb["cells"]):
        text = nb_tool.source(cell)
        if cell["cell_type"] == "code":
            text = shown_code(text, exp[1] if exp else "__init__")
            if text is None:
                continue
        elif cell["cell_type"] == "markdown":
            if i == 0:
                text = re.sub(r"^#.*\n+>.*\n?", "", text, count=1)
            text = with_reference(renamed(text.replace(BADGE, "colab-badge.svg")), targets)
        if text.strip():                  # a list of lines: Quarto loses the ends of lines of a single string
            cells.append((as_markdown(cell) if quarto else cell) | {"source": text.splitlines(True)})
    return nb | {"cells": cells}


def config(pages: set[str], quarto: bool) -> str:
    """_quarto.yml for these pages: chapters by number and title in the sidebar, what isn't there left out."""
    import yaml
    spec = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    titles = {path.name: nb_tool.title_of(path)[0] for path in nb_tool.notebooks()}

    def entries(items: list) -> list:
        kept = []
        for item in items:
            if isinstance(item, dict) and "contents" in item:
                contents = entries(item["contents"])
                kept += [item | {"contents": contents}] if contents else []
                continue
            name = item["href"] if isinstance(item, dict) else item
            if page_name(name) in pages:
                number = re.match(r"\d+", name)
                kept.append({"text": f"{number[0]} {titles[name]}", "href": page_name(name)} if number else item)
        return kept
    if not quarto:       # smalldocs runs nothing, follows the reader's scheme, loads no fonts; as_mathml() does formulas
        html_ = spec["format"]["html"]
        del spec["execute"], html_["html-math-method"], html_["respect-user-color-scheme"]
        html_["theme"] = {mode: names[0] for mode, names in html_["theme"].items()}
    sidebar = spec["website"]["sidebar"]
    sidebar["contents"] = entries(sidebar["contents"])
    return yaml.safe_dump(spec, sort_keys=False, allow_unicode=True)


def prepare(folder: Path, quarto: bool = False) -> None:
    """Write the pages that a renderer (Quarto, or smalldocs) needs into `folder`: notebooks, Markdown, reference,
    _quarto.yml."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = reference.link_targets()
    pages = set()
    for path in nb_tool.notebooks():
        name = page_name(path.name)
        text = json.dumps(processed(nb_tool.read(path), targets, quarto), ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
        pages.add(name)
    for path in sorted(NBS.glob("*.md")):
        text = renamed(without_missing(path.read_text(encoding="utf-8")))
        (folder / path.name).write_text(text, encoding="utf-8")
        pages.add(path.name)
    titles = {path.name: nb_tool.title_of(path)[0] for path in nb_tool.notebooks()}
    (folder / "api").mkdir(exist_ok=True)
    for name, text in reference.pages(titles).items():
        (folder / "api" / name).write_text(renamed(text), encoding="utf-8")
        pages.add(f"api/{name}")
    for name in STATIC:
        shutil.copy(NBS / name, folder)
    (folder / "_quarto.yml").write_text(config(pages, quarto), encoding="utf-8")


# ------------------------------------------------------------------ after rendering

def as_mathml(page: str) -> str:
    r"""Formulas, which smalldocs leaves as \(...\) and \[...\] for KaTeX, as MathML; KaTeX's tags go."""
    from latex2mathml.converter import convert

    def formula(match: re.Match) -> str:
        display = "block" if match[1] == "display" else "inline"
        return f'<span class="math {match[1]}">{convert(html.unescape(match[2]), display=display)}</span>'
    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, page, flags=re.S)
    page = re.sub(r'<link[^>]*katex[^>]*>|<script[^>]*src="[^"]*katex[^"]*"[^>]*>\s*</script>', "", page)
    return re.sub(r"<script>(?:(?!</script>).)*(renderMathInElement|katex)(?:(?!</script>).)*</script>", "", page, flags=re.S)


def finish(folder: Path) -> None:
    """Make rendered pages independent of the network."""
    for path in folder.rglob("*.html"):
        path.write_text(as_mathml(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in folder.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"@import\s*(?:url\(\s*[\"']?https?:[^)]*\)|[\"']https?:[^\"']*[\"'])[^;]*;", "", text), encoding="utf-8")


class Links(HTMLParser):
    """The anchors of a page and what it refers to."""

    def __init__(self):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.ids |= {found[k] for k in ("id", "name") if found.get(k)}
        self.links += [found[k] for k in ("href", "src") if found.get(k)]


def broken_links(folder: Path) -> list[str]:
    """What the pages of a folder refer to and is not there: files, and anchors of pages."""
    seen = {}
    for path in sorted(folder.rglob("*.html")):
        seen[path.resolve()] = Links()
        seen[path.resolve()].feed(path.read_text(encoding="utf-8"))
    found = []
    for path, page in seen.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link in ("#", ""):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            where = path.relative_to(folder.resolve()).as_posix()
            if not target.exists():
                found.append(f"{where}: broken link {link}")
            elif parts.fragment and target in seen and unquote(parts.fragment) not in seen[target].ids:
                found.append(f"{where}: no such anchor {link}")
    return found


def build(target: Path = ROOT / "_docs") -> list[str]:
    """Render the site into `target`; its broken links."""
    with tempfile.TemporaryDirectory() as temporary:
        pages = Path(temporary)
        prepare(pages)
        subprocess.run([sys.executable, "-c", "import sys; from smalldocs.cli import main; sys.exit(main())",
                        "render", "--quiet", str(pages)], check=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(pages / "_docs", target)
    finish(target)
    return broken_links(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail on a broken link")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="only write what Quarto renders")
    parser.add_argument("--links", type=Path, metavar="FOLDER", help="only check the links of its pages")
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare, quarto=True)
        print(f"now: quarto render {args.prepare}")
        return 0
    folder = args.links or ROOT / "_docs"
    broken = broken_links(folder) if args.links else build(folder)
    pages = len(list(folder.rglob("*.html")))
    print(f"{pages} pages in {folder}, {len(broken)} broken links", *broken, sep="\n")
    return int(not pages or bool(broken) and bool(args.check or args.links))


if __name__ == "__main__":
    sys.exit(main())
