"""The Gradio page (`minigpt ui`) in Chromium: chat, stop, retry, edit, history, sources, votes, two people, no request abroad."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from browsers import BROWSER, contrast, launch

from minigpt import ui
from minigpt.engine.tokenizer import Tokenizer
from minigpt.chat import ChatSession
from minigpt.engine import gradio_page
from minigpt.engine.serving import free_port
from minigpt.engine.sessions import AdapterCache, as_source
from minigpt.engine.ballots import Vote, Votes
from minigpt.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
# A connection of the server's process to anywhere but this machine is refused, and noted.
GUARD = """
import ipaddress, os, socket
def guard(event, args, log=os.environ.get("MINIGPT_TEST_LOG")):
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0].decode() if isinstance(args[0], bytes) else args[0]
    else:
        return
    if host not in (None, "", "localhost", "0.0.0.0", "::1") and not str(host).startswith("127."):
        with open(log, "a") as file:
            file.write(f"{event} {args[1] if event == 'socket.connect' else host}\\n")
        raise OSError("refused by the test")
import sys
sys.addaudithook(guard)
"""
HARBOR = ("# Harbor\n\nThe lighthouse was built by Ines Marlow in 1871.\n\n"
          "## Ferry\n\nThe ferry to the island leaves every morning at seven.\n")
seen: list[str] = []


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter that makes the shipped model say something else."""
    from minigpt.engine.adapters import save_adapter
    from minigpt.lora import LoraConfig, apply_lora
    model = GPT2.from_pretrained()
    apply_lora(model, LoraConfig(r=2, lora_alpha=4))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapters") / "noise"
    save_adapter(model, folder)
    return folder


@contextmanager
def running(home: Path, *arguments: str):
    """`minigpt ui` as a process in the folder `home`: its address. Ends with Ctrl-C, without a traceback."""
    pytest.importorskip("gradio")
    (home / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(home), str(ROOT)]), "MINIGPT_TEST_LOG": str(home / "abroad"),
                        "GRADIO_TEMP_DIR": str(home / "gradio"), "TMPDIR": str(home), "GRADIO_HEARTBEAT_INTERVAL": "0.5"}
    env.pop("GRADIO_ANALYTICS_ENABLED", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "minigpt", "ui", "--port", "0", "--no-browser", "--votes", str(home / "votes.jsonl"),
         *arguments], env=env, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line, lines = "", []
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", line)):
            line = process.stdout.readline()
            lines.append(line)
            assert line, f"the server ended: {lines}"
        yield found[0]
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
        assert "Traceback" not in rest, rest
        assert process.returncode == 130


@pytest.fixture(scope="module")
def server(tmp_path_factory, adapter):
    """A page for all tests: its address and its folder."""
    home = tmp_path_factory.mktemp("ui")
    (home / "notes").mkdir()
    (home / "notes" / "harbor.md").write_text(HARBOR, encoding="utf-8")
    with running(home, "--adapter", str(adapter), "--docs", str(home / "notes")) as address:
        yield address, home


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as play:
        browser = launch(play)
        yield browser
        browser.close()


