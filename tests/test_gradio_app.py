"""The Gradio page (`minigpt ui`) in Chromium: chat, stop, again, files, sources, votes, two people, no request abroad."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from browsers import BROWSER, contrast, launch

from minigpt import ui
from minigpt.engine.tokenizer import Tokenizer
from minigpt.chat import ChatSession
from minigpt.engine.sessions import AdapterCache, as_source
from minigpt.engine.transcripts import read_messages, transcript
from minigpt.engine.serving import free_port
from minigpt.engine.ballots import Votes
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
    with running(home, "--adapter", str(adapter)) as address:
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
    """Somebody with a browser of their own."""

    def __init__(self, browser, url: str, **more):
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 1000}} | more)
        self.page = self.context.new_page()
        self.page.route("**/*", self.route)
        self.page.on("websocket", lambda ws: seen.append(ws.url))
        self.page.goto(url)
        self.box = self.page.get_by_placeholder("Say something")
        self.box.wait_for(timeout=60_000)

    @staticmethod
    def route(route) -> None:
        seen.append(route.request.url)
        route.continue_() if route.request.url.startswith("http://127.0.0.1:") else route.abort()

    def say(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def texts(self, who: str) -> list[str]:
        return [text.strip() for text in self.page.get_by_test_id(who).all_inner_texts()]

    def hear(self, count: int) -> str:
        """The last of `count` answers when it is whole (the line below tells how many there are)."""
        self.page.locator(f"[data-exchanges='{count}']").wait_for(state="attached", timeout=60_000)
        assert len(self.texts("bot")) == count
        return self.texts("bot")[-1]

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def choose(self, button: str, files) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.press(button)
        chooser.value.set_files(files)

    def save(self, folder: Path) -> Path:
        """Click the link; the file that the browser wrote."""
        with self.page.expect_download() as download:
            self.page.get_by_role("link", name="Save this chat").click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def set(self, label: str, value: str) -> None:
        field = self.page.get_by_label(f"number input for {label}")
        field.fill(value)
        field.press("Tab")

    def sees_the_last_answer(self) -> bool:
        """Whether nothing lies over it."""
        return self.page.get_by_test_id("bot").last.evaluate("""bot => {
            const {x, y, width, height} = bot.getBoundingClientRect()
            return bot.contains(document.elementFromPoint(x + width / 2, y + height / 2)) }""")

    def shot(self, name: str) -> None:
        if folder := os.environ.get("MINIGPT_SCREENSHOTS"):
            self.page.screenshot(path=str(Path(folder) / f"gradio-{name}.png"))


@pytest.fixture(scope="module")
def ada(server, browser):
    person = Person(browser, server[0])
    person.set("temperature", "0")
    yield person
    person.context.close()


@pytest.fixture(scope="module")
def alone():
    """What the page should answer: a session here, greedy."""
    return ChatSession(temperature=0)


def test_send_and_stream(ada, alone):
    """The answer grows in steps and ends as a session's; the box is empty again, and the next message may be typed."""
    ada.page.evaluate("""() => { window.grown = new Set()
        new MutationObserver(() => window.grown.add(document.querySelector('[data-testid=bot]')?.innerText))
            .observe(document.body, {childList: true, subtree: true, characterData: true}) }""")
    ada.say("Tell me a short story about a fox and a kite.")
    ada.page.get_by_test_id("bot").filter(has_text="Once").wait_for()
    assert ada.box.input_value() == ""
    ada.box.fill("typed meanwhile")
    assert ada.hear(1) == alone.reply("Tell me a short story about a fox and a kite.")
    grown = sorted(filter(None, ada.page.evaluate("[...window.grown]")), key=len)
    assert len(grown) > 5 and all(grown[-1].startswith(part) for part in grown if not part.startswith("..."))
    assert ada.box.input_value() == "typed meanwhile"


def test_it_remembers(ada, alone):
    for count, text in ((2, "My name is Ada."), (3, "What is my name?")):
        ada.say(text)
        assert ada.hear(count) == alone.reply(text)
    assert "Ada" in ada.texts("bot")[-1]


def test_texts_are_shown_as_they_are(ada):
    """Markdown and HTML in a message: no picture is asked for, no tag is made."""
    evil = "![x](http://example.com/a.png) <img src=http://example.com/b.png> <b>bold</b> **star**"
    ada.say(evil)
    ada.hear(4)
    assert ada.texts("user")[-1] == evil
    assert ada.page.get_by_test_id("user").last.locator("img, b, strong").count() == 0


