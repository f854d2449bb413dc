"""ChatWidget in a real JupyterLab: typed, clicked, stopped, all by keyboard, in the light and the dark theme."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from minigpt import ui
from minigpt.bpe import BPETokenizer
from minigpt.chat import ChatSession
from minigpt.generation import generate_options
from minigpt.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
    (home / "work").mkdir()
    nb = {"cells": [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "source": text.strip(), "outputs": [],
                     "execution_count": None} for i, text in enumerate(CELLS)],
          "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}},
          "nbformat": 4, "nbformat_minor": 5}
    (home / "work" / "chat.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"),
                        "JUPYTER_RUNTIME_DIR": str(home / "run"), "IPYTHONDIR": str(home / "ipython"),
                        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1",
         "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={home / 'work'}",
         "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None", "--LabApp.expose_app_in_browser=True"],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, "JupyterLab stopped"
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not start")
        yield f"http://127.0.0.1:{port}/lab/tree/chat.ipynb?reset"
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(scope="module")
def page(lab):
    """The notebook in Chromium, its cells run; requests that leave the machine are refused and noted in `seen`."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1200, "height": 1150})

        def route(r):
            seen.append(r.request.url)
            r.continue_() if "127.0.0.1" in r.request.url else r.abort()
        page.route("**/*", route)
        page.goto(lab)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.locator(".widget-text input").first.wait_for(timeout=90_000)
        yield page
        browser.close()


def shot(page, name: str) -> None:
    if folder := os.environ.get("MINIGPT_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"chat-widget-{name}.png"))


def test_try(page):
    box = page.locator(".widget-text input").first
    for q in ("What is a whale?", "Tell me a joke.", "Tell me a short story about a fox and a kite."):
        box.click()
        page.keyboard.type(q)
        page.keyboard.press("Enter")
        time.sleep(5)
    shot(page, "2")
    page.get_by_role("button", name="Next tokens").click()
    time.sleep(2)
    shot(page, "3")
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    time.sleep(2)
    shot(page, "4")
