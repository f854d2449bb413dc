"""ChatWidget in a real JupyterLab: typed, clicked, stopped, all by keyboard, in the light and the dark theme."""
import os
import re
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browsers import BROWSER, contrast, jupyter_lab, launch, run_all_cells

from minigpt import ui
from minigpt.deeper.token_bars import next_tokens
from minigpt.engine.tokenizer import Tokenizer
from minigpt.chat import ChatSession, as_messages
from minigpt.engine.transcripts import read_messages, transcript
from minigpt.generation import generate
from minigpt.gpt2 import GPT2, GPT2Config

CELLS = ["""
from minigpt.chat import ChatSession
from minigpt.ui import ChatWidget
from IPython.display import display
session = ChatSession(temperature=0, seed=1)
talk = ChatWidget(session, height="16em")
talk
""", """
print("said:", [user for user, _ in session.exchanges])
"""]
seen: list[str] = []


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a notebook in a JupyterLab of its own."""
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
    home = tmp_path_factory.mktemp("lab")
    nb = {"cells": [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "source": text.strip(), "outputs": [],
                     "execution_count": None} for i, text in enumerate(CELLS)],
          "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}},
          "nbformat": 4, "nbformat_minor": 5}
    with jupyter_lab(home, "chat.ipynb", nb) as address:
        yield address


@pytest.fixture(scope="module")
def page(lab):
    """The notebook in Chromium, its cells run; requests that leave the machine are refused and noted in `seen`."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as play:
        browser = launch(play)
        page = browser.new_page(viewport={"width": 1200, "height": 1150})

        def route(r):
            seen.append(r.request.url)
            r.continue_() if "127.0.0.1" in r.request.url else r.abort()
        page.route("**/*", route)
        run_all_cells(page, lab)
        page.locator(".widget-textarea textarea").first.wait_for(timeout=90_000)
        yield page
        browser.close()


def shot(page, name: str) -> None:
    if folder := os.environ.get("MINIGPT_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"chat-widget-{name}.png"))
        page.locator(".minigpt-widget").screenshot(path=str(Path(folder) / f"chat-widget-{name}-alone.png"))


def answered(page, count: int) -> str:
    """The last answer, once `count` answers stand there and nothing grows any more."""
    page.wait_for_function("n => document.querySelectorAll('.minigpt-chat .said-assistant').length == n && "
                           "!document.querySelector('.minigpt-chat .growing')", arg=count, timeout=60_000)
    return page.locator(".minigpt-chat .said-assistant .text").last.inner_text().strip()


def slider(page, name: str):
    return page.locator(".widget-slider", has_text=name).locator(".noUi-handle").first


def press(page, name: str, key: str, shown: str) -> None:
    """Press a key on a slider, once (it sends one message at a time and holds the next one back), and wait until the
    number beside it is the one that is wanted."""
    slider(page, name).press(key)
    readout = page.locator(".widget-slider", has_text=name).locator(".widget-readout").first
    for _ in range(100):
        page.wait_for_timeout(100)
        if readout.inner_text().strip() == shown:
            break
    else:
        raise AssertionError(f"{name} shows {readout.inner_text()!r} after {key}, not {shown!r}")


# ------------------------------------------------------------------ in JupyterLab

def test_typing_enter_and_focus(page):
    """Enter sends, the answer is the session's, and the cursor stays in the box."""
    own = ChatSession(temperature=0, seed=1)
    page.locator(".widget-textarea textarea").click()
    for count, text in enumerate(("What is a whale?", "Tell me a joke."), 1):
        page.keyboard.type(text)
        page.keyboard.press("Enter")
        assert answered(page, count) == own.reply(text)
        assert page.evaluate("document.activeElement.placeholder") == "Say something: Enter sends, Shift+Enter begins a line"
        assert page.locator(".widget-textarea textarea").input_value() == ""


def test_several_lines_and_copy(page):
    """Shift+Enter begins a line, a pasted text keeps its lines; Copy gives the text as it was written."""
    box = page.locator(".widget-textarea textarea")
    box.focus()
    page.keyboard.type("What is")
    page.keyboard.press("Shift+Enter")
    page.keyboard.insert_text("a\nviolin?")
    assert box.input_value() == "What is\na\nviolin?"
    page.keyboard.press("Enter")
    said = answered(page, 3)
    assert page.locator(".minigpt-chat .said-user .text").last.inner_text() == "What is\na\nviolin?"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".said-user .minigpt-copy").last.click()
    assert page.evaluate("navigator.clipboard.readText()") == "What is\na\nviolin?"
    page.locator(".said-assistant .minigpt-copy").last.press("Space")
    assert page.evaluate("navigator.clipboard.readText()") == said
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("Say something.").wait_for()
    for count, text in enumerate(("What is a whale?", "Tell me a joke."), 1):
        box.fill(text)
        box.press("Enter")
        answered(page, count)