def test_stop_and_again(ada):
    ada.set("length", "512")
    ada.say("Tell me a long story about a lighthouse.")
    ada.page.wait_for_function("() => [...document.querySelectorAll('[data-testid=bot]')].at(-1).innerText.length > 30")
    ada.press("Stop")
    first = ada.hear(5)
    ada.page.get_by_text("Stopped.").wait_for()
    ada.press("Again")
    ada.page.get_by_text("Stopped.").wait_for(state="detached")
    again = ada.hear(5)
    assert again.startswith(first) and len(again) > len(first) and len(ada.texts("user")) == 5   # greedy: it goes on


def test_a_second_person_is_apart(ada, server, browser, alone):
    """Another browser sees an empty page, and its model knows no name; both stream at once."""
    bob = Person(browser, server[0], color_scheme="dark")
    bob.set("temperature", "0")
    assert bob.texts("bot") == []
    mine = ada.texts("bot")
    ada.say("What is a violin?")
    bob.say("What is my name?")
    assert bob.hear(1) == alone.fork().reply("What is my name?") and "Ada" not in bob.texts("bot")[0]
    assert ada.hear(6) and ada.texts("bot")[:5] == mine
    bob.shot("dark")
    bob.context.close()


def test_documents_are_asked_and_cited(ada, tmp_path, alone):
    (tmp_path / "harbor.md").write_text(HARBOR, encoding="utf-8")
    ada.press("New chat")
    ada.page.wait_for_function("() => !document.querySelector('[data-testid=bot]')")
    with ada.page.expect_file_chooser() as chooser:
        ada.press("Upload documents")
    chooser.value.set_files([str(tmp_path / "harbor.md")])
    ada.page.wait_for_function("() => [...document.querySelectorAll('input')].some(e => e.value == 'my upload')")
    ada.say("When does the ferry leave?")
    own = alone.fork()
    own.source = as_source(tmp_path)
    own.reply("When does the ferry leave?")
    assert ada.hear(1) == own.exchanges[0][1] and own.last.citations
    sources = ada.page.locator("details")
    sources.first.wait_for()
    assert sources.count() == len(own.last.hits) and "harbor.md" in sources.first.inner_text()
    assert ada.page.locator("mark").all_inner_texts() == [own.last.citations[0].text]
    assert ada.texts("user") == ["When does the ferry leave?"]      # not the text that the model read
    ada.shot("documents")
    for dark in (False, True):
        ada.page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        ada.page.wait_for_timeout(500)                              # colours are faded in
        assert min(contrast(ada.page, what) for what in ("mark", "a[download]")) >= 4.5     # WCAG AA
    ada.shot("documents-dark")
    ada.page.evaluate("document.body.classList.remove('dark')")


def test_a_file_that_cannot_be_read_is_told(ada, tmp_path):
    (tmp_path / "broken.txt").write_bytes(b"caf\xe9 " * 50)
    with ada.page.expect_file_chooser() as chooser:
        ada.press("Upload documents")
    chooser.value.set_files([str(tmp_path / "broken.txt")])
    ada.page.get_by_test_id("toast-body").get_by_text(re.compile("broken.txt|UTF-8")).first.wait_for()
    ada.page.get_by_test_id("toast-close").first.click()


def test_adapters_are_chosen_and_uploaded(ada, adapter, alone):
    """The same question: plain, with the owner's adapter, plain again, with an uploaded one."""
    question = "What is a violin?"
    own = alone.fork()
    own.max_new_tokens = 24
    plain = own.reply(question)
    own.use(AdapterCache(alone.model).decoder(adapter))
    noisy = "".join(own.regenerate())
    assert plain != noisy
    ada.set("length", "24")
    choice = ada.page.get_by_label("Documents")
    choice.click()
    ada.page.get_by_role("option", name="none").click()
    for option, expected in (("noise", noisy), ("none", plain)):
        ada.press("New chat")
        ada.page.wait_for_function("() => !document.querySelector('[data-testid=bot]')")
        ada.page.get_by_label("Adapter").click()
        ada.page.get_by_role("option", name=option).click()
        ada.say(question)
        assert ada.hear(1) == expected
    ada.press("New chat")
    ada.page.wait_for_function("() => !document.querySelector('[data-testid=bot]')")
    with ada.page.expect_file_chooser() as chooser:
        ada.press("Upload adapter")
    chooser.value.set_files([str(path) for path in adapter.iterdir() if path.is_file()])
    ada.page.wait_for_function("() => [...document.querySelectorAll('input')].some(e => e.value == 'my upload')")
    ada.say(question)
    assert ada.hear(1) == noisy


