"""The text box of the notebook on attention patterns in a real JupyterLab: a typed sentence makes a new drawing."""
import json
import os
from pathlib import Path

import pytest
from browsers import BROWSER, ROOT, jupyter_lab, launch, run_all_cells

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
    nb = json.loads((ROOT / "nbs" / "deeper" / "attention_patterns.ipynb").read_text(encoding="utf-8"))
    with jupyter_lab(tmp_path, "attention.ipynb", shortened(nb)) as address:
        yield address


def test_a_typed_sentence_is_drawn(lab):
    from playwright.sync_api import expect, sync_playwright
    with sync_playwright() as play:
        browser = launch(play)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.route("**/*", lambda r: r.continue_() if "127.0.0.1" in r.request.url else r.abort())
        run_all_cells(page, lab)
        box = page.locator(".widget-text input").first
        box.wait_for(state="attached", timeout=240_000)
        box.scroll_into_view_if_needed()
        drawing = page.locator("img.widget-image").first
        expect(drawing).to_be_visible(timeout=120_000)
        seen = [drawing.get_attribute("src")]
        box.fill("A small bird sings in the tree.")
        assert drawing.get_attribute("src") == seen[0]  # nothing before Enter
        box.press("Enter")
        expect(drawing).not_to_have_attribute("src", seen[0], timeout=120_000)
        assert drawing.evaluate("image => image.decode().then(() => image.naturalWidth)") > 600
        box.fill("word " * 40)
        box.press("Enter")
        told = page.locator(".widget-label", has_text="fit into the picture")
        expect(told).to_be_visible(timeout=120_000)
        if folder := os.environ.get("MINIGPT_SCREENSHOTS"):
            page.screenshot(path=str(Path(folder) / "attention-widget.png"))
        browser.close()