class Person:
    """Somebody with a browser of their own, who asks greedily and without documents."""

    def __init__(self, browser, url: str, **more):
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 1000}} | more)
        self.context.set_default_timeout(120_000)
        self.page = self.context.new_page()
        self.page.route("**/*", self.route)
        self.page.on("websocket", lambda ws: seen.append(ws.url))
        self.page.goto(url)
        self.box = self.page.locator("[data-testid=textbox]:visible").first
        self.box.wait_for(timeout=60_000)
        self.ask_greedily()

    def ask_greedily(self) -> None:
        self.press("How it answers")
        self.set("temperature", "0")
        if self.documents.is_visible():
            self.documents.uncheck()

    @staticmethod
    def route(route) -> None:
        seen.append(route.request.url)
        route.continue_() if route.request.url.startswith("http://127.0.0.1:") else route.abort()

    @property
    def documents(self):
        return self.page.get_by_label("Look things up in the documents")

    def say(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def texts(self, who: str) -> list[str]:
        return [text.strip() for text in self.page.get_by_test_id(who).all_inner_texts()]

    def hear(self, count: int) -> str:
        """The last of `count` answers when it is whole: the box takes texts again."""
        self.page.bring_to_front()                     # Gradio draws by frames, and a page in the background has none
        self.page.wait_for_function("""n => document.querySelectorAll('[data-testid=bot]').length == n
            && !document.querySelector('.stop-button') && !document.querySelector('[data-testid=textbox]').disabled""", arg=count,
                                    timeout=60_000, polling=100)
        return self.texts("bot")[-1]

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).last.click()

    def redo(self, name: str, count: int) -> str:
        """Press a button that takes the last answer away, and hear the new one."""
        self.page.evaluate("""n => { window.fell = false; new MutationObserver((_, me) => {
            if (document.querySelectorAll('[data-testid=bot]').length < n) { window.fell = true; me.disconnect() }
        }).observe(document.body, {childList: true, subtree: true}) }""", count)
        self.press(name)
        self.page.wait_for_function("() => window.fell", timeout=60_000)
        return self.hear(count)

    def choose(self, label: str, option: str) -> None:
        self.page.get_by_label(label, exact=True).click()
        self.page.get_by_role("option", name=option).first.click()

    def set(self, label: str, value: str) -> None:
        field = self.page.get_by_label(f"number input for {label}")
        for _ in range(20):                            # a slider that appears late brings its own value
            field.fill(value)
            field.press("Tab")
            self.page.wait_for_timeout(300)
            if field.input_value() == value:
                return
        raise AssertionError(f"{label} is {field.input_value()}, not {value}")

    def shot(self, name: str) -> None:
        if folder := os.environ.get("MINIGPT_SCREENSHOTS"):
            self.page.evaluate("scrollTo(0, 0)")
            self.page.screenshot(path=str(Path(folder) / f"gradio-{name}.png"))


@pytest.fixture(scope="module")
def ada(server, browser):
    person = Person(browser, server[0])
    yield person
    person.context.close()


@pytest.fixture(scope="module")
def alone():
    """What the page should answer: a session here, greedy."""
    return ChatSession(temperature=0)


def test_it_greets_and_has_examples(server, browser, alone):
    """The empty chat says what to do; an example is one click."""
    zoe = Person(browser, server[0])
    zoe.page.get_by_text("Say something, or press one of these.").wait_for()
    assert zoe.page.get_by_role("button", name=re.compile("^Select example")).count() == len(gradio_page._EXAMPLES)
    zoe.shot("empty")
    zoe.page.get_by_role("button", name="Select example 2").click()
    assert zoe.hear(1) == alone.fork().reply(gradio_page._EXAMPLES[1])
    zoe.context.close()


def test_send_and_stream(ada, alone):
    """The answer grows in steps and ends as a session's; the box is empty again."""
    ada.page.evaluate("""() => { window.grown = new Set()
        new MutationObserver(() => window.grown.add(document.querySelector('[data-testid=bot]')?.innerText.trim()))
            .observe(document.body, {childList: true, subtree: true, characterData: true}) }""")
    ada.say("Tell me a short story about a fox and a kite.")
    assert ada.hear(1).split() == alone.reply("Tell me a short story about a fox and a kite.").split()
    grown = sorted(filter(None, ada.page.evaluate("[...window.grown]")), key=len)
    assert len(grown) > 1 and all(grown[-1].startswith(part) for part in grown)
    assert ada.box.input_value() == ""


def test_it_remembers(ada, alone):
    for count, text in ((2, "My name is Ada."), (3, "What is my name?")):
        ada.say(text)
        assert ada.hear(count) == alone.reply(text)
    assert "Ada" in ada.texts("bot")[-1]
    ada.shot("chat")


def test_several_lines(ada):
    ada.box.fill("One")
    ada.box.press("Shift+Enter")
    ada.page.keyboard.type("Two")
    assert ada.box.input_value() == "One\nTwo"
    ada.box.fill("")


def test_what_a_visitor_types_loads_nothing(ada):
    """An image in a message: the browser is not allowed to ask for it."""
    ada.say("![x](http://example.com/a.png) <img src=http://example.com/b.png> **star**")
    ada.hear(4)
    assert ada.page.get_by_test_id("user").last.locator("strong").inner_text() == "star"


