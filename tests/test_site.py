"""The course as a whole: the site in a real browser, its pages against what they are made from, the glossary."""
import http.server
import json
import re
import sys
import threading
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pytest
from browsers import BROWSER, contrast, launch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
import notebooks as tool  # noqa: E402
import pages  # noqa: E402
import run_all  # noqa: E402


def figures() -> list[dict]:
    return json.loads(pages.FIGURES.read_text(encoding="utf-8"))["rows"]


# ------------------------------------------------------------------ exactness and benchmarks

def test_pages_are_made_from_their_data():
    for path, text in pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, "python tools/pages.py"


def test_exactness_table_names_tests_that_exist_and_misses_none():
    assert {row["test"] for row in figures()} == pages.ledger_tests(), "see python tools/pages.py"


def test_every_promise_has_figures_within_their_bounds():
    for promise, (tests, notebook) in pages.PROMISES.items():
        found = pages.proofs(figures(), tests)
        assert found and (tool.NBS / f"{notebook}.ipynb").exists(), promise
        assert all(row["value"] <= row["bound"] for row in found), promise
    sizes = {row["name"].split()[-1] for row in pages.proofs(figures(), "test_logits_equal_transformers")}
    assert sizes == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
    ids = pages.proofs(figures(), next(iter(pages.PROMISES.values()))[0])
    assert {row["peer"] for row in ids} == {"tiktoken", "tokenizers"}


def test_a_ledger_keeps_the_worst_figure_and_the_other_tests_keep_theirs(tmp_path, monkeypatch):
    row = {"name": "a", "bound": 1, "peer": "torch", "version": "2", "test": "tests/test_gpt2.py::test_x[1-2]"}
    rows = [row | {"value": value} for value in (0.1, 0.3, 0.2)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    known = [row | {"test": test, "value": 9} for test in ("test_gpt2.py::test_x", "test_y.py::y", "test_z.py::gone")]
    (tmp_path / "figures.json").write_text(json.dumps({"rows": known}), encoding="utf-8")
    monkeypatch.setattr(pages, "FIGURES", tmp_path / "figures.json")
    monkeypatch.setattr(pages, "ledger_tests", lambda: {"test_gpt2.py::test_x", "test_y.py::y"})
    pages.take_over(tmp_path / "ledger.jsonl")
    assert [(r["value"], r["test"]) for r in figures()] == [(0.3, "test_gpt2.py::test_x"), (9, "test_y.py::y")]


def test_every_benchmark_script_is_run():
    run = {one["command"].split()[0] for one in run_all.RUNS.values()}
    there = {p.name for p in (ROOT / "benchmarks").glob("[!_]*.py")} - {"run_all.py", "prepare_text.py"}
    assert there <= run | run_all.OTHERS, f"benchmarks/run_all.py leaves out {there - run}"


def test_a_ratio_lies_within_its_own_spread():
    for name in pages.SPECS:
        if (kept := pages.RESULTS / f"{name}.json").exists():
            for r in pages.ratios(name, json.loads(kept.read_text(encoding="utf-8"))["result"]["rows"]):
                assert r.low - 1e-9 <= r.ratio <= r.high + 1e-9, (name, r)


def test_ratios_of_a_benchmark_by_hand():
    rows = [{"config": "mini", "batch": 1, "engine": "minigpt", "tok_s": 90.0, "min": 80.0, "max": 100.0},
            {"config": "mini", "batch": 1, "engine": "HF generate", "tok_s": 60.0, "min": 50.0, "max": 70.0},
            {"config": "mini", "batch": 8, "engine": "HF generate", "tok_s": 10.0, "min": 9.0, "max": 11.0},
            {"config": "mini", "batch": 1, "engine": "PyTorch sketch", "tok_s": 99.0, "min": 98.0, "max": 100.0}]
    [r] = pages.ratios("generate", rows)
    assert (r.theirs, r.ratio, r.low, r.high) == ("HF generate", 1.5, 80 / 70, 2.0)
    rows = [{"text": "t", "vocab": 9, "trainer": "minigpt", "s": 4.0, "min": 3.0, "max": 5.0},
            {"text": "t", "vocab": 9, "trainer": "rustbpe", "s": 2.0, "min": 1.0, "max": 3.0}]
    [r] = pages.ratios("bpe_train", rows)
    assert [round(x, 9) for x in (r.ratio, r.low, r.high)] == [0.5, 0.2, 1.0]
    kernels = [{"step": "full", "dtype": "fp32", "without": "TanhGELU", "tok_s": 1234.5, "peak_mb": 800, "time": 1.1,
                "min": 1.05, "max": 1.2, "memory": 1.0}]
    kept = {name: {"date": "2026-01-01", "command": "x", "result": {"rows": found, "machine": {"torch": "2.0"}}}
            for name, found in (("bpe_train", rows), ("kernels", kernels))}
    loses = pages.benchmarks(kept).splitlines()[2]
    assert loses == "| Training a tokenizer | t, vocab 9: seconds | minigpt | rustbpe | 0.50 |"
    assert "| full | fp32 | TanhGELU | 1,234 | 800 | 1.1 | 1.05 | 1.2 | 1 |" in pages.benchmarks(kept)


# ------------------------------------------------------------------ glossary

def test_glossary_is_sorted_and_each_term_is_one_sentence_with_a_link():
    text = (tool.NBS / "glossary.md").read_text(encoding="utf-8")
    entries = re.findall(
        r"(?m)^\*\*(.+?)\.\*\* (.+) \[(?:Chapter (\d\d)|[\w ]+)\]\((\d\d|deeper|engine)[_/]\w+\.ipynb[^)]*\)$", text)
    assert len(entries) == len([line for line in text.splitlines() if line.startswith("**")]) > 100
    terms = [re.sub(r"\W", "", term).lower() for term, *_ in entries]
    assert terms == sorted(terms) and len(set(terms)) == len(terms)
    for term, sentence, chapter, file in entries:
        assert chapter == (file if file.isdigit() else "") and sentence.endswith(".") and ". " not in sentence, term


# ------------------------------------------------------------------ the site in a browser

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `python tools/docs.py` does it, and what is wrong with it."""
    pytest.importorskip("smalldocs", reason="smalldocs needs Python 3.11")
    import docs
    folder = tmp_path_factory.mktemp("site") / "docs"
    return folder, docs.build(folder)


def pages_of(folder: Path) -> list[str]:
    """The pages of the site; the chat page in try/ is a program of its own (test_web_page.py)."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    return [name for name in names if not name.startswith("try/")]


@pytest.fixture(scope="module")
def html(site):
    """The text of each page, by its address."""
    return {name: (site[0] / name).read_text(encoding="utf-8") for name in pages_of(site[0])}


def address_of(path: Path) -> str:
    return re.sub(r"(^|/)\d+_", r"\1", tool.name_of(path)) + ".html"


def test_no_broken_link_and_no_foreign_file(site, html):
    assert site[1] == []
    for name, text in html.items():
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*?(?:src|href)="(https?:[^"]+)"', text)
        assert not loaded, f"{name} loads {loaded}"
    assert not any("https://fonts" in p.read_text(encoding="utf-8") for p in site[0].rglob("*.css"))


