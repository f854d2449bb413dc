"""The text box of chapter 02 in a real JupyterLab: a typed sentence makes a new drawing."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def shortened(nb):
    """Up to the panel, without the cells that only draw or explain."""
    cells = []
    for cell in nb["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and (not text.startswith(("plot_", "look(", "figure")) or "def " in text):
            cells.append({**cell, "outputs": [], "execution_count": None})
        if "display(shown" in text:
            return {**nb, "cells": cells}
    raise AssertionError("the notebook shows no panel")


@pytest.fixture
def lab(tmp_path):
    nb = json.loads((ROOT / "nbs" / "02_attention.ipynb").read_text(encoding="utf-8"))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "attention.ipynb").write_text(json.dumps(shortened(nb)), encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data"),
                        "JUPYTER_RUNTIME_DIR": str(tmp_path / "run"), "IPYTHONDIR": str(tmp_path / "ipython"),
                        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1",
         "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={tmp_path / 'work'}",
         "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"],
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
        yield f"http://127.0.0.1:{port}/lab/tree/attention.ipynb?reset"
    finally:
        server.terminate()
        server.wait(timeout=20)


def test_a_typed_sentence_is_drawn(lab):
    from playwright.sync_api import expect, sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.route("**/*", lambda r: r.continue_() if "127.0.0.1" in r.request.url else r.abort())
        page.goto(lab)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        box = page.locator(".widget-text input").first
        box.wait_for(state="attached", timeout=90_000)
        box.scroll_into_view_if_needed()
        drawing = page.locator("img.widget-image").first
        expect(drawing).to_be_visible(timeout=30_000)
        seen = [drawing.get_attribute("src")]
        box.fill("A small bird sings in the tree.")
        assert drawing.get_attribute("src") == seen[0]  # nothing before Enter
        box.press("Enter")
        expect(drawing).not_to_have_attribute("src", seen[0], timeout=30_000)
        assert drawing.evaluate("image => image.decode().then(() => image.naturalWidth)") > 600
        box.fill("word " * 40)
        box.press("Enter")
        told = page.locator(".widget-label", has_text="fit into the picture")
        expect(told).to_be_visible(timeout=30_000)
        if folder := os.environ.get("MINIGPT_SCREENSHOTS"):
            page.screenshot(path=str(Path(folder) / "attention-widget.png"))
        browser.close()
