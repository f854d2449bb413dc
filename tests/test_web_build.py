"""The built page in the package is what the sources in web/ give, it is small, and it ships."""
import re
import subprocess
import zipfile
from pathlib import Path

from minigpt.engine.files import ASSETS

ROOT = Path(__file__).resolve().parent.parent
BUILT = ASSETS / "web"


def test_the_page_is_what_its_sources_give(web_build):
    subprocess.run(["npm", "run", "build"], cwd=web_build, check=True, stdout=subprocess.DEVNULL, timeout=300)
    made = web_build.parent / "minigpt" / "assets" / "web"
    files = sorted(path.name for path in made.iterdir())
    assert files == sorted(path.name for path in BUILT.iterdir())
    differ = [name for name in files if (made / name).read_bytes() != (BUILT / name).read_bytes()]
    assert not differ, "run `npm ci && npm run build` in web/ and commit minigpt/assets/web"


def test_the_page_is_small():
    sizes = {path.name: path.stat().st_size for path in BUILT.iterdir()}
    assert sum(sizes.values()) <= 500_000, sizes


def test_the_page_asks_nobody_else():
    """All that it loads stands beside it; addresses in its text are links of errors and namespaces, not sources."""
    html = (BUILT / "index.html").read_text(encoding="utf-8")
    assert all(link.startswith(("./", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert "default-src 'self'" in html
    for file in [*BUILT.glob("*.js"), *BUILT.glob("*.css")]:
        hosts = set(re.findall(r"https?://([\w.-]+)", file.read_text(encoding="utf-8")))
        assert hosts <= {"127.0.0.1", "react.dev", "www.w3.org", "github.com"}, file


def test_licences_of_what_is_bundled():
    text = (BUILT / "licenses.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^- (\S+) - ", text, re.M))
    assert {"react", "react-dom", "scheduler", "react-markdown", "remark-gfm", "micromark"} <= names
    assert "Permission is hereby granted" in text and "Meta Platforms" in text and "Titus Wormer" in text


def test_the_page_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist() if name.startswith("minigpt/assets/web/")}
    assert names == {path.name for path in BUILT.iterdir()}