def test_every_link_to_a_heading_finds_it(html):
    ids = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in html.items()}
    for name, text in html.items():
        for target, anchor in re.findall(r'<a [^>]*href="([^":#]*)#([^"]+)"', text):
            page = (Path("/") / Path(name).parent / target).resolve().relative_to("/").as_posix() if target else name
            assert unquote(anchor) in ids[page], f"{name}: {target}#{anchor}"


def test_every_notebook_is_a_page_with_code_outputs_and_pictures(html):
    for path in tool.notebooks():
        cells, text = tool.read(path)["cells"], html[address_of(path)]
        pictures = sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
        assert len(re.findall(r'<img[^>]+src="(?:data:image/png|[^"]+_files/)', text)) >= pictures, path
        assert not re.search(r"#\| ?(export|default_exp|hide)", text), path
        assert "sourceCode" in text or tool.kind_of(path) == "engine", path


def test_sidebar_has_every_page_by_its_kind(html):
    listed = re.findall(r'href="([^"]+)" class="sidebar-item-text', html["index.html"])
    assert sorted(listed) == sorted(html)
    kinds = [tool.kind_of(path) for name in listed for path in tool.notebooks() if address_of(path) == name]
    assert kinds == sorted(kinds, key=["index", "lesson", "deeper", "engine"].index)


def test_reference_has_every_public_function_and_class_and_lessons_link_to_it(html):
    import minigpt.gpt2
    import minigpt.engine.documents
    for module in (minigpt.gpt2, minigpt.engine.documents):
        page = html[f"api/{module.__name__.rpartition('.')[2]}.html"]
        names = [name for name in module.__all__ if callable(getattr(module, name))]
        assert names and all(f'id="{name}"' in page for name in names)
    assert 'href="api/gpt2.html#GPT2"' in html["gpt2.html"] and "/blob/main/minigpt/gpt2.py#L" in html["api/gpt2.html"]


