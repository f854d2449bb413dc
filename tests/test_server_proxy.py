"""The server behind nginx, with the configuration that deploy/README.md prints: TLS, streams, limits, clients that leave."""
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from browsers import BROWSER, launch
from fastapi import Request
from test_server import wait_until

from minigpt.chat import ChatSession
from minigpt.engine.tokenizer import Tokenizer
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.engine.api_schema import Limits
from minigpt.engine.app import create_app
from minigpt.engine.serving import free_port, running

PAGE = Path(__file__).resolve().parent.parent / "deploy" / "README.md"
NAME, KEY = "chat.example.org", "s3cret"
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
ASK = {"model": "minigpt-chat", "prompt": "One", "max_tokens": 200, "seed": 1}
MAIN = """daemon off; pid {folder}/pid; error_log stderr; {user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{site}
}}
"""
pytestmark = [pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not here") for name in ("nginx", "openssl")]


def configuration(folder, port, behind):
    """The page's nginx block, with our port, certificate and server put in their places; each has to be there once."""
    site, = re.findall(r"```\n(limit_req_zone.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    places = {"listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
              f"/etc/letsencrypt/live/{NAME}/fullchain.pem": f"{folder}/cert.pem",
              f"/etc/letsencrypt/live/{NAME}/privkey.pem": f"{folder}/key.pem"}
    for old, new in places.items():
        assert site.count(old) == 1, old
        site = site.replace(old, new)
    assert "http://127.0.0.1:8000;" in site
    site = site.replace("http://127.0.0.1:8000;", f"http://{behind};")
    user = "user root;" if os.geteuid() == 0 else ""
    return MAIN.format(folder=folder, site=site, user=user)


class Proxied:
    """A server in this process whose engine obeys `gate`, and nginx in front of it."""

    def __init__(self, folder, url, app, port):
        self.app, self.engine, self.port = app, app.state.engine, port
        self.url, self.context = url, ssl.create_default_context(cafile=folder / "cert.pem")

    def connect(self):
        connection = http.client.HTTPSConnection(NAME, self.port, timeout=60)
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sock = self.context.wrap_socket(raw, server_hostname=NAME)
        return connection

    def ask(self, method="POST", path="/v1/completions", body=ASK, headers=HEADERS):
        connection = self.connect()
        connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
        return connection, connection.getresponse()


@pytest.fixture
def proxied(tmp_path):
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained()
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, block_size=256, n_layer=1, n_head=2, n_embd=16,
                            bos_token_id=0, eos_token_id=0))
    app = create_app(model, tokenizer, api_key=KEY, hosts=["127.0.0.1", NAME], limits=Limits(max_batch=1, max_queue=1))

    @app.get("/seen")
    async def seen(request: Request):
        return {"scheme": request.url.scheme, "host": request.url.hostname, "client": request.client.host}

    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem", "-subj", f"/CN={NAME}",
                    "-addext", f"subjectAltName=DNS:{NAME}"], check=True, capture_output=True)
    port = free_port()
    with running(app) as url:
        (tmp_path / "nginx.conf").write_text(configuration(tmp_path, port, url.removeprefix("http://")))
        log = open(tmp_path / "nginx.log", "w")
        nginx = subprocess.Popen(["nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf"], stderr=log)
        try:
            def listens():
                assert nginx.poll() is None, (tmp_path / "nginx.log").read_text()
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0
            wait_until(listens)
            yield Proxied(tmp_path, url, app, port)
        finally:
            nginx.terminate()
            nginx.wait(20)
            log.close()


class Gate:
    """Lets the engine make so many steps with a row as there are permits."""

    def __init__(self, engine):
        self.engine, self.step, self.permits = engine, engine.batch.step, threading.Semaphore(0)
        self.free = threading.Event()
        engine.batch.step = self

    def __call__(self):
        while self.engine.batch.rows and not self.free.is_set() and not self.permits.acquire(timeout=0.01):
            pass
        return self.step()


