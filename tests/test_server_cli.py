"""`minigpt serve` as a process: it starts, refuses bad flags, ends in peace; and what lies in deploy/."""
import configparser
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import minigpt, one_line

from minigpt.engine import serving
from minigpt.engine.files import ASSETS
from minigpt.engine.tokenizer import Tokenizer
from minigpt.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that goes on until it is told to stop."""
    import torch
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained()
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, block_size=1024, n_layer=1, n_head=2, n_embd=16,
                            bos_token_id=0, eos_token_id=0))
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path, tokenizer)
    return path


@contextmanager
def process(command, **env):
    """(process, host:port) of a server that tells its address on standard output."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | env
    server = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        line = server.stdout.readline()
        found = re.search(r"http://(?:127\.0\.0\.1|0\.0\.0\.0):(\d+)", line)
        assert found, line + server.stderr.read()
        yield server, f"127.0.0.1:{found[1]}"
    finally:
        server.kill()
        server.wait()
        server.stdout.close(), server.stderr.close()


def post(where, body, key=None):
    connection = http.client.HTTPConnection(where, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body),
                       JSON | ({"Authorization": f"Bearer {key}"} if key else {}))
    return connection, connection.getresponse()


def metrics(where: str, key: str) -> str:
    connection = http.client.HTTPConnection(where, timeout=60)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
    return connection.getresponse().read().decode()


def test_a_process_serves_and_ends_in_peace(folder):
    """SIGTERM while one answer runs and one waits: the first ends whole, the second is sent away, the exit code is 0."""
    flags = ["serve", "--model", folder, "--port", "0", "--max-batch", "1", "--name", "tiny-chat"]
    with process(["-m", "minigpt", *map(str, flags)], MINIGPT_API_KEY="k") as (server, where):
        body = dict(model="tiny-chat", prompt="One", max_tokens=1000, seed=1, top_k=5, stream=True,
                    stream_options={"include_usage": True})
        assert post(where, body)[1].status == 401, "the key comes from the environment"
        connection, first = post(where, body, "k")
        assert first.status == 200 and first.readline().startswith(b"data: ")
        outcome = []
        waiting = threading.Thread(target=lambda: outcome.append(post(where, body, "k")[1]))
        waiting.start()
        end = time.monotonic() + 60
        while "\nminigpt_waiting 1.0" not in metrics(where, "k"):
            assert time.monotonic() < end, "the second request never waited"
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        rest = first.read().decode()
        waiting.join()
        assert rest.endswith("data: [DONE]\n\n")
        usage = json.loads(rest.split("\n\n")[-3].removeprefix("data: "))["usage"]
        reasons = re.findall(r'"finish_reason": "(\w+)"', rest)
        assert reasons == ["stop"] or reasons == ["length"] and usage["completion_tokens"] == 1000
        assert outcome[0].status == 503 and outcome[0].headers["Retry-After"]
        assert json.loads(outcome[0].read())["error"]["code"] == "shutting_down"
        assert server.wait(30) == 0 and "Traceback" not in server.stderr.read()


