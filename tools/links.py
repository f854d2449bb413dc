"""`python tools/links.py` writes from settings.ini what holds the address: badges, install cells, links of pages."""
import re
from configparser import ConfigParser
from pathlib import Path

from notebooks import ROOT, as_text, read, source

config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
ADDRESS, BRANCH = config["DEFAULT"]["git_url"], config["DEFAULT"]["branch"]
COLAB = "https://colab.research.google.com"
LINK = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+(?=/blob/)|(?<=git\+)https://[\w./-]+")
CHAT = re.compile(r"https://[\w./-]+(?=/try/index\.html)")
BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\([^)]*\)")
INSTALL = f'''#| hide
#| eval: false
import importlib.util
if importlib.util.find_spec("minigpt") is None:  # on Colab
    # from its repository: on PyPI the name belongs to another project
    %pip install -q "minigpt @ git+{ADDRESS}"'''


def with_cells(path: Path) -> str:
    """A lesson with its badge, which stands in one of its first two cells, and its install cell for Colab."""
    nb = read(path)
    cells = nb["cells"]
    place = f"{ADDRESS.removeprefix('https://github.com/')}/blob/{BRANCH}/{path.relative_to(ROOT).as_posix()}"
    badge = f"[![Open In Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{place})"
    top = next((c for c in cells[:2] if BADGE.search(source(c))), None)
    if not top:
        cells.insert(1, top := {"cell_type": "markdown", "id": "badge", "metadata": {}, "source": badge})
    code = next((c for c in cells if c["cell_type"] == "code" and 'find_spec("minigpt")' in source(c)), None)
    if not code:
        code = {"cell_type": "code", "execution_count": None, "id": "install", "metadata": {}, "outputs": []}
        cells.insert(2, code)
    top["source"] = BADGE.sub(badge, source(top)).splitlines(keepends=True)
    code["source"] = INSTALL.splitlines(keepends=True)
    return as_text(nb)


def written() -> dict[Path, str]:
    """Each file that holds the address, as it has to be."""
    site = re.sub(r"https://github\.com/[\w.-]+/[\w.-]+", ADDRESS, (ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    site = re.sub(r"(?m)^(  site-url: ).*", rf"\g<1>{config['DEFAULT']['doc_url']}", site)
    pages = [ROOT / "README.md", ROOT / "nbs" / "index.ipynb", *(p for p in ROOT.glob("deploy/**/*") if p.is_file())]
    lessons = [*ROOT.glob("nbs/[0-9]*.ipynb"), *ROOT.glob("nbs/deeper/*.ipynb")]
    texts = {p: CHAT.sub(config["DEFAULT"]["doc_url"], LINK.sub(ADDRESS, p.read_text(encoding="utf-8"))) for p in pages}
    return texts | {ROOT / "_quarto.yml": site} | {
        p: with_cells(p) for p in lessons}


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8", newline="\n")
