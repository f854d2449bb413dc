"""`python tools/links.py` writes from settings.ini what holds the address: badges, install cells, links of pages."""
import re
from configparser import ConfigParser
from pathlib import Path

from notebooks import ROOT, kind_of, notebooks

config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
ADDRESS, BRANCH = config["DEFAULT"]["git_url"], config["DEFAULT"]["branch"]
LINK = re.compile(r"(?<=git\+)https://[\w./-]+")
PAGE = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+(?=/blob/)")   # other projects' only in notebooks
CHAT = re.compile(r"https://[\w./-]+(?=/try/index\.html)")
BADGE = re.compile(r"(?<=\(https://colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+/blob/[^)\s]+")


def place(path: Path) -> str:
    """Where Colab finds a notebook."""
    return f"{ADDRESS.removeprefix('https://github.com/')}/blob/{BRANCH}/{path.relative_to(ROOT).as_posix()}"


def written() -> dict[Path, str]:
    """Each file that holds the address, as it has to be."""
    site = re.sub(r"https://github\.com/[\w.-]+/[\w.-]+", ADDRESS, (ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    site = re.sub(r"(?m)^(  site-url: ).*", rf"\g<1>{config['DEFAULT']['doc_url']}", site)
    lessons = [path for path in notebooks() if kind_of(path) in ("lesson", "deeper")]
    pages = [ROOT / "README.md", ROOT / "nbs" / "index.ipynb", *(p for p in ROOT.glob("deploy/**/*") if p.is_file())]
    texts = {p: LINK.sub(ADDRESS, p.read_text(encoding="utf-8")) for p in [*pages, *lessons]}
    return {ROOT / "_quarto.yml": site} | {p: BADGE.sub(place(p), texts[p]) for p in lessons} | {
        p: CHAT.sub(config["DEFAULT"]["doc_url"], PAGE.sub(ADDRESS, texts[p])) for p in pages}


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8", newline="\n")
