"""The course as a whole: the site in a real browser, its pages against what they are made from, the style of chapters."""
import http.server
import importlib.util
import json
import re
import sys
import threading
from pathlib import Path

import pytest
from browsers import BROWSER, launch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import benchmark_page  # noqa: E402
import exactness  # noqa: E402
import notebooks as tool  # noqa: E402
import reference  # noqa: E402
import style  # noqa: E402

CHAPTERS = [pytest.param(p, id=p.stem) for p in tool.notebooks() if p.stem != "index"]


def site_tool():
    """tools/site.py, whose name the standard library has taken."""
    spec = importlib.util.spec_from_file_location("site_tool", ROOT / "tools" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ the index and its map

def test_the_map_is_that_of_the_chapters():
    assert tool.index_with_map() == tool.read(tool.NBS / "index.ipynb"), "python tools/notebooks.py readme"


def test_the_map_has_every_chapter_and_its_time():
    rows = [line.split(" | ") for line in tool.course_map().splitlines()[2:]]
    assert [re.search(r"\((.+)\)", row[0])[1] for row in rows] == [p.name for p in tool.notebooks() if p.stem != "index"]
    measured = json.loads(tool.MINUTES.read_text(encoding="utf-8"))["seconds"]
    for path, row in zip([p for p in tool.notebooks() if p.stem != "index"], rows):
        assert path.stem in measured, f"python tools/notebooks.py run --time {path.stem}"
        assert row[2].removesuffix(" |") == tool.in_words(measured[path.stem])
        assert measured[path.stem] < 90


# ------------------------------------------------------------------ exactness

def test_exactness_page_is_made_from_its_data():
    assert exactness.PAGE.read_text(encoding="utf-8") == exactness.page(), "python tools/exactness.py page"


def test_exactness_table_names_tests_that_exist_and_misses_none():
    rows = json.loads(exactness.DATA.read_text(encoding="utf-8"))["rows"]
    there = set(exactness.ledger_tests())
    assert {row["test"] for row in rows} == there, "python tools/exactness.py run"


def test_every_promise_has_figures_within_their_bounds():
    rows = json.loads(exactness.DATA.read_text(encoding="utf-8"))["rows"]
    for promise, (tests, chapter) in exactness.PROMISES.items():
        if (tool.NBS / f"{chapter}.ipynb").exists():
            found = exactness.proofs(rows, tests)
            assert found, f"no figure for: {promise}"
            for row in found:
                assert row["value"] <= row["bound"], row
    sizes = {row["name"].split()[-1] for row in exactness.proofs(rows, "test_logits_equal_transformers")}
    assert sizes == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
    peers = {row["peer"] for row in exactness.proofs(rows, exactness.PROMISES[next(iter(exactness.PROMISES))][0])}
    assert peers == {"tiktoken", "tokenizers"}


def test_a_ledger_keeps_the_worst_figure(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    row = {"name": "a", "bound": 1, "peer": "torch", "version": "2", "test": "tests/test_gpt2.py::test_x[1-2]"}
    ledger.write_text("".join(json.dumps(row | {"value": v}) + "\n" for v in (0.1, 0.3, 0.2)), encoding="utf-8")
    assert [(r["value"], r["test"]) for r in exactness.read_ledger(ledger)] == [(0.3, "test_gpt2.py::test_x")]


# ------------------------------------------------------------------ benchmarks

def test_benchmark_page_is_made_from_the_kept_results():
    made = benchmark_page.page(benchmark_page.results())
    assert benchmark_page.PAGE.read_text(encoding="utf-8") == made, "python tools/benchmark_page.py"


def test_every_benchmark_script_is_run_and_shown():
    spec = importlib.util.spec_from_file_location("run_all", ROOT / "benchmarks" / "run_all.py")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        run_all = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(run_all)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    assert set(run_all.RUNS) == set(benchmark_page.SPECS)
    run = {command.split()[0] for command in run_all.RUNS.values()}
    there = {p.name for p in (ROOT / "benchmarks").glob("*.py")} - {"_common.py", "_models.py", "run_all.py", "prepare_text.py"}
    assert there <= run | run_all.OTHERS, f"benchmarks/run_all.py leaves out {there - run}"


def test_ratios_of_a_benchmark_by_hand():
    rows = [{"config": "mini", "batch": 1, "engine": "minigpt", "tok_s": 90.0, "min": 80.0, "max": 100.0},
            {"config": "mini", "batch": 1, "engine": "HF generate", "tok_s": 60.0, "min": 50.0, "max": 70.0},
            {"config": "mini", "batch": 8, "engine": "HF generate", "tok_s": 10.0, "min": 9.0, "max": 11.0},
            {"config": "mini", "batch": 1, "engine": "PyTorch sketch", "tok_s": 99.0, "min": 98.0, "max": 100.0}]
    [r] = benchmark_page.ratios("generate", rows)
    assert (r.theirs, r.ratio, r.low, r.high) == ("HF generate", 1.5, 80 / 70, 2.0)
    rows = [{"text": "t", "vocab": 9, "trainer": "minigpt", "s": 4.0, "min": 3.0, "max": 5.0},
            {"text": "t", "vocab": 9, "trainer": "rustbpe", "s": 2.0, "min": 1.0, "max": 3.0}]
    [r] = benchmark_page.ratios("bpe_train", rows)
    assert (r.ratio, r.low, r.high) == (0.5, 0.2, 1.0)
    kept = {"bpe_train": {"date": "2026-01-01", "command": "x", "result": {"rows": rows, "machine": {"torch": "2.0"}}}}
    assert "## Where minigpt loses\n\n|" in benchmark_page.page(kept)


def test_headings_of_the_reference_and_cells_of_the_pages_have_ids_of_their_own(tmp_path):
    for name, text in reference.pages({}).items():
        found = re.findall(r"\{#([^}]+)\}", text)
        assert len(found) == len(set(found)), f"{name}: {sorted(i for i in found if found.count(i) > 1)}"
    site_tool().prepare(tmp_path, quarto=True)               # the folder that Quarto renders
    for path in tmp_path.glob("*.ipynb"):
        found = [cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        assert len(found) == len(set(found)), path.name


# ------------------------------------------------------------------ style

@pytest.mark.parametrize("path", CHAPTERS)
def test_style_of_a_chapter(path):
    found = style.outside(style.counts(tool.read(path)))
    assert not found, f"{found}; python tools/style.py {path.stem}"


def test_style_counts_by_hand():
    def cell(kind, text, **more):
        return {"cell_type": kind, "id": text[:4], "source": text} | more
    picture = {"output_type": "display_data", "data": {"image/png": "x"}}
    nb = {"cells": [cell("markdown", "# Title\n\n> A line of five words"), cell("code", "#| exports\ndef f(x):\n    return x"),
                    cell("code", "assert f(1) == 1\nf(2)", outputs=[picture]),
                    cell("code", "#| exports\ndef g(x):\n    return x"), cell("markdown", "text"),
                    cell("code", "x = 1\n\ny = 2", outputs=[]), cell("code", "y", outputs=[]), cell("code", "assert g(1)", outputs=[]),
                    cell("markdown", "## Recap\n\n- one\n- two\n\n## Next\n\n- three")]}
    found = style.counts(nb)
    assert (found.proved, found.shown, found.pictures, found.recap) == (0.5, 0.5, 1, 2)
    assert found.words_per_line == round((6 + 1 + 5) / 10, 2)
    assert found.longest_open == 2 and len(found.misses) == 2


# ------------------------------------------------------------------ glossary and reference

def test_glossary_is_sorted_and_each_term_is_one_sentence_with_a_link():
    text = (tool.NBS / "glossary.md").read_text(encoding="utf-8")
    entries = re.findall(r"(?m)^\*\*(.+?)\.\*\* (.+) \[(?:Chapter (\d\d)|[\w ]+)\]\((?:(\d\d)_|deeper/)\w+\.ipynb[^)]*\)$", text)
    assert len(entries) == len([line for line in text.splitlines() if line.startswith("**")]) > 100
    terms = [re.sub(r"\W", "", term).lower() for term, *_ in entries]
    assert terms == sorted(terms) and len(set(terms)) == len(terms)
    for term, sentence, chapter, file in entries:
        assert chapter == file and sentence.endswith(".") and ". " not in sentence, term


def test_reference_has_every_public_name():
    import minigpt
    for module in reference.modules():
        made = importlib.import_module(f"minigpt.{module.name}") if module.name != "lm_eval_adapter" else None
        if made is not None:
            assert {n.name for n in module.names} == set(made.__all__), module.name
    assert set(reference.front_door()) == set(minigpt.__all__)


@pytest.mark.parametrize("doc, said", [
    ("One line.", "One line."),
    ("Do it.\n\nsize: how many,\n  and more.\nRaises ValueError.", "Do it.\n\n- `size`: how many, and more.\n\nRaises ValueError."),
    ("k and v (S, D): keys.", "- `k` and `v` (S, D): keys."),
    ("A `name` and x_y.", r"A `name` and x\_y."),
    ("Do it.\n\n\b\nExamples:\n  do it\n  do_it x\n    --as y\n\nAnd more.",
     "Do it.\n\nExamples:\n\n```sh\ndo it\ndo_it x\n  --as y\n```\n\nAnd more."),
    ("Example:\n\n    do it | cat\n\n    do more", "Example:\n\n```sh\ndo it | cat\ndo more\n```")])
def test_docstrings_as_markdown(doc, said):
    assert reference.doc_markdown(doc) == said


# ------------------------------------------------------------------ the site in a browser

needs_smalldocs = pytest.mark.skipif(importlib.util.find_spec("smalldocs") is None, reason="smalldocs needs Python 3.11")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built as `python tools/site.py` does it, and what is broken in it."""
    folder = tmp_path_factory.mktemp("site") / "docs"
    return folder, site_tool().build(folder)


@needs_smalldocs
def test_no_broken_link_and_no_foreign_file(site):
    folder, broken = site
    assert broken == []
    for path in folder.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*?(?:src|href)="(https?:[^"]+)"', path.read_text(encoding="utf-8"))
        assert not loaded, f"{path.name} loads {loaded}"


@needs_smalldocs
def test_every_chapter_is_a_page_with_code_outputs_and_pictures(site):
    folder, _ = site
    for path in tool.notebooks():
        html = (folder / site_tool().page_name(path.name)).with_suffix(".html").read_text(encoding="utf-8")
        pictures = sum("image/png" in o.get("data", {}) for c in tool.read(path)["cells"] for o in c.get("outputs", []))
        assert html.count('src="data:image/png') + len(re.findall(r'<img[^>]+src="[^"]+_files/', html)) >= pictures
        assert not re.search(r'<span class="co">#\| ?(exports|default_exp|hide)', html)
        assert "sourceCode" in html and "cell-output" in html


def test_quarto_gets_the_same_pages(tmp_path):
    """What the workflow hands to Quarto: every chapter in the sidebar, front matter in front, nothing that would run."""
    yaml = pytest.importorskip("yaml")
    tool_ = site_tool()
    tool_.prepare(tmp_path, quarto=True)
    spec = yaml.safe_load((tmp_path / "_quarto.yml").read_text(encoding="utf-8"))
    assert spec["execute"] == {"enabled": False}
    styles = {name for names in spec["format"]["html"]["theme"].values() for name in names if name.endswith(".scss")}
    assert styles and all("$web-font-path" in (tmp_path / name).read_text(encoding="utf-8") for name in styles)
    listed = json.dumps(spec["website"]["sidebar"])
    for path in tool.notebooks():
        name = tool_.page_name(path.name)
        assert name in listed
        cells = json.loads((tmp_path / name).read_text(encoding="utf-8"))["cells"]
        assert cells[0]["cell_type"] == "raw" and "".join(cells[0]["source"]).startswith("---\ntitle: ")
        # of a single string Quarto 1.7 loses the ends of lines; of an HTML output it loads scripts from elsewhere
        assert all(isinstance(cell["source"], list) for cell in cells)
        assert not any("text/html" in out.get("data", {}) for cell in cells for out in cell.get("outputs", []))
    for page in [p.name for p in tool.NBS.glob("*.md")] + ["api/index.md"]:
        assert page in listed


@pytest.fixture(scope="session")
def browser():
    if not BROWSER:
        pytest.skip("no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        opened = launch(p)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **options):
            super().__init__(*args, directory=str(site[0]), **options)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def visit(browser, address, pages, width, scheme):
    """Open pages one after the other: yields (name, page, what went wrong while it loaded)."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(r.url))
    for name in pages:
        page.goto(address + name)
        yield name, page, wrong
    context.close()


BRIGHTNESS = """() => { let e = document.body; const c = getComputedStyle(e).backgroundColor.match(/\\d+/g).map(Number);
    return (c[0] + c[1] + c[2]) / 3; }"""


@needs_smalldocs
@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "dark")])
def test_pages_in_chromium(browser, address, site, width, scheme):
    """No console error, nothing asked of other machines, all pictures there, no sideways scroll, light and dark."""
    pages = sorted(p.relative_to(site[0]).as_posix() for p in site[0].rglob("*.html"))
    assert len(pages) > len(CHAPTERS) + 10
    for name, page, wrong in visit(browser, address, pages, width, scheme):
        assert wrong == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), name
        assert (page.evaluate(BRIGHTNESS) > 200) is (scheme == "light"), name