def test_undo_and_edit_and_retry(ada, alone):
    """Gradio's own buttons: Undo brings the message back into the box, Retry asks again, Edit goes on from there."""
    ada.press("Undo")
    ada.page.wait_for_function("() => document.querySelectorAll('[data-testid=bot]').length == 3")
    ada.page.wait_for_function("() => document.querySelector('[data-testid=textbox]').value.includes('star')")
    ada.box.fill("")
    assert ada.redo("Retry", 3) == alone.exchanges[-1][1]       # greedy: the same again
    ada.press("Edit")
    field = ada.page.locator("textarea.edit-textarea, .edit-textarea textarea, [data-testid=user] textarea").last
    field.fill("Who am I?")
    own = alone.fork()
    own.messages = alone.messages[:4]
    assert ada.redo("Submit", 3) == own.reply("Who am I?")


def test_stop_keeps_what_was_said(ada):
    ada.set("temperature", "2")                        # hardly ever ends by itself
    ada.set("length", "512")
    ada.say("Tell me a long story about a lighthouse.")
    ada.page.wait_for_function("() => [...document.querySelectorAll('[data-testid=bot]')].at(-1).innerText.length > 60")
    ada.page.locator("button.stop-button").click()
    first = ada.hear(4)
    ada.page.wait_for_timeout(1000)
    assert ada.hear(4) == first and len(first) > 50    # nothing comes late
    ada.shot("stopped")
    ada.set("length", "16")
    ada.say("What is a whale?")
    assert ada.hear(5)


def test_a_chat_survives_a_reload(ada):
    """The browser keeps it: after a reload it stands in the list, and a click shows it again."""
    ada.page.evaluate("""() => { const set = Storage.prototype.setItem; Storage.prototype.setItem = function (...pair) {
        set.apply(this, pair); window.kept = document.querySelectorAll('[data-testid=bot]').length } }""")
    ada.say("What is a violin?")
    ada.hear(6)
    ada.page.wait_for_function("() => window.kept == 6", polling=100)
    before = ada.texts("bot")
    ada.page.reload()
    ada.box.wait_for()
    ada.page.get_by_text("Say something, or press one of these.").wait_for()
    ada.page.get_by_role("cell", name=re.compile("Tell me a short story")).or_(
        ada.page.locator("td", has_text="Tell me a short story")).first.click()
    ada.page.wait_for_function("n => document.querySelectorAll('[data-testid=bot]').length == n", arg=len(before))
    assert ada.texts("bot") == before
    ada.press("New chat")
    ada.page.wait_for_function("() => !document.querySelector('[data-testid=bot]')")
    ada.ask_greedily()


def test_a_second_person_is_apart(ada, server, browser, alone):
    """Another browser sees an empty page, and its model knows no name; both stream at once."""
    bob = Person(browser, server[0], color_scheme="dark")
    assert bob.texts("bot") == []
    ada.say("What is a violin?")
    bob.say("What is my name?")
    assert bob.hear(1) == alone.fork().reply("What is my name?") and "Ada" not in bob.texts("bot")[0]
    assert ada.hear(1) == alone.fork().reply("What is a violin?")
    bob.shot("dark")
    assert min(contrast(bob.page, f"[data-testid={who}]") for who in ("user", "bot")) >= 4.5    # WCAG AA
    bob.context.close()


def test_a_system_text(ada, alone):
    ada.press("New chat")
    ada.page.wait_for_function("() => !document.querySelector('[data-testid=bot]')")
    ada.page.get_by_label("System text").fill("Answer like a pirate.")
    ada.say("Hello")
    own = ChatSession(alone.model, alone.tokenizer, temperature=0, system="Answer like a pirate.")
    assert ada.hear(1) == own.reply("Hello")
    ada.page.get_by_label("System text").fill("")


