"""The engine of the web page: tokens per second and time to the first token, in Node and in Chromium; sizes.

  python benchmarks/web.py [--new 64] [--rounds 5] [--question TEXT]
  python benchmarks/web.py --sizes

The built page's engine.js and the shipped model, one thread, greedy. `first_ms` is from a chat prompt, of which nothing is in
the cache, to its first token, `open_s` from the files in memory to a model that can be asked; both are medians. A round of
warming up is not counted. What is not installed (node; Chromium with playwright) has no rows. `--sizes` counts bytes as they
are and as gzip -9 sends them.
"""
from __future__ import annotations

import argparse
import gzip
import json
import shutil
import statistics
import subprocess
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import _common as c

MEASURE = """
function measure(engine, config, vocabulary, weights, { fast, question, count, rounds }) {
  const now = () => performance.now()
  let begun = now()
  const model = new engine.GPT2(config, weights, fast), tokenizer = new engine.Tokenizer(vocabulary)
  const open_s = (now() - begun) / 1000
  const { ids } = engine.prompt(tokenizer, [{ role: "user", content: question }], config.n_positions - count)
  const sampling = { temperature: 0, top_k: 0, top_p: 1, repetition_penalty: 1 }
  const rates = [], firsts = []
  for (let round = 0; round <= rounds; round++) {
    let first = 0, drawn = 0
    begun = now()
    const tokens = engine.answer(model, tokenizer, new engine.KVCache(config), [], ids, sampling, count, Math.random, 5)
    for (const token of tokens) if (token && !drawn++) first = now()
    if (!round) continue
    firsts.push(first - begun)
    rates.push(1000 * (drawn - 1) / (now() - first))
  }
  return { open_s, rates, firsts }
}
"""
NODE = MEASURE + """
import { readFileSync } from "node:fs"
const [folder, asked] = process.argv.slice(2)
const read = name => readFileSync(`${folder}/model/${name}`), json = name => JSON.parse(read(name))
const engine = await import(`file://${folder}/engine.mjs`)
const weights = new Uint8Array(read("model.safetensors")).buffer
console.log(JSON.stringify(measure(engine, json("config.json"), json("tokenizer.json"), weights, JSON.parse(asked))))
"""
CHROMIUM = "async asked => {" + MEASURE + """
  const engine = await import("/engine.js"), get = name => fetch(`/model/${name}`)
  const [config, vocabulary] = [await (await get("config.json")).json(), await (await get("tokenizer.json")).json()]
  return measure(engine, config, vocabulary, await (await get("model.safetensors")).arrayBuffer(), asked)
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def in_node(folder: Path, asked: dict) -> dict:
    (folder / "measure.mjs").write_text(NODE, encoding="utf-8")
    command = ["node", folder / "measure.mjs", folder, json.dumps(asked)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def in_chromium(folder: Path, asked: dict) -> dict:
    from playwright.sync_api import sync_playwright
    (folder / "empty.html").write_text("<!doctype html><title>empty</title>", encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/empty.html")     # not the page, whose own engine would start
            return page.evaluate(CHROMIUM, asked)
    finally:
        server.shutdown()
        server.server_close()


def speeds(folder: Path, asked: dict) -> list[dict]:
    places = {"Node": (in_node, shutil.which("node")),
              "Chromium": (in_chromium, shutil.which("chromium") and find_spec("playwright"))}
    rows = []
    for where, (run, there) in places.items():
        for product, fast in (("WebAssembly", True), ("plain loops", False)) if there else ():
            found = run(folder, asked | {"fast": fast})
            rows.append({"where": where, "product": product, "tok_s": statistics.median(found["rates"]),
                         "min": min(found["rates"]), "max": max(found["rates"]),
                         "first_ms": statistics.median(found["firsts"]), "open_s": found["open_s"]})
    return rows


def sizes(folder: Path) -> list[dict]:
    """Kilobytes of the page's files, and of the model's."""
    groups = {"the page": [path for path in sorted(folder.iterdir()) if path.is_file()],
              "the model": sorted((folder / "model").iterdir())}
    return [{"what": what, "files": len(paths), "kb": sum(path.stat().st_size for path in paths) / 1000,
             "gzip_kb": sum(len(gzip.compress(path.read_bytes(), 9)) for path in paths) / 1000}
            for what, paths in groups.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--question", default="Tell me a long story about a fox and a kite.")
    parser.add_argument("--sizes", action="store_true")
    args = parser.parse_args()
    if c.project() is None:
        return
    from minigpt.web import write_page
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "page")
        write_page(folder)
        if args.sizes:
            c.report("web_sizes", sizes(folder), ["what", "files", "kb", "gzip_kb"])
            return
        shutil.copy(folder / "engine.js", folder / "engine.mjs")
        asked = {"question": args.question, "count": args.new, "rounds": args.rounds}
        c.report("web", speeds(folder, asked), ["where", "product", "tok_s", "min", "max", "first_ms", "open_s"], **asked)


if __name__ == "__main__":
    main()