@needs_smalldocs
def test_search_finds_the_kv_cache(browser, address):
    for _, page, wrong in visit(browser, address, ["index.html"], 1280, "light"):
        page.fill(".smalldocs-search input >> visible=true", "KV cache")
        page.wait_for_selector(".search-result")
        hits = page.eval_on_selector_all(".search-result", "es => es.map(e => [e.getAttribute('href'), e.innerText])")
        assert any(href.endswith("gpt2.html#the-kv-cache") for href, _ in hits), hits
        page.click(".search-result[href$='gpt2.html#the-kv-cache']")
        page.wait_for_url("**/gpt2.html#the-kv-cache")
        assert page.is_visible("#the-kv-cache") and wrong == []


@needs_smalldocs
def test_formulas_are_drawn_and_the_theme_can_be_switched(browser, address):
    for name, page, wrong in visit(browser, address, ["training.html", "evaluation.html"], 1280, "light"):
        before = page.evaluate(BRIGHTNESS)
        formulas = page.eval_on_selector_all("math", "es => es.map(e => e.getBoundingClientRect().width)")
        assert formulas and min(formulas) > 3, name
        assert "\\(" not in page.inner_text("main").replace("\\(?", ""), name
        page.click(".quarto-color-scheme-toggle >> visible=true")
        page.wait_for_function(f"Math.abs(({BRIGHTNESS})() - {before}) > 100")  # the second page is dark from the start
        assert wrong == []