def test_documents_are_asked_and_cited(ada, server, alone):
    ada.press("New chat")
    ada.page.wait_for_function("() => !document.querySelector('[data-testid=bot]')")
    ada.documents.check()
    ada.set("length", "256")
    own = alone.fork()
    own.source = as_source(server[1] / "notes")
    own.reply("When does the ferry leave?")
    ada.say("When does the ferry leave?")
    ada.page.get_by_text("[1] harbor.md").wait_for()
    assert own.exchanges[0][1] in ada.page.get_by_test_id("bot").first.inner_text()
    assert ada.texts("user") == ["When does the ferry leave?"]      # not the text that the model read
    ada.page.wait_for_function("() => !document.querySelector('.stop-button')")
    ada.shot("documents")
    ada.page.evaluate("document.body.classList.add('dark')")
    ada.page.wait_for_timeout(500)                     # colours are faded in
    ada.shot("documents-dark")
    ada.page.evaluate("document.body.classList.remove('dark')")
    ada.say("And who built the lighthouse?")           # the sources are not taken for something said
    own.reply("And who built the lighthouse?")
    ada.page.wait_for_function("() => document.querySelectorAll('[data-testid=user]').length == 2")
    ada.page.get_by_text(own.exchanges[1][1]).first.wait_for(timeout=30_000)
    ada.page.wait_for_function("() => !document.querySelector('.stop-button')")
    ada.documents.uncheck()


def test_an_adapter_is_chosen(ada, adapter, alone):
    """The same question, plain and with the owner's adapter."""
    question = "What is a violin?"
    own = alone.fork()
    own.max_new_tokens = 24
    plain = own.reply(question)
    own.use(AdapterCache(alone.model).decoder(adapter))
    noisy = "".join(own.regenerate())
    assert plain != noisy
    ada.set("length", "24")
    for option, expected in (("noise", noisy), ("plain model", plain)):
        ada.press("New chat")
        ada.page.wait_for_function("() => !document.querySelector('[data-testid=bot]')")
        ada.choose("Adapter", option)
        ada.say(question)
        assert ada.hear(1).split() == gradio_page.as_shown(expected).split()


def test_compare_and_vote(ada, server, alone):
    """Two answers, blind; a click on one writes a vote for the system that gave it."""
    page, file = ada.page, server[1] / "votes.jsonl"
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Your name").fill("ada")
    page.get_by_placeholder("A prompt for both").fill("What is a whale?")
    ada.press("Ask both")
    greedy = alone.fork().reply("What is a whale?")
    page.wait_for_function("() => [...document.querySelectorAll('textarea')].filter(e => e.offsetParent && e.disabled"
                           " && e.value).length == 2", timeout=60_000)
    left, right = (page.get_by_label(side, exact=True).input_value() for side in ("Left", "Right"))
    assert greedy in (left, right)
    ada.press("Left is better" if left == greedy else "Right is better")
    page.get_by_text(re.compile("^Left: .*Right: ")).wait_for()
    ada.shot("compare")
    vote, = Votes(file).rows
    assert vote.rater == "ada" and vote.winner == "plain model, greedy" and vote.item.startswith("What is a whale?")


def test_card_and_bad_input(ada):
    """What is too long is told, and stays in the box; so does an empty message."""
    ada.page.get_by_role("tab", name="Model card").click()
    ada.page.get_by_text("35,984,384").wait_for()
    ada.shot("card")
    ada.page.get_by_role("tab", name="Chat").click()
    before = ada.texts("user")
    for bad, told in (("a " * 3000, "shorten it"), ("  ", "is empty")):
        ada.say(bad)
        ada.page.get_by_text(re.compile(told)).first.wait_for()
        assert ada.texts("user") == before and ada.box.input_value() == bad