def test_the_health_check_of_the_container_passes_with_named_hosts(folder):
    """As the image runs it, reachable from elsewhere under one public name: its own health check is answered."""
    docker = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    check = json.loads(re.search(r"HEALTHCHECK .*CMD \\\n\s*(\[.*\])", docker)[1])
    flags = ["serve", "--model", folder, "--host", "0.0.0.0", "--port", "0", "--allowed-host", "Chat.example.org"]
    with process(["-m", "minigpt", *map(str, flags)], MINIGPT_API_KEY="k") as (server, where):
        port = where.split(":")[1]
        assert check[0] == "python" and "127.0.0.1:8000" in check[2]
        done = subprocess.run([sys.executable, "-c", check[2].replace(":8000", f":{port}")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for name, status in (("chat.example.org", 200), (f"localhost:{port}", 200), ("evil.example", 421)):
            connection = http.client.HTTPConnection(where, timeout=60)
            connection.request("GET", "/health", headers={"Host": name})
            assert connection.getresponse().status == status, name


def test_local_names_stay_allowed_beside_those_that_are_named():
    here = {"127.0.0.1", "localhost", "[::1]"}
    assert set(serving.allowed_hosts("0.0.0.0", ["chat.example.org"])) == here | {"chat.example.org"}
    assert set(serving.allowed_hosts("127.0.0.1", [])) == here and serving.allowed_hosts("0.0.0.0", []) == []


@pytest.mark.parametrize("host, key, warned", [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "k", False),
                                               ("::1", None, False), ("192.168.0.1", None, True)])
def test_an_open_server_is_warned_of(host, key, warned, capsys):
    """Whatever names it answers to: a name keeps nobody out."""
    serving.warn_if_open(host, key)
    assert ("set an API key" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("arguments, message", [
    (["--max-batch", "0"], "max_batch=0"), (["--max-queue", "-1"], "max_queue=-1"), (["--timeout", "0"], "timeout=0"),
    (["--temperature", "-1"], "temperature=-1"), (["--model", "nowhere"], "nowhere"),
    (["--threads", "100000000"], "--threads"), (["--grace", "nan"], "--grace"), (["--api-key", ""], "--api-key"),
    (["--host", "not.a.host.invalid"], "not.a.host.invalid")])
def test_bad_flags_are_named(arguments, message):
    assert message in one_line("serve", *arguments)


@pytest.mark.parametrize("command", ["serve", "ui"])
def test_a_port_in_use_is_an_error_of_one_line(command):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = one_line(command, "--port", port)
    assert "in use" in said and f"127.0.0.1, port {port}" in said


def test_help_is_quick_and_the_command_is_registered():
    code = ("import sys, minigpt.engine.cli; heavy = {'torch', 'gradio', 'fastapi', 'uvicorn'};"
            "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr.decode()
    shown = minigpt("serve", "--help")[0]
    for flag in ("--adapter", "--api-key", "--max-batch", "--cors", "--allowed-host", "--prefix-tokens", "--grace"):
        assert flag in shown


# ------------------------------------------------------------------ deploy/

def test_the_space_runs():
    """app.py for real: the API of the shipped model, on a port of our choice."""
    with process([DEPLOY / "space" / "app.py"], PORT="0", HOST="127.0.0.1", GRADIO_ANALYTICS_ENABLED="False",
                 MINIGPT_API_KEY="") as (server, where):
        connection = http.client.HTTPConnection(where, timeout=60)
        connection.request("GET", "/")
        page = connection.getresponse()
        assert page.status == 200 and page.read() == (ASSETS / "web" / "index.html").read_bytes()
        connection.request("HEAD", "/model/model.safetensors")
        head = connection.getresponse()
        assert head.status == 200 and not head.read()
        assert int(head.headers["Content-Length"]) == (ASSETS / "minigpt-chat" / "model.safetensors").stat().st_size
        _, response = post(where, dict(model="minigpt-chat", prompt="One day", max_tokens=5, temperature=0))
        assert response.status == 200 and json.loads(response.read())["choices"][0]["text"]


def test_the_space_card_names_what_is_there():
    head = (DEPLOY / "space" / "README.md").read_text(encoding="utf-8").split("---")[1]
    card = dict(line.split(": ", 1) for line in head.strip().splitlines())
    assert card["sdk"] == "gradio" and (DEPLOY / "space" / card["app_file"]).exists()
    assert int(card["sdk_version"].split(".")[0]) >= 5


def flags_of(command):
    return set(re.findall(r"--[a-z-]+", command))


def test_every_file_uses_flags_that_exist():
    known = flags_of(minigpt("serve", "--help")[0])
    docker = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    start = "".join(re.findall(r"(?m)^(?:ENTRYPOINT|CMD) .*$", docker))
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "minigpt.service", encoding="utf-8")
    page = (DEPLOY / "README.md").read_text(encoding="utf-8")
    [compose] = re.findall(r"(?m)^ +command: .*$", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    for used in (start, unit["Service"]["ExecStart"], compose):
        assert flags_of(used) and flags_of(used) <= known
    for flag in set(re.findall(r"`(--[a-z-]+)", page)):
        assert flag in known, flag
    for name in re.findall(r"(?m)^\| (`.*?`) \|", page):
        assert all((DEPLOY / one).exists() for one in re.findall(r"`(.+?)`", name)), name
    for copied in re.findall(r"(?m)^COPY (.*) \S+$", docker):
        assert all((ROOT / name).exists() for name in copied.split()), copied


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_the_unit_is_valid(tmp_path):
    text = (DEPLOY / "minigpt.service").read_text().replace("/opt/minigpt/bin/minigpt", sys.executable)
    (tmp_path / "minigpt.service").write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / "minigpt.service"], capture_output=True, text=True)
    assert "minigpt.service" not in done.stderr, done.stderr


def test_compose_starts_the_server_and_a_proxy_that_finds_it():
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    server, proxy = services["minigpt"], services["caddy"]
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert "ports" not in server                                  # only the proxy is reached from outside
    port = re.search(r"EXPOSE (\d+)", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))[1]
    assert f"MINIGPT_SERVER=minigpt:{port}" in proxy["environment"]
    source, target, _ = proxy["volumes"][0].split(":")
    assert (DEPLOY / source).is_file() and target == "/etc/caddy/Caddyfile"
    asked = set(re.findall(r"\{\$(\w+)", (DEPLOY / source).read_text(encoding="utf-8")))
    assert asked == {one.partition("=")[0] for one in proxy["environment"]}