def test_the_newest_text_is_in_sight(page):
    box, last = (page.locator(f".minigpt-chat{part}").last.bounding_box() for part in ("", " .said-assistant"))
    assert box["y"] <= last["y"] and last["y"] + last["height"] <= box["y"] + box["height"] + 1


def test_tab_sends_nothing_and_goes_through_everything(page):
    """Half a sentence is left with Tab: it stays. Tab reaches every button and slider, in order; Enter still sends."""
    page.locator(".widget-textarea textarea").focus()
    page.keyboard.type("What is a viol")
    reached = []
    for _ in range(13):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(e => e.innerText || e.parentElement.closest('.widget-slider')?.innerText || "
                                     "e.className)(document.activeElement)").split("\n")[0])
    names = ["Send", "Stop", "Again", "Clear", "Open", "Next tokens", "temperature", "top-k", "top-p", "length"]
    places = [next(i for i, text in enumerate(reached) if text.startswith(name)) for name in names]
    assert places == sorted(places), reached
    time.sleep(0.5)
    assert page.locator(".minigpt-chat .said-user").count() == 2
    page.locator(".widget-textarea textarea").focus()
    page.keyboard.press("Enter")                       # unchanged since it was left
    answered(page, 3)
    assert page.locator(".minigpt-chat .said-user .text").last.inner_text() == "What is a viol"


def test_sliders_by_keyboard_and_bars(page):
    """Space presses 'Next tokens'; the arrows move the temperature, and the chance of the likeliest token with it."""
    page.get_by_role("button", name="Next tokens").focus()
    page.keyboard.press("Space")
    chance = page.locator(".token-bars td").nth(2)
    chance.wait_for()
    assert chance.inner_text().endswith("drawn 100%")
    slider(page, "temperature").focus()
    page.keyboard.press("End")                         # 2.0, the most
    page.wait_for_function("() => !document.querySelector('.token-bars').innerText.includes('drawn 100%')")
    shot(page, "light")
    page.keyboard.press("Home")
    page.wait_for_function("() => document.querySelector('.token-bars').innerText.includes('drawn 100%')")
    page.get_by_role("button", name="Next tokens").focus()
    page.keyboard.press("Space")
    page.locator(".token-bars").wait_for(state="hidden")


def test_stop_and_again_by_keyboard(page):
    """A long answer is stopped with Space on Stop, long before its end; Again replaces it."""
    for _ in range(32):
        slider(page, "length").press("ArrowRight")     # 512 tokens
    page.locator(".widget-textarea textarea").focus()
    page.keyboard.type("Tell me a long story about a lighthouse.")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.minigpt-chat .growing')?.innerText.length > 30")
    page.get_by_role("button", name="Stop").focus()
    page.keyboard.press("Space")
    said = answered(page, 4)
    assert len(said) > 20
    page.get_by_role("status").get_by_text("Stopped.", exact=True).wait_for(timeout=60_000)
    slider(page, "temperature").press("ArrowRight")
    page.get_by_role("button", name="Again").focus()
    page.keyboard.press("Space")
    page.wait_for_function("() => !document.querySelector('[role=status]').innerText.includes('Stopped')")
    assert len(answered(page, 4)) > 20 and page.locator(".minigpt-chat .said-user").count() == 4
    assert page.evaluate("document.activeElement.innerText") == "Again"     # the focus was not lost