def test_compare_and_vote(ada, server, alone):
    """Two answers, blind; a click on one writes a vote for the system that gave it."""
    page, file = ada.page, server[1] / "votes.jsonl"
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Your name").fill("ada")
    page.get_by_placeholder("A prompt for both").fill("What is a whale?")
    ada.press("Ask both")
    page.wait_for_function("() => !document.querySelector('button:disabled')", timeout=60_000)
    left, right = (page.get_by_label(side, exact=True).input_value() for side in ("Left", "Right"))
    greedy = alone.fork().reply("What is a whale?")
    assert greedy in (left, right)
    assert "plain model, greedy" not in page.locator(".prose").all_inner_texts()
    ada.press("Left is better" if left == greedy else "Right is better")
    page.get_by_text(re.compile("^Left: .*Right: ")).wait_for()
    ada.shot("compare")
    vote, = Votes(file).rows
    assert vote.rater == "ada" and vote.winner == "plain model, greedy" and vote.item.startswith("What is a whale?")


def test_card_and_bad_input(ada):
    ada.page.get_by_role("tab", name="Model card").click()
    ada.page.get_by_text("35,981,824").wait_for()
    ada.shot("card")
    ada.page.get_by_role("tab", name="Chat").click()
    before = ada.texts("user")
    ada.say("a " * 1990)
    ada.page.get_by_test_id("toast-body").get_by_text("Shorten it").first.wait_for()
    assert ada.texts("user") == before and ada.box.input_value().startswith("a a")


def test_a_chat_is_saved_and_opened(server, browser, alone, tmp_path):
    """A real download is a transcript; opened on somebody else's page, the conversation goes on there."""
    cleo, dan = (Person(browser, server[0]) for _ in range(2))
    own = alone.fork()
    for person in (cleo, dan):
        person.set("temperature", "0")
        assert person.page.get_by_role("link", name="Save this chat").count() == 0
    cleo.say("My name is Cleo.")
    assert cleo.hear(1) == own.reply("My name is Cleo.")
    path = cleo.save(tmp_path)
    assert path.name == "minigpt-chat.json" and read_messages(path) == own.messages
    dan.choose("Open", str(path))
    assert dan.hear(1) == own.exchanges[0][1] and dan.texts("user") == ["My name is Cleo."]
    dan.page.get_by_text("Opened minigpt-chat.json.").wait_for()
    dan.say("What is my name?")
    assert dan.hear(2) == own.reply("What is my name?")
    assert read_messages(dan.save(tmp_path)) == own.messages
    assert len(cleo.texts("user")) == 1                # her page is hers
    cleo.context.close(), dan.context.close()


def test_open_ends_an_answer_and_new_chat_has_the_pages_system_text(server, browser, tmp_path):
    fay = Person(browser, server[0])
    fay.set("temperature", "0")
    fay.set("length", "512")
    fay.say("Tell me a long story about a lighthouse.")
    fay.page.wait_for_function("() => [...document.querySelectorAll('[data-testid=bot]')].at(-1)?.innerText.length > 30")
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>Hi</b>"},
            {"role": "assistant", "content": "Hello."}]
    (tmp_path / "talk.json").write_text(transcript(said), encoding="utf-8")
    fay.choose("Open", str(tmp_path / "talk.json"))
    fay.page.get_by_text("Hello.", exact=True).wait_for()
    fay.page.wait_for_timeout(1000)                    # nothing of the ended answer comes late
    assert fay.hear(1) == "Hello." and fay.texts("user") == ["<b>Hi</b>"]
    assert read_messages(fay.save(tmp_path)) == said
    fay.press("New chat")
    fay.page.wait_for_function("() => !document.querySelector('[data-testid=bot]')")
    fay.set("length", "8")
    fay.say("Hello")
    fay.hear(1)
    assert [m["role"] for m in read_messages(fay.save(tmp_path))] == ["user", "assistant"]
    fay.context.close()