def test_agents_get_markdown(site):
    listed = (site[0] / "llms.txt").read_text(encoding="utf-8")
    assert all(f"{address_of(path).removesuffix('html')}llms.md" in listed for path in tool.notebooks())
    assert "def attention(" in (site[0] / "attention.llms.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    if not BROWSER:
        pytest.skip("no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        opened = launch(p)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def axe(request):
    """The source of axe-core, which web/ brings for the test of the chat page; None where npm can't bring it."""
    try:
        folder = request.getfixturevalue("web_build")
    except pytest.skip.Exception:
        return None
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


SERIOUS = """([whole, contrast]) => axe.run(whole ? document : {exclude: ['#quarto-sidebar']},
    {runOnly: ['wcag2a', 'wcag2aa'], rules: {'color-contrast': {enabled: contrast}}})
    .then(found => found.violations.filter(v => ['serious', 'critical'].includes(v.impact))
    .map(v => v.id + ': ' + v.nodes[0].html.slice(0, 200)))"""


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "dark")])
def test_pages_in_chromium(browser, address, site, axe, width, scheme):
    """No console error, nothing asked of other machines, all pictures there, no sideways scroll, at most 40 screens,
    light and dark, and nothing serious for axe-core (in the side bar, which is one for all, once). The pages of the
    engine and the reference are alike: they are opened once, and axe-core sees one of ten. Its look at contrast, which
    is slow, is for one page of three, others in light than in dark: all have one style sheet."""
    pages = pages_of(site[0])
    assert len(pages) > len(tool.notebooks()) + 10
    alike = [name for name in pages if name.startswith(("engine/", "api/"))]
    if width > 390:
        pages = [name for name in pages if name not in alike]
    contrasts = {"index.html", *pages[width % 3::3]}
    for name, page, wrong in visit(browser, address, pages, width, scheme):
        assert wrong == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), name
        assert (page.evaluate(BRIGHTNESS) > 200) is (scheme == "light"), name
        assert width == 390 or page.evaluate("document.documentElement.scrollHeight") <= 40_000, name
        if axe and (name not in alike or name in alike[::10]):
            page.evaluate(axe)
            assert page.evaluate(SERIOUS, [name == "index.html", name in contrasts]) == [], name
    if not axe:
        pytest.skip("axe-core could not be had; all else is well")


def test_search_finds_what_is_asked_for(browser, address):
    for _, page, wrong in visit(browser, address, ["index.html"], 1280, "light"):
        page.fill(".smalldocs-search input >> visible=true", "KV cache")
        page.wait_for_selector(".search-result")
        hits = page.eval_on_selector_all(".search-result", "es => es.map(e => [e.getAttribute('href'), e.innerText])")
        assert any(href.endswith("generation.html#the-kv-cache") for href, _ in hits), hits
        page.fill(".smalldocs-search input >> visible=true", "lora rank")
        page.wait_for_selector(".search-result[href*='lora.html'] >> nth=0")
        page.fill(".smalldocs-search input >> visible=true", "KV cache")
        page.wait_for_selector(".search-result[href$='generation.html#the-kv-cache']")
        for part in (".search-result-section", ".search-result-text", ".smalldocs-search > .bi-search"):
            assert contrast(page, part) >= 4.5, part
        page.click(".search-result[href$='generation.html#the-kv-cache']")
        page.wait_for_url("**/generation.html#the-kv-cache")
        assert page.is_visible("#the-kv-cache") and wrong == []


def test_formulas_are_drawn_and_the_theme_can_be_switched(browser, address):
    for name, page, wrong in visit(browser, address, ["training.html", "evaluation.html"], 1280, "light"):
        before = page.evaluate(BRIGHTNESS)
        formulas = page.eval_on_selector_all("math", "es => es.map(e => e.getBoundingClientRect().width)")
        assert formulas and min(formulas) > 3, name
        assert "\\(" not in page.inner_text("main").replace("\\(?", ""), name
        page.click(".quarto-color-scheme-toggle >> visible=true")
        page.wait_for_function(f"Math.abs(({BRIGHTNESS})() - {before}) > 100")  # the second page is dark from the start
        assert wrong == []


@pytest.mark.parametrize("where", ["on the home page", "on a page of its own"])
def test_a_visitor_chats_with_the_model(browser, site, tmp_path, where):
    """From a sub-path of a plain static host: the answer is Python's, and nothing is asked of anybody else."""
    from minigpt.chat import ChatSession
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "where").symlink_to(site[0])
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, asked = f"http://127.0.0.1:{server.server_port}/some/where/", []
    context = browser.new_context()
    context.set_default_timeout(120_000)
    context.add_init_script("localStorage['minigpt.settings'] = JSON.stringify({temperature: 0, max_tokens: 40})")
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(address + "index.html")
        assert not any("/try/" in url for url in asked)       # 38 MB come when they are wanted
        if where == "on the home page":
            page.get_by_role("button", name="Chat here").click()
            chat = page.frame_locator("iframe")
        else:
            page.get_by_role("link", name="Chat with the model that ships").click()
            chat = page
        chat.get_by_text("minigpt-chat, in this browser").wait_for()
        chat.get_by_label("Type a message").fill("What is a whale?")
        chat.get_by_label("Type a message").press("Enter")
        chat.get_by_role("button", name="Regenerate").wait_for()
        said = chat.locator("article.assistant .said").inner_text()
    finally:
        context.close()
        server.shutdown()
    assert " ".join(said.split()) == " ".join(
        ChatSession(temperature=0, max_new_tokens=40).reply("What is a whale?").split())
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not foreign and any(url.endswith("/some/where/try/model/model.safetensors") for url in asked)