def test_the_kernel_has_the_same_conversation(page):
    """The next cell prints what was said: the page and the session agree."""
    page.locator(".jp-CodeCell").nth(1).locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    out = page.locator(".jp-CodeCell").nth(1).locator(".jp-OutputArea-output", has_text="viol")
    out.wait_for(timeout=30_000)
    shown = page.locator(".minigpt-chat .said-user .text").all_inner_texts()
    assert out.inner_text().strip() == f"said: {shown}"


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_readable_in_both_themes(page, theme):
    page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
    light = str(theme.endswith("Light")).lower()
    page.wait_for_function("want => document.body.dataset.jpThemeLight == want && !document.querySelector("
                           "'.jp-mod-loading')", arg=light)
    time.sleep(1)
    low = min(contrast(page, f".minigpt-chat .said-{role}") for role in ("user", "assistant"))
    shot(page, theme.split()[1].lower() + "-theme")
    assert low >= 4.5                                  # WCAG AA


def save(page, folder: Path) -> Path:
    """Click the link; the file that the browser wrote."""
    with page.expect_download() as download:
        page.get_by_role("link", name="Save this chat").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def choose(page, file) -> None:
    """Press Open and choose a file."""
    with page.expect_file_chooser() as chooser:
        page.locator("button.widget-upload").click()
    chooser.value.set_files(file)


def test_a_chat_is_saved_and_opened(page, tmp_path):
    """The link gives a transcript of what is shown; opened after Clear, it is shown again, and the model goes on."""
    shown = page.locator(".minigpt-chat .said-user .text").all_inner_texts()
    path = save(page, tmp_path)
    messages = read_messages(path)
    assert path.name == "minigpt-chat.json" and len(messages) == 8
    assert [m["content"] for m in messages[0::2]] == shown
    for _ in range(2):                                 # the same file twice
        page.get_by_role("button", name="Clear").click()
        page.get_by_text("Say something.").wait_for()
        page.get_by_role("link", name="Save this chat").wait_for(state="detached", timeout=60_000)
        choose(page, str(path))
        answered(page, 4)
        assert page.locator(".minigpt-chat .said-user .text").all_inner_texts() == shown
        page.get_by_role("status").get_by_text("Opened minigpt-chat.json.", exact=True).wait_for(timeout=60_000)
    own = ChatSession(temperature=0, seed=1, max_new_tokens=8)
    own.messages = messages
    press(page, "temperature", "Home", "0.00")
    press(page, "length", "Home", "8")
    page.locator(".widget-textarea textarea").fill("What is a whale?")
    page.locator(".widget-textarea textarea").press("Enter")
    assert answered(page, 5) == own.reply("What is a whale?")
    assert read_messages(save(page, tmp_path)) == own.messages


@pytest.mark.parametrize("content, told", [
    (b"Dear diary", "this is no transcript: bad.json"), (b"[]", "bad.json: expected a list"),
    (b" " * 1_000_001, "bad.json has 1,000,001 bytes"),
    (b'[{"role": "<img src=http://example.com/x.png>", "content": "Hi"}]', "the role is '<img")])
def test_a_bad_file_is_told_in_a_line_and_changes_nothing(page, content, told):
    shown = page.locator(".minigpt-chat").inner_text()
    choose(page, {"name": "bad.json", "mimeType": "application/json", "buffer": content})
    page.get_by_role("status").filter(has_text=told).wait_for(timeout=20_000)
    assert "\n" not in page.get_by_role("status").inner_text()
    assert page.get_by_role("status").locator("img").count() == 0
    assert page.locator(".minigpt-chat").inner_text() == shown


def test_nothing_is_clipped_or_wider_than_the_cell(page):
    """Every button shows its whole name, and the chat needs no scrolling to the side."""
    assert page.evaluate("""() => [...document.querySelectorAll('.jp-OutputArea button, .minigpt-chat')]
        .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)""") == []


def test_clear_forgets(page):
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("Say something.").wait_for()
    assert page.locator(".minigpt-chat .said-user").count() == 0


def test_no_request_left_the_machine(page):
    assert seen and all(url.split("/")[2].startswith("127.0.0.1") for url in seen if url.startswith(("http", "ws")))


# ------------------------------------------------------------------ without a browser