@pytest.mark.parametrize("name, content, told", [
    ("bad.json", b"Dear diary", "this is no transcript: bad.json"), ("bad.json", b"[]", "expected a list of messages"),
    ("bad.json", b" " * 1_000_001, "bad.json has 1,000,001 bytes"), ("bad.txt", b"{}", "Invalid file type"),
    ("bad.json", b'[{"role": "<img src=http://example.com/x.png>", "content": "Hi"}]', "the role is '<img")])
def test_a_bad_transcript_is_told_in_a_line_and_changes_nothing(ada, name, content, told):
    before = ada.texts("user"), ada.texts("bot")
    ada.choose("Open", {"name": name, "mimeType": "application/json", "buffer": content})
    toast = ada.page.get_by_test_id("toast-body").filter(has_text=told)
    toast.wait_for()
    assert "Traceback" not in toast.inner_text() and toast.locator("img").count() == 0
    assert len(toast.inner_text()) < 300 and (ada.texts("user"), ada.texts("bot")) == before
    assert ada.sees_the_last_answer()
    toast.get_by_test_id("toast-close").click()
    toast.wait_for(state="detached")


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
            .map(e => [e.innerText || e.value, e.clientWidth, e.scrollWidth])""")
        assert cut == [], f"{tab}: {cut}"
        gil.shot(f"phone-{tab}")
    names = gil.page.locator("td:first-child").filter(has_text="parameters")
    assert names.evaluate("e => e.getBoundingClientRect().height") < 60
    gil.page.get_by_role("tab", name="Chat").click()
    rows = {gil.page.get_by_role("button", name=name, exact=True).bounding_box()["y"]
            for name in ("Stop", "Again", "New chat", "Open")}
    assert len(rows) == 1
    gil.context.close()


def test_who_leaves_is_forgotten(ada, server, browser):
    """Uploaded files lie in a folder of the visitor; it is gone soon after the page was closed."""
    home = server[1]
    eve = Person(browser, server[0])
    eve.say("Hello")
    eve.hear(1)
    with eve.page.expect_file_chooser() as chooser:
        eve.press("Upload documents")
    chooser.value.set_files({"name": "secret.txt", "mimeType": "text/plain", "buffer": b"The code word is tulip."})
    eve.page.wait_for_function("() => [...document.querySelectorAll('input')].some(e => e.value == 'my upload')")
    assert list(home.glob("minigpt-*/*/documents/secret.txt"))
    eve.context.close()
    end = time.monotonic() + 20
    while list(home.glob("minigpt-*/*/documents/secret.txt")) and time.monotonic() < end:
        time.sleep(0.2)
    assert not list(home.glob("minigpt-*/*/documents/secret.txt"))


def test_no_request_left_the_machine(server):
    """Neither the pages (fonts, scripts, pictures) nor the server's process asked anyone else."""
    hosts = {url.split("/")[2].split(":")[0] for url in seen if url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"} and len(seen) > 50
    fonts = [url for url in seen if re.search(r"\.(woff2?|ttf)", url)]
    assert all(url.startswith("http://127.0.0.1:") for url in fonts)
    abroad = server[1] / "abroad"
    assert not abroad.exists(), abroad.read_text(encoding="utf-8")


def test_functions_are_not_public(server):
    """Gradio's public interface names none of the page's functions."""
    with urllib.request.urlopen(f"{server[0]}gradio_api/info") as answer:
        info = json.load(answer)
    assert info["named_endpoints"] == {} and info["unnamed_endpoints"] == {}


# ------------------------------------------------------------------ a full queue

def ask(address: str, path: str, **body) -> tuple[int, dict]:
    """Post json to the page as a browser does: the status and what came back."""
    request = urllib.request.Request(f"{address}gradio_api/{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def told_of(address: str, visitor: str):
    """The messages that the page sends to a visitor, as they come; the stream is open once this returns."""
    stream = urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={visitor}", timeout=120)
    return (json.loads(line[6:]) for line in stream if line.startswith(b"data: "))


def until(messages, kind: str) -> dict:
    return next(m for m in messages if m["msg"] == kind)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A page where two answer at a time and one message may wait: its address, and the number of a function."""
    with running(tmp_path_factory.mktemp("narrow"), "--waiting", "1") as address:
        with urllib.request.urlopen(f"{address}config") as answer:
            config = json.load(answer)
        labels = {c["id"]: c["props"].get("label") or c["props"].get("value") for c in config["components"]}

        def number(label: str, event: str) -> int:
            return next(d["id"] for d in config["dependencies"] for target, e in d["targets"]
                        if labels.get(target) == label and e == event)
        yield address, number


def test_a_full_queue_is_told_and_ends(narrow, browser, alone):
    """Two are answered, one waits. The next one gets a plain message, over HTTP and in the browser, loses nothing, and
    is answered when the others have gone."""
    address, number = narrow
    talk, stop = number("Message", "submit"), number("Stop", "click")
    hal = Person(browser, address)
    hal.set("temperature", "0")
    own = alone.fork()
    hal.say("My name is Hal.")
    assert hal.hear(1) == own.reply("My name is Hal.")

    def say(visitor: str, text: str, length: int = 512):
        return ask(address, "queue/join", fn_index=talk, session_hash=visitor,
                   data=[text, "none", "none", 0, 50, 0.9, length])
    heard = {}
    for visitor in ("one", "two", "three"):
        assert say(visitor, "Tell me a long story about a lighthouse.")[0] == 200
        heard[visitor] = told_of(address, visitor)
        until(heard[visitor], "estimation" if visitor == "three" else "process_generating")
    status, said = say("four", "Hello")
    assert status == 503 and said == {"detail": "Queue is full. Max size is 1 and size is 1."}
    hal.say("What is my name?")
    toast = hal.page.get_by_test_id("toast-body").filter(has_text="busy")
    toast.wait_for()
    hal.page.wait_for_timeout(500)                     # it is faded in
    hal.shot("busy")
    assert hal.sees_the_last_answer()
    assert "Please try again" in toast.inner_text() and "Traceback" not in hal.page.content()
    assert hal.box.input_value() == "What is my name?" and hal.texts("user") == ["My name is Hal."]
    for visitor in ("one", "two", "three"):
        if visitor == "three":
            until(heard[visitor], "process_generating")
        ask(address, "run/predict", fn_index=stop, session_hash=visitor, data=[])
        assert until(heard[visitor], "process_completed")["success"]
    hal.box.press("Enter")                             # what he typed is still there
    assert hal.hear(2) == own.reply("What is my name?")
    assert say("four", "What is a whale?", 16)[0] == 200
    done = until(told_of(address, "four"), "process_completed")
    own = alone.fork()
    own.max_new_tokens = 16
    assert done["success"] and done["output"]["data"][0][1]["content"][0]["text"] == own.reply("What is a whale?")
    hal.context.close()


# ------------------------------------------------------------------ without a browser

@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = GPT2Config.preset("nano", vocab_size=20000, block_size=128, n_layer=2, n_head=2, n_embd=32)
    return GPT2(config).eval(), Tokenizer.from_pretrained()


def test_visitors_are_apart_and_leave(small):
    first = ChatSession(*small, seed=1, max_new_tokens=8, system="Be kind.")
    here = ui.Visitors(first, limit=3, patience=1000)

    def talk(name):
        for n in range(4):
            here.session(name).reply(f"Secret of {name} {n}")
    threads = [threading.Thread(target=talk, args=[name]) for name in "abc"]
    for action in (threading.Thread.start, threading.Thread.join):
        list(map(action, threads))
    for name in "abc":
        said = [m["content"] for m in here.session(name).messages if m["role"] == "user"]
        assert said == [f"Secret of {name} {n}" for n in range(4)]
        seen = small[1].decode(here.session(name).fit("x", here.session(name).exchanges)[0])
        assert not any(f"Secret of {other}" in seen for other in "abc" if other != name)
    assert first.messages == [{"role": "system", "content": "Be kind."}]
    with pytest.raises(ValueError, match="3 people"):
        here.session("d")
    folder = here.folder("a")
    folder.mkdir()
    (folder / "x").write_text("mine", encoding="utf-8")
    here.leave("a")
    assert not folder.exists() and here.session("d").exchanges == [] and len(here) == 3
    here.session("b"), here.session("d")
    here.patience = 0
    here.session("e")                                  # c was silent longest
    assert sorted(here._here) == ["b", "d", "e"]
    for bad in (None, ""):
        with pytest.raises(ValueError, match="needs a name"):
            here.session(bad)


def test_who_leaves_while_an_answer_comes(small):
    here = ui.Visitors(ChatSession(*small, seed=1, max_new_tokens=90))
    session = here.session("a")
    stream = session.stream("Hello")
    next(stream)
    here.leave("a")
    list(stream)
    assert session.finish_reason == "cancelled" and len(here) == 0


def test_a_message_in_the_queue_is_stopped_too(small):
    """Two visitors hold the places, five wait. Stop, New chat and goodbye reach those who wait: they get no answer. The
    others do, and so does the next message of who stopped."""
    gr = pytest.importorskip("gradio")
    here = ui.Visitors(ChatSession(*small, seed=1, max_new_tokens=8))
    with gr.Blocks(analytics_enabled=False) as page:
        ui.chat_tab(here, {}, {}, uploads=False)
    number = {f.fn.__name__: n for n, f in page.fns.items()}
    _, address, _ = page.queue().launch(server_name="127.0.0.1", server_port=free_port(), quiet=True, inbrowser=False,
                                        prevent_thread_lock=True, **ui.page_style())

    def press(visitor: str, name: str, *values) -> None:
        path = "queue/join" if name in ("talk", "again") else "run/predict"
        assert ask(address, path, fn_index=number[name], session_hash=visitor, data=list(values))[0] == 200
    settings, heard = ["none", "none", 0.7, 50, 0.9, 8], {}
    try:
        here.session("again").reply("Before")
        before = here.session("again").exchanges
        with here.session("one")._turn, here.session("two")._turn:       # their answers cannot begin
            for visitor in ("one", "two"):
                press(visitor, "talk", "Hello", *settings)
                heard[visitor] = told_of(address, visitor)
                until(heard[visitor], "process_starts")
            for visitor in ("stops", "again", "clears", "leaves", "waits"):
                press(visitor, *(["again"] if visitor == "again" else ["talk", "Hello"]), *settings)
                heard[visitor] = told_of(address, visitor)
                until(heard[visitor], "estimation")
            press("stops", "stop"), press("again", "stop"), press("clears", "clear"), here.leave("leaves")
        assert all(until(messages, "process_completed")["success"] for messages in heard.values())
        assert [len(here.session(name).exchanges) for name in ("one", "two", "stops", "clears", "waits")] == [1, 1, 0, 0, 1]
        assert here.session("again").exchanges == before and "leaves" not in here._here
        press("stops", "talk", "Hello", *settings)
        assert until(told_of(address, "stops"), "process_completed")["success"]
        assert [user for user, _ in here.session("stops").exchanges] == ["Hello"]
    finally:
        page.close(verbose=False)


@pytest.mark.parametrize("launches", [1, 2])
def test_messages_that_come_at_once_do_not_overfill_the_queue(small, tmp_path, launches):
    """Two visitors hold the places; of thirty that ask in the same moment two may wait, the others are told. Also on a
    page that was closed and launched again."""
    first = ChatSession(*small, seed=1, max_new_tokens=8)
    page = ui.gradio_app(first, votes=tmp_path / "votes.jsonl", waiting=2, visitors=99, uploads=False)
    here = next(cell.cell_contents for f in page.fns.values() if f.fn.__name__ == "goodbye"
                for cell in f.fn.__closure__ if isinstance(cell.cell_contents, ui.Visitors))
    talk = next(n for n, f in page.fns.items() if f.fn.__name__ == "talk")
    for launch_number in range(launches):
        _, address, _ = page.launch(server_name="127.0.0.1", server_port=free_port(), quiet=True, inbrowser=False,
                                    prevent_thread_lock=True, **ui.page_style())

        def join(visitor: str) -> int:
            return ask(address, "queue/join", fn_index=talk, session_hash=f"{visitor}{launch_number}",
                       data=["Hello", "none", "none", 0.7, 50, 0.9, 8])[0]
        heard = {}
        try:
            with here.session(f"one{launch_number}")._turn, here.session(f"two{launch_number}")._turn:   # they cannot begin
                for visitor in ("one", "two"):
                    assert join(visitor) == 200
                    heard[visitor] = told_of(address, f"{visitor}{launch_number}")
                    until(heard[visitor], "process_starts")
                barrier = threading.Barrier(30)

                def come(number: int) -> int:
                    barrier.wait()
                    return join(f"visitor{number}-")
                with ThreadPoolExecutor(30) as crowd:
                    assert sorted(crowd.map(come, range(30))) == [200] * 2 + [503] * 28
                assert len(page._queue) == 2
            assert all(until(messages, "process_completed")["success"] for messages in heard.values())
            end = time.monotonic() + 60
            while len(page._queue):
                assert time.monotonic() < end, "messages are left in the queue"
                time.sleep(0.05)
        finally:
            page.close(verbose=False)


def test_a_message_stopped_while_made_ready_ends_no_later_one(small, monkeypatch):
    """The first one's documents load for long; it is stopped; the second one begins, and is answered to its end."""
    gr = pytest.importorskip("gradio")
    here = ui.Visitors(ChatSession(*small, seed=1, max_new_tokens=40))
    with gr.Blocks(analytics_enabled=False) as page:
        ui.chat_tab(here, {}, {}, uploads=False)
    made = {f.fn.__name__: f for f in page.fns.values()}
    loads, loaded, equip = threading.Event(), threading.Event(), ui.Visitors.equip

    def slowly(self, name, kind, choice, value):
        if threading.current_thread().name == "first" and kind == "documents":
            loads.set()
            loaded.wait(60)
        return equip(self, name, kind, choice, value)
    monkeypatch.setattr(ui.Visitors, "equip", slowly)

    def request() -> SimpleNamespace:
        return SimpleNamespace(session_hash="visitor", state=SimpleNamespace())
    settings, heard = ["none", "none", 0.7, 50, 0.9, 40], []
    asked = request()
    made["talk"].validator(asked)
    first = threading.Thread(target=lambda: heard.extend(made["talk"].fn(asked, "first", *settings)), name="first", daemon=True)
    first.start()
    loads.wait(60)
    made["stop"].fn(request())
    asked = request()
    made["talk"].validator(asked)
    second = made["talk"].fn(asked, "second", *settings)
    next(second), next(second)                         # it is being answered
    loaded.set()
    first.join(60)
    assert not first.is_alive()
    list(second)
    session = here.session("visitor")
    assert [user for user, _ in session.exchanges] == ["second"] and session.finish_reason == "length"


def test_uploaded_names_stay_in_their_folder(tmp_path):
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "a.md").write_text("x", encoding="utf-8")
    folder = ui.keep_files([tmp_path / "up" / ".." / "up" / "a.md"], tmp_path / "own")
    assert [p.relative_to(tmp_path).as_posix() for p in folder.rglob("*")] == ["own/a.md"]
    ui.keep_files([], folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("bad, match", [(dict(votes="nowhere/votes.jsonl"), "no such folder"),
                                        (dict(visitors=0), "visitors=0"), (dict(waiting=0), "waiting=0")])
def test_bad_arguments_of_the_page(small, bad, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        ui.gradio_app(ChatSession(*small), **bad)


def test_duels_are_fair(small):
    """Both systems read the same prompt with their own settings; the visitor's session is left alone."""
    session = ChatSession(*small, seed=1, max_new_tokens=8)
    session.reply("Before")
    match = ui.duel(session, {"a": {"temperature": 0}, "b": {"temperature": 1.5, "top_k": 3}}, ["a", "b"], "Hello")
    for name, settings in (("a", dict(temperature=0)), ("b", dict(temperature=1.5, top_k=3))):
        assert match.answers[name] == ChatSession(*small, seed=1, max_new_tokens=8, **settings).reply("Hello")
    assert len(session.exchanges) == 1 and session.temperature == 0.7
    with pytest.raises(ValueError, match="against itself"):
        ui.duel(session, {"a": {}}, ["a", "a"], "Hello")


def test_without_uploads_nothing_is_opened(small, tmp_path):
    names = [{b.value for b in ui.gradio_app(ChatSession(*small), votes=tmp_path / "v", uploads=uploads).blocks.values()
              if b.get_block_name() == "button"} | {
                  b.label for b in ui.gradio_app(ChatSession(*small), votes=tmp_path / "v", uploads=uploads).blocks.values()
                  if b.get_block_name() == "uploadbutton"} for uploads in (True, False)]
    assert names[0] - names[1] == {"Open", "Upload adapter", "Upload documents"}


def test_a_card_shows_marks_and_hides_tags(tmp_path):
    """What begins a tag is text, whatever stands before it; a `<` that begins none stays as it is, in code too."""
    (tmp_path / "README.md").write_text("`<|im_end|>` 1 < 2 `<b>` <b>x <img src=y> <!-- z --> </i> <?p", encoding="utf-8")
    assert ui.model_card(tmp_path) == ("`<|im_end|>` 1 < 2 `&lt;b>` &lt;b>x &lt;img src=y> &lt;!-- z --> &lt;/i> &lt;?p")
