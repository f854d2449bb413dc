"""The server under load: time to the first token, and tokens per second with 1 and with 8 clients at once.

  python benchmarks/serve.py [--clients 1 2 4 8] [--new 64] [--rounds 5] [--stream]

The server (`minigpt serve`, the shipped model) is a process of its own and the clients are another, all on this machine
and on 127.0.0.1. Each client asks for one answer after the other. `speedup` is to one client. `first_ms` is the median
time from sending a chat request to its first event, with nothing else running; the worst of them is given too.
"""
from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import _common as c

ROOT = Path(os.environ.get("MINIGPT_DIR", Path(__file__).resolve().parent.parent))
STORIES = ["One day the little dog", "Once upon a time there was a", "The old man in the lighthouse", "A girl named Lily",
           "In the middle of the forest", "It was a cold morning when", "The cat and the bird", "Long ago, a king"]
TALKS = ["What is a whale?", "Tell me a joke.", "Why is the sky blue?", "Write a story about a lighthouse.", "Who are you?"]


@contextmanager
def served(*flags: str):
    """(host:port, process) of a `minigpt serve` on a free port; it ends with the block."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "minigpt", "serve", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        line = process.stdout.readline()
        yield re.search(r"127\.0\.0\.1:\d+", line)[0], process
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def post(connection: http.client.HTTPConnection, path: str, body: dict):
    """The response to a JSON body."""
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def draw(where: str, number: int, count: int, new: int, stream: bool, out: list) -> None:
    """One client: `count` answers of `new` tokens, one after the other."""
    connection = http.client.HTTPConnection(where, timeout=120)
    for i in range(count):
        body = {"model": "minigpt-chat", "prompt": STORIES[(number + i) % 8], "max_tokens": new, "seed": 100 * number + i,
                "temperature": 0.7, "stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
        answer = post(connection, "/v1/completions", body)
        data = answer.read().decode()
        assert answer.status == 200, data
        last = data.split("\n\n")[-3].removeprefix("data: ") if stream else data
        out.append(json.loads(last)["usage"]["completion_tokens"])
    connection.close()


def rate(where: str, clients: int, count: int, new: int, stream: bool) -> float:
    """Tokens per second of all clients together."""
    out: list[int] = []
    threads = [threading.Thread(target=draw, args=(where, i, count, new, stream, out)) for i in range(clients)]
    begun = time.perf_counter()
    for action in (threading.Thread.start, threading.Thread.join):
        list(map(action, threads))
    return sum(out) / (time.perf_counter() - begun)


def first_tokens(where: str, count: int) -> list[float]:
    """Milliseconds to the first event of streamed chats, one after the other."""
    connection, times = http.client.HTTPConnection(where, timeout=120), []
    for i in range(count):
        body = {"model": "minigpt-chat", "messages": [{"role": "user", "content": TALKS[i % len(TALKS)]}], "stream": True,
                "max_tokens": 4, "seed": i}
        begun = time.perf_counter()
        response = post(connection, "/v1/chat/completions", body)
        response.readline()
        times.append(1000 * (time.perf_counter() - begun))
        response.read()
    connection.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=2, help="answers for each client and round")
    parser.add_argument("--stream", action="store_true")
    args = parser.parse_args()
    with served(*(["--threads", str(c.threads())] if os.environ.get("BENCH_THREADS") else [])) as (where, _):
        rate(where, max(args.clients), 1, args.new, args.stream)                 # warm up
        first_tokens(where, 5)
        times = first_tokens(where, 20)
        found = {n: [] for n in args.clients}
        for _ in range(args.rounds):                                             # in turn: the machine's moods hit all
            for n in args.clients:
                found[n].append(rate(where, n, args.answers, args.new, args.stream))
    base = statistics.median(found[args.clients[0]])
    rows = [{"clients": n, "tokens_per_s": statistics.median(rates), "speedup": statistics.median(rates) / base,
             "best_speedup": max(rates) / max(found[args.clients[0]])} for n, rates in found.items()]
    c.report("serve", rows, ["clients", "tokens_per_s", "speedup", "best_speedup"], stream=args.stream, new=args.new,
             first_ms=statistics.median(times), first_ms_worst=max(times))


if __name__ == "__main__":
    main()