@pytest.fixture(scope="module")
def small():
    """A random model that answers nonsense quickly."""
    torch.manual_seed(0)
    config = GPT2Config.preset("nano", vocab_size=20000, block_size=128, n_layer=2, n_head=2, n_embd=32)
    return GPT2(config).eval(), Tokenizer.from_pretrained()


@pytest.mark.parametrize("settings", [
    dict(temperature=1.3, top_k=6, top_p=None, repetition_penalty=1.0),
    dict(temperature=0.8, top_k=None, top_p=0.02, repetition_penalty=1.4)])
def test_the_shown_chances_are_those_of_drawing(small, settings, ledger):
    """Against 500 draws of chapter 05's loop from the same place; without a penalty (which it would not see), and
    with one against the softmax computed by hand."""
    session = ChatSession(*small, seed=3, max_new_tokens=12, **settings)
    session.reply("Hello")
    place, said = 5, session.last.answer_ids
    rows = next_tokens(session, place, k=8)
    logits = small[0](torch.tensor([session.last.prompt_ids + said[:place]]))[0, -1].detach()
    assert [p for _, p, _ in rows] == pytest.approx(logits.softmax(-1).topk(8).values.tolist(), abs=1e-5)
    for token in set(said[:place]):
        logits[token] *= (settings["repetition_penalty"] if logits[token] < 0 else 1 / settings["repetition_penalty"])
    p, order = (logits / settings["temperature"]).softmax(-1).sort(descending=True)
    keep = torch.arange(len(p)) < settings["top_k"] if settings["top_k"] else p.cumsum(0) - p < settings["top_p"]
    by_hand = torch.zeros_like(p).scatter(0, order, p * keep / (p * keep).sum())
    worst = max(abs(c - by_hand[t].item()) for t, _, c in rows)
    ledger("Next-token chances in the chat widget, largest difference", worst, peer="torch", bound=1e-5)
    assert worst < 1e-5
    if settings["repetition_penalty"] == 1:
        from dataclasses import replace
        once = replace(session.options(), max_new_tokens=1, seed=0, stop_ids=())
        draws = generate(small[0], [session.last.prompt_ids + said[:place]] * 500, once)
        for token, _, chance in rows[:3]:
            share = sum(d.ids == [token] for d in draws) / 500
            assert abs(share - chance) < 5 * (chance * (1 - chance) / 500) ** 0.5 + 1e-9


def test_greedy_chances_are_one_and_zero(small):
    session = ChatSession(*small, temperature=0, max_new_tokens=8)
    session.reply("Hello")
    for place, token in enumerate(session.last.answer_ids):
        rows = next_tokens(session, place, k=20000)
        assert [t for t, _, c in rows if c == 1] == [token] and sum(c for _, _, c in rows) == 1
    for bad in (-1, len(session.last.answer_ids) + 1):
        with pytest.raises(ValueError, match=f"place={bad}"):
            next_tokens(session, bad)
    with pytest.raises(ValueError, match="no answer yet"):
        next_tokens(session.fork())