def test_on_a_phone(server, browser):
    """390 pixels wide: no scrolling to the side, no button or box whose text is cut, no word of a table broken."""
    gil = Person(browser, server[0], viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    gil.say("Hello")
    gil.hear(1)
    for tab in ("Chat", "Compare", "Model card"):
        gil.page.get_by_role("tab", name=tab).click()
        assert gil.page.evaluate("document.documentElement.scrollWidth") == 390
        gil.page.wait_for_function("() => [...document.querySelectorAll('button, input')].some(e => e.offsetParent)")
        cut = gil.page.evaluate("""() => [...document.querySelectorAll('button, input')]
            .filter(e => e.offsetParent && e.clientWidth && e.scrollWidth > e.clientWidth + 1 && !e.matches('.label-wrap'))
            .map(e => [e.innerText || e.value, e.clientWidth, e.scrollWidth]).filter(([text]) => text)""")
        assert cut == [], f"{tab}: {cut}"
        gil.shot(f"phone-{tab}")
    names = gil.page.locator("td:first-child").filter(has_text="parameters")
    assert names.evaluate("e => e.getBoundingClientRect().height") < 60
    gil.context.close()


def test_no_request_left_the_machine(server):
    """Neither the pages (fonts, scripts, pictures) nor the server's process asked anyone else."""
    hosts = {url.split("/")[2].split(":")[0] for url in seen if url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"} and len(seen) > 50
    abroad = server[1] / "abroad"
    assert not abroad.exists(), abroad.read_text(encoding="utf-8")


def test_functions_are_not_public(server):
    """Gradio's public interface names none of the page's functions."""
    with urllib.request.urlopen(f"{server[0]}gradio_api/info") as answer:
        info = json.load(answer)
    assert info["named_endpoints"] == {} and info["unnamed_endpoints"] == {}


def test_a_full_queue_is_told_and_ends(small, tmp_path, browser, monkeypatch):
    """Two are answered, one waits and is told so; the next one is told that the page is busy, and may ask again later."""
    gate = threading.Event()

    def slow(session, text, history):
        yield "Let me think"
        gate.wait(60)
        yield f"About {text}"
    monkeypatch.setattr(ui, "page_answer", slow)
    page = ui.gradio_app(ChatSession(*small), votes=tmp_path / "votes.jsonl", waiting=1)
    _, address, _ = page.launch(server_name="127.0.0.1", server_port=free_port(), quiet=True, inbrowser=False,
                                prevent_thread_lock=True, **gradio_page.page_style())
    try:
        people = [Person(browser, address) for _ in range(4)]
        for number, person in enumerate(people[:3]):
            person.say(f"whale {number}")
            person.page.get_by_text("Let me think" if number < 2 else re.compile("queue: ")).first.wait_for()
        people[2].shot("waiting")
        people[3].say("whale 3")
        people[3].page.get_by_test_id("toast-body").filter(has_text="busy").first.wait_for()
        people[3].shot("busy")
        people[3].page.get_by_test_id("toast-close").first.click()
        gate.set()
        assert [person.hear(1) for person in people[:3]] == ["About whale 0", "About whale 1", "About whale 2"]
        assert people[3].box.input_value() == "whale 3"    # nothing that was typed is lost
        people[3].box.press("Enter")
        assert people[3].hear(1) == "About whale 3"
        for person in people:
            person.context.close()
    finally:
        gate.set()
        page.close(verbose=False)


# ------------------------------------------------------------------ without a browser

@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = GPT2Config.preset("nano", vocab_size=20000, block_size=128, n_layer=2, n_head=2, n_embd=32)
    return GPT2(config).eval(), Tokenizer.from_pretrained()


def shown(role: str, text: str, **metadata) -> dict:
    """A message as Gradio's chat gives it back."""
    return {"role": role, "content": [{"type": "text", "text": text}], "metadata": metadata or None}


def test_what_the_page_shows_is_what_was_said():
    """Sources and messages without an answer are left out, and marks against tags are gone."""
    history = [shown("user", "Hi"), shown("assistant", gradio_page.as_shown("<b>Hello</b> ![x](y)")),
               shown("assistant", "a passage", title="[1] a.md"), shown("user", "No answer came"), shown("user", "Bye"),
               shown("assistant", "Good night."), shown("user", "Stopped before it began")]
    assert ui.past_messages(history) == [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<b>Hello</b> ![x](y)"},
        {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Good night."}]
    assert ui.past_messages([]) == []


def test_an_answer_goes_on_from_what_is_shown(small):
    """The page's answer is that of a session which has held the conversation itself, system text included."""
    own = ChatSession(*small, seed=1, max_new_tokens=8, system="Be kind.")
    own.reply("Hello")
    history = [shown(m["role"], gradio_page.as_shown(m["content"])) for m in own.messages[1:]]
    fresh = ChatSession(*small, seed=1, max_new_tokens=8, system="Be kind.")
    *_, last = ui.page_answer(fresh, "And now?", history)
    assert gradio_page.as_said(last) == own.reply("And now?") and fresh.messages == own.messages


def test_a_closed_answer_ends(small):
    """Gradio closes the generator of a message whose visitor pressed Stop or went away."""
    session = ChatSession(*small, seed=1, max_new_tokens=90)
    pieces = ui.page_answer(session, "Hello", [])
    next(pieces)
    pieces.close()
    assert session.finish_reason == "cancelled" and len(session.last.answer_ids) < 90


@pytest.mark.parametrize("text, want", [
    ("<img src=x>", "&lt;\u2060img src=x&gt;"), ("1 < 2", "1 &lt; 2"), ("a **b**", "a **b**"),
    ("`<b>` <b>", "`&lt;b&gt;` &lt;\u2060b&gt;"), ("```\n<b>\n``` ![x](y)", "```\n&lt;b&gt;\n``` !\u2060[x](y)"),
    ("<!-- a -->", "&lt;\u2060!-- a --&gt;"), ("![x][1]", "!\u2060[x][1]")])
def test_tags_and_images_of_answers(text, want):
    from html import escape
    assert escape(gradio_page.as_shown(text), quote=False) == want
    assert gradio_page.as_said(gradio_page.as_shown(text)) == text


@pytest.mark.parametrize("bad, match", [(dict(votes="nowhere/votes.jsonl"), "no such folder"), (dict(waiting=0), "waiting=0")])
def test_bad_arguments_of_the_page(small, bad, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        ui.gradio_app(ChatSession(*small), **bad)


def test_no_box_cuts_a_text_that_is_pasted(small, tmp_path):
    """What is too long is refused with a reason, by the session; a box that cuts says nothing."""
    page = ui.gradio_app(ChatSession(*small), votes=tmp_path / "votes")
    most = {block.label: block.max_length for block in page.blocks.values() if type(block).__name__ == "Textbox"}
    assert most.pop("Your name") and {"Message", "Prompt", "System text"} <= most.keys() and not any(most.values())


def test_bad_settings_are_told(small):
    session = ChatSession(*small)
    gradio_page.set_up(session, [0.5, 0, 1, 64])
    assert (session.temperature, session.top_k, session.top_p, session.max_new_tokens) == (0.5, None, 1, 64)
    with pytest.raises(ValueError, match="temperature=-1"):
        gradio_page.set_up(session, [-1, 0, 1, 64])


def test_duels_are_fair(small, adapter):
    """Both systems read the same prompt with their own settings; the visitor's session is left alone."""
    session = ChatSession(*small, seed=1, max_new_tokens=8)
    session.reply("Before")
    systems = gradio_page.Systems(session, None, [])
    names = ["plain model, greedy", "plain model, temperature 0.7"]
    match = gradio_page.duel(systems, names, "Hello")
    for name, temperature in zip(names, (0, 0.7)):
        assert match.answers[name] == ChatSession(*small, seed=1, max_new_tokens=8, temperature=temperature).reply("Hello")
    assert len(session.exchanges) == 1 and session.temperature == 0.7
    with pytest.raises(ValueError, match="against itself"):
        gradio_page.duel(systems, names[:1] * 2, "Hello")


def test_a_system_answers_with_its_adapter(adapter, alone):
    """Two folders of the same name are told apart; the one that is given as chosen stands first."""
    systems = gradio_page.Systems(alone, adapter, [adapter])
    assert list(systems.folders) == ["noise (1)", "plain model", "noise (3)"]
    own = alone.fork()
    plain = own.reply("What is a whale?")
    own.use(AdapterCache(alone.model).decoder(adapter))
    noisy = "".join(own.regenerate())
    assert [systems.fork(name).reply("What is a whale?") for name in systems.folders] == [noisy, plain, noisy]


def test_ratings_are_shown_from_ten_prompts_on(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    assert "<table>" not in gradio_page.standings(votes)
    for n in range(10):
        assert "<table>" not in gradio_page.standings(votes)
        votes.add(Vote("ada", f"prompt {n}", "a", "b", "left" if n % 3 else "right"))
    assert "<table>" in gradio_page.standings(votes) and "Votes: 10" in gradio_page.standings(votes)


def test_a_card_shows_marks_and_hides_tags(tmp_path):
    """What begins a tag is text, whatever stands before it; a `<` that begins none stays as it is, in code too."""
    (tmp_path / "README.md").write_text("`<|im_end|>` 1 < 2 `<b>` <b>x <img src=y> <!-- z --> </i> <?p", encoding="utf-8")
    assert gradio_page.model_card(tmp_path) == ("`<|im_end|>` 1 < 2 `&lt;b>` &lt;b>x &lt;img src=y> &lt;!-- z --> &lt;/i> &lt;?p")
