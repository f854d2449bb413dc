"""The built page in the package is what the sources in web/ give, it is small, and it ships; `write_page` gives it away."""
import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from minigpt.bpe import BPETokenizer
from minigpt.chat_format import CHAT_TOKENS
from minigpt.engine.files import ASSETS
from minigpt.engine.tokenizer import Tokenizer
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.web import write_page

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


# ------------------------------------------------------------------ lesson 14
def flat(text: str) -> str:
    return " ".join(text.split())


def test_what_the_lesson_quotes_stands_in_the_sources():
    cells = json.loads((ROOT / "nbs" / "14_web.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    quoted = re.findall(r"(?s)```tsx?\n(.*?)```", text)
    sources = [flat(path.read_text(encoding="utf-8")) for path in (ROOT / "web" / "src").rglob("*.ts*")]
    assert len(quoted) >= 5
    assert not [code for code in quoted if not any(flat(code) in source for source in sources)]


def test_write_page_is_the_page_and_the_shipped_model(tmp_path):
    page = tmp_path / "sites" / "page"
    write_page(page)
    wanted = {path.name: path.read_bytes() for path in BUILT.iterdir()} | {
        f"model/{name}": (ASSETS / "minigpt-chat" / name).read_bytes()
        for name in ("config.json", "tokenizer.json", "model.safetensors")}

    def made() -> dict:
        return {path.relative_to(page).as_posix(): path.read_bytes() for path in page.rglob("*") if path.is_file()}
    assert made() == wanted
    (page / "index.html").write_text("mine")
    (page / "notes.txt").write_text("mine, too")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_page(page)
    assert made() == wanted | {"index.html": b"mine", "notes.txt": b"mine, too"}
    write_page(page, overwrite=True)
    assert made() == wanted | {"notes.txt": b"mine, too"}


def save_small(folder: Path, tokenizer: BPETokenizer, **changes) -> GPT2:
    shape = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, **shape | changes)).eval()
    model.save_pretrained(folder, tokenizer)
    return model


def test_write_page_with_a_model_of_ones_own(tmp_path):
    tokenizer = Tokenizer.train(["one two two three three three"] * 9, 264, CHAT_TOKENS)
    model = save_small(tmp_path / "tiny", tokenizer)
    write_page(tmp_path / "page", tmp_path / "tiny")
    there, ids = tmp_path / "page" / "model", torch.tensor([tokenizer.encode_ordinary("two three")])
    apart = (GPT2.from_pretrained(there)(ids) - model(ids)).abs().max()
    assert 0 < apart < 0.02 * model(ids).abs().max()         # int8 rows are almost the same numbers
    assert BPETokenizer.from_pretrained(there).encode_ordinary("two three") == ids[0].tolist()
    header = (there / "model.safetensors").read_bytes()[:4000]
    assert b"minigpt-int8" in header


@pytest.mark.parametrize("changes, special, said", [
    ({"activation": "gelu"}, CHAT_TOKENS, "the exact GELU"),
    ({"n_head": 32}, CHAT_TOKENS, "heads of 1 channels"),
    ({}, CHAT_TOKENS[:1], "marks of a conversation")])
def test_write_page_refuses_what_the_engine_does_not_read(tmp_path, changes, special, said):
    tokenizer = Tokenizer.train(["one two two three three three"] * 9, 264, special)
    save_small(tmp_path / "tiny", tokenizer, **changes)
    with pytest.raises(ValueError, match=said):
        write_page(tmp_path / "page", tmp_path / "tiny")
    assert not (tmp_path / "page").exists()
