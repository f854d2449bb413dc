"""The browser of the browser tests, and a JupyterLab of its own for a test, with one notebook in it."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def launch(play, *more: str):
    """Chromium, without a window; `play` is what `sync_playwright()` gives, `more` are flags of Chromium."""
    return play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage", *more])


@contextmanager
def jupyter_lab(home: Path, name: str, nb: dict) -> Iterator[str]:
    """Start JupyterLab in an empty folder that holds the notebook `nb` as `name`; the address that opens it."""
    (home / "work").mkdir()
    (home / "work" / name).write_text(json.dumps(nb), encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"),
                        "JUPYTER_RUNTIME_DIR": str(home / "run"), "IPYTHONDIR": str(home / "ipython"),
                        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1",
         "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={home / 'work'}",
         "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None",
         "--LabApp.expose_app_in_browser=True"],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(360):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, "JupyterLab stopped"
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not start")
        yield f"http://127.0.0.1:{port}/lab/tree/{name}?reset"
    finally:
        server.terminate()
        server.wait(timeout=20)


def run_all_cells(page, address: str) -> None:
    """Open the notebook at `address`, wait for its kernel, and run all of it."""
    page.goto(address)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=180_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def contrast(page, selector: str) -> float:
    """WCAG contrast of an element's text with what is behind it (all backgrounds laid over each other)."""
    return page.locator(selector).last.evaluate("""element => {
        const parse = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number)
        const layers = []
        for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor))
        let under = [255, 255, 255]
        for (const [r, g, b, a = 1] of layers.reverse()) under = [r, g, b].map((x, i) => x * a + under[i] * (1 - a))
        const light = rgb => rgb.map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
            .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0)
        const two = [light(parse(getComputedStyle(element).color).slice(0, 3)), light(under)].sort((a, b) => b - a)
        return (two[0] + .05) / (two[1] + .05) }""")