def test_a_stream_comes_token_by_token(proxied):
    """The engine makes its next step only when the last token has come through; a proxy that collects would stall it."""
    gate = Gate(proxied.engine)
    connection, response = proxied.ask(body=ASK | {"stream": True, "max_tokens": 6, "top_k": 1})
    assert response.status == 200 and response.headers["Content-Type"].startswith("text/event-stream")
    pieces = []
    for number in range(6):
        event = json.loads(response.readline().removeprefix(b"data: "))
        assert response.readline() == b"\n" and proxied.engine.batch.counts["generated"] <= number + 2
        pieces.append(event["choices"][0]["text"])
        gate.permits.release()
    assert response.read() == b"data: [DONE]\n\n"
    connection.close()
    gate.free.set()
    whole = json.loads(proxied.ask(body=ASK | {"max_tokens": 6, "top_k": 1})[1].read())
    assert whole["choices"][0]["text"] == "".join(pieces) and all(pieces[:-1])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_noticed_through_the_proxy(proxied, stream):
    """nginx closes its own connection when the client leaves; the engine is held in a step until that is known."""
    gate = Gate(proxied.engine)
    connection = proxied.connect()
    connection.request("POST", "/v1/completions", json.dumps(ASK | {"stream": stream}), HEADERS)
    wait_until(lambda: proxied.engine.batch.rows)
    ask, number = proxied.engine.batch.rows[0]
    response = connection.getresponse() if stream else None
    if stream:
        assert response.readline().startswith(b"data: ")
        response.close()
    connection.close()
    wait_until(lambda: ask.cancelled)
    before = len(ask.sequences[0].result.ids)
    gate.free.set()
    wait_until(lambda: not proxied.engine.batch.rows)
    assert len(ask.sequences[0].result.ids) - before <= 1


def test_what_the_server_says_comes_through(proxied):
    """Its refusals with their headers, and to the server the client's own name, address and https."""
    def told(*args, **kwargs):
        connection, response = proxied.ask(*args, **kwargs)
        data = response.read()
        connection.close()
        return response.status, response.headers, json.loads(data)

    assert told("GET", "/seen", None)[2] == {"scheme": "https", "host": NAME, "client": "127.0.0.1"}
    status, headers, data = told("GET", "/v1/models", None, {})
    assert status == 401 and headers["WWW-Authenticate"] == "Bearer" and headers["X-Request-Id"]
    assert data["error"]["code"] == "invalid_api_key"
    assert told("GET", "/health", None, {"Host": "evil.example"})[0] == 421
    status, _, data = told(body="x" * 1_000_001)
    assert status == 413 and data["error"]["code"] == "request_too_large"
    gate = Gate(proxied.engine)
    first, second = proxied.connect(), proxied.connect()
    for connection, full in ((first, proxied.engine.batch), (second, proxied.engine)):
        connection.request("POST", "/v1/completions", json.dumps(ASK), HEADERS)
        wait_until(lambda: full.rows if connection is first else full.waiting)
    status, headers, data = told()
    assert status == 429 and headers["Retry-After"] == "1" and data["error"]["code"] == "rate_limit_exceeded"
    gate.free.set()
    assert [c.getresponse().status for c in (first, second)] == [200, 200]


def test_the_proxy_limits_each_client_and_not_the_page(proxied):
    """More than the burst is refused by nginx in the API's own words; other paths are not counted."""
    connection = proxied.connect()

    def get(path):
        connection.request("GET", path, headers=HEADERS)
        response = connection.getresponse()
        return response.status, response.headers, response.read()

    assert {get(path)[0] for path in ["/", "/health", "/seen"] * 20} == {200}
    for number in range(300):
        status, headers, data = get("/v1/models")
        if status != 200:
            break
    assert number >= 20 and status == 429 and headers["Retry-After"]
    assert json.loads(data)["error"]["code"] == "rate_limit_exceeded"
    assert get("/health")[0] == 200
    connection.close()
    connection, response = proxied.ask("POST", "/health", "x" * 1_100_000)
    assert response.status == 413


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_has_both_engines_behind_the_proxy(proxied):
    """Over HTTPS, by the public name and with the key: a turn on the server, one in the browser, nothing from elsewhere."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    address, asked = f"https://{NAME}:{proxied.port}/", []
    with sync.sync_playwright() as play:
        browser = launch(play, f"--host-resolver-rules=MAP {NAME} 127.0.0.1")
        for engine, place in (("server", "on the server"), ("browser", "in this browser")):
            settings = json.dumps({"engine": engine, "key": KEY, "temperature": 0, "max_tokens": 12})
            context = browser.new_context(ignore_https_errors=True)
            context.add_init_script(f"localStorage['minigpt.settings'] = {json.dumps(settings)}")
            page = context.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            page.locator(".engine").get_by_text(place).wait_for()
            page.get_by_label("Type a message").fill("Hello!")
            page.keyboard.press("Enter")
            page.get_by_role("button", name="Regenerate").wait_for()
            answer = " ".join(page.locator("article.assistant .said").inner_text().split())
            if engine == "browser":
                assert answer == " ".join(ChatSession(temperature=0, max_new_tokens=12).reply("Hello!").split())
            context.close()
        browser.close()
    assert proxied.engine.batch.counts["generated"] > 0
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)