class Parser(HTMLParser):
    """The tags of a piece of HTML, with their attributes, and its text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</div></div>a<b",
                                  "'><b>", "\" onmouseover=x", "<!-- a", "a & b"])
def test_texts_cannot_become_html(small, evil):
    """A parser of its own finds the same tags as for a harmless text, and the text itself as text."""
    session = ChatSession(*small, max_new_tokens=4)

    def shown(text):
        session.messages = as_messages(text, [(text, text)])
        widget = ui.ChatWidget(session)
        widget.page.tell(text)
        return Parser(widget._repr_mimebundle_()["text/html"] + widget.page.past.value + widget.page.note.value)

    def names(found):
        return [(tag, list(attrs)) for tag, attrs in found.tags]
    assert names(shown(evil)) == names(shown("harmless"))
    assert shown(evil).text.count(evil) == 7
    copied = [attrs["data-text"] for tag, attrs in shown(evil).tags if tag == "button"]
    assert copied == [evil] * 3                        # the three messages, on the live page


def test_markdown_of_answers_loads_nothing():
    """Lists, tables, code and links are rendered; images are links, tags are text, and no link runs a program."""
    text = ("**a** *b* `<i>c</i>`\n\n- one\n- two\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n```\n<b>d</b>\n```\n\n"
            "![pic](http://a.example/x.png) ![ref][1] [no](javascript:alert(1)) [yes](http://b.example)\n\n"
            "<img src=http://c.example/y.png><svg onload=alert(1)>\n\n[1]: http://d.example/z.png")
    found = Parser(ui.markdown_html(text))
    tags = {tag for tag, _ in found.tags}
    assert tags == {"p", "strong", "em", "code", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre", "a"}
    links = [attrs for tag, attrs in found.tags if tag == "a"]
    assert [link["href"] for link in links] == ["http://a.example/x.png", "http://d.example/z.png", "http://b.example"]
    assert all(link["target"] == "_blank" and "noopener" in link["rel"] for link in links)
    assert "<svg onload=alert(1)>" in found.text and "<i>c</i>" in found.text and "javascript:alert(1)" in found.text


def test_the_static_picture(small):
    session = ChatSession(*small, max_new_tokens=4, seed=1)
    widget = ui.ChatWidget(session)
    assert "Nothing said yet" in widget._repr_mimebundle_()["text/html"]
    widget.send("Hello there")
    widget.wait()
    bundle = widget._repr_mimebundle_()
    assert "Hello there" in bundle["text/html"] and session.messages[1]["content"].strip()[:4] in bundle["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_a_widget_says_what_it_cannot_do(small):
    session = ChatSession(*small, max_new_tokens=40, seed=1)
    widget = ui.ChatWidget(session)
    for act, told in ((widget.again, "nothing was said"), (widget.stop, "no answer to stop"),
                      (lambda: widget.send(" "), "is empty"), (lambda: widget.send("word " * 300), "needs 30[0-9]")):
        act()
        assert re.search(told, widget.page.note.value)
    assert not widget.busy and session.messages == []


def test_a_failure_while_answering_is_shown(small):
    session = ChatSession(*small, max_new_tokens=5)
    widget = ui.ChatWidget(session)
    session.decoder.start = lambda prompts, room=0: 1 / 0  # a session whose decoder fails
    widget.send("Hello")
    widget.wait()
    assert "ZeroDivisionError" in widget.page.note.value and session.messages == [] and not widget.busy


def test_messages_while_one_is_answered_wait_in_the_box(small):
    session = ChatSession(*small, max_new_tokens=60, seed=1)
    widget, gate = ui.ChatWidget(session), threading.Event()
    session._turn.lock.acquire()                       # somebody else is talking
    try:
        widget.send("One")
        assert widget.busy
        widget.box.value = "Two"
        widget.box.value += "\x04"                          # Enter, as the page reports it
        time.sleep(0.5)
        assert widget.box.value == "Two" and "stop it first" in widget.page.note.value
    finally:
        session._turn.lock.release()
        gate.set()
    widget.wait()
    assert [user for user, _ in session.exchanges] == ["One"]


@pytest.mark.parametrize("act, note", [("stop", "Stopped."), ("clear", "")])
def test_stop_and_clear_right_after_send(small, act, note):
    """The answer has not begun yet, for somebody else is talking: it never comes."""
    session = ChatSession(*small, max_new_tokens=60, seed=1)
    widget = ui.ChatWidget(session)
    with session._turn:                                # in this thread; the widget's waits
        widget.send("One")
        pressed = threading.Thread(target=getattr(widget, act))
        pressed.start()
        pressed.join(60 if act == "stop" else 0.3)     # `clear` goes on when the answer has gone
    pressed.join(60)
    widget.wait()
    assert session.messages == [] and session.finish_reason == "cancelled" and not widget.busy
    assert f">{note}</span>" in widget.page.note.value


def test_a_transcript_opened_while_an_answer_comes(small):
    """The answer is ended first; what was opened is all that there is."""
    session = ChatSession(*small, max_new_tokens=90, seed=1)
    widget = ui.ChatWidget(session)
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."}]
    widget.send("Tell me a story")
    widget.load(transcript(said).encode(), "talk.json")
    assert session.messages == said and not widget.busy
    assert "Opened talk.json with its system text." in widget.page.note.value
    assert "Be kind." in widget.page.past.value and session.last is None
