"""A long day for the server: many clients, random cancels, bad requests; then it has to be as fresh as before.

  python benchmarks/soak.py [--requests 2000] [--clients 16] [--warmup 1000] [--seed 0] [--new 12]

The server is `minigpt serve` with the shipped model, a process of its own on 127.0.0.1. Of 100 requests about 60 are
answered (half of them streamed), 15 are cancelled in the middle and 25 are bad. Each outcome is checked: answers are
whole and have their usage, cancelled ones stop, bad ones get the error that they asked for, in OpenAI's shape. Status
429 is an answer as well: that client waits as it is told, and tries again. Memory is the server's resident size, after
`--warmup` requests, in which the prefix cache fills (4,096 tokens are 128 MiB), and at the end. The last line is JSON;
the exit code is 1 if anything was not as it should be.
"""
from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import sys
import threading
import time
from collections import Counter

import _common as c
from serve import STORIES, TALKS, post, served

GOOD, FORM = {"model": "minigpt-chat"}, {"message", "type", "param", "code"}
BAD = [({"model": "gpt-9"}, 404), ({"temperature": 9}, 400), ({"n": 0}, 400), ({"prompt": [10**6]}, 400),
       ({"max_tokens": 5000}, 400), ({"stop": ""}, 400), ({"suffix": "x", "prompt": "One"}, 400), ({"prompt": "word " * 3000}, 400),
       ({"prompt": "x" * 1_100_000}, 413), ({"seed": "one"}, 400), ({"stream": "yes"}, 400)]


class Soak:
    """What the clients share: the numbers still to do, and what was found."""

    def __init__(self, where: str, pid: int, args: argparse.Namespace):
        self.where, self.pid, self.args = where, pid, args
        self.lock, self.left = threading.Lock(), iter(range(args.requests))
        self.count, self.problems, self.memory = Counter(), [], {}

    def rss(self) -> float:
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def next(self) -> int | None:
        with self.lock:
            number = next(self.left, None)
            if number is not None and number % 100 == 0:
                self.memory[number] = self.rss()
        return number

    def note(self, kind: str, problem: str = "") -> None:
        with self.lock:
            self.count[kind] += 1
            if problem:
                self.problems.append(f"{kind}: {problem}")


def request_of(rng: random.Random, new: int) -> tuple[str, dict]:
    """A good request, of all kinds."""
    body = GOOD | {"max_tokens": rng.randint(1, new), "temperature": rng.choice([0, 0.7, 1.0]), "seed": rng.randrange(99),
                   "n": rng.choice([1, 1, 1, 2]), "top_p": rng.choice([0.9, 1.0])}
    if rng.random() < 0.5:
        body["messages"] = [{"role": "user", "content": rng.choice(TALKS) * rng.choice([1, 1, 1, 20])}]
        return "/v1/chat/completions", body | rng.choice([{}, {"logprobs": True, "top_logprobs": 3}])
    return "/v1/completions", body | {"prompt": rng.choice(STORIES)} | rng.choice([{}, {"stop": ["\n", " the"]}])


def whole(soak: Soak, response, body: dict) -> str:
    """"" if an answer is all there, else what is wrong."""
    data = response.read().decode()
    if response.status != 200:
        return f"status {response.status}: {data[:200]}"
    if not body.get("stream"):
        answer = json.loads(data)
        ends = [choice["finish_reason"] for choice in answer["choices"]]
        counts, drawn = answer["usage"], answer["usage"]["completion_tokens"]
    else:
        *events, done, end = data.split("\n\n")
        if (done, end) != ("data: [DONE]", ""):
            return f"a stream without an end: {data[-200:]}"
        events = [json.loads(event[6:]) for event in events]
        ends = [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]
        counts, drawn = events[-1]["usage"], events[-1]["usage"]["completion_tokens"]
    if len(ends) != body["n"] or not set(ends) <= {"stop", "length"}:
        return f"ends {ends} of {body['n']}"
    if set(ends) == {"length"} and drawn != body["n"] * body["max_tokens"]:
        return f"{drawn} tokens of {body['n']} x {body['max_tokens']}"
    return "" if counts["total_tokens"] == counts["prompt_tokens"] + drawn else f"usage {counts}"


def one(soak: Soak, connection: http.client.HTTPConnection, rng: random.Random) -> bool:
    """One request of a random kind; False if the connection is used up."""
    path, body = request_of(rng, soak.args.new)
    chance = rng.random()
    if chance < 0.25:
        change, status = rng.choice(BAD)
        kept = body if "prompt" not in change else {**GOOD, "max_tokens": 2}
        path = path if "prompt" not in change else "/v1/completions"
        response = post(connection, path, kept | change)
        data = json.loads(response.read())
        good = response.status == status and data.get("error", {}).keys() == FORM
        soak.note("bad", "" if good else f"{change!r:.60}: {response.status} {data!r:.200}")
        return status != 413
    if chance < 0.4:
        response = post(connection, path, body | {"stream": True, "max_tokens": 400, "n": 1})
        if response.status == 429:
            response.read()
            soak.note("busy")
            return True
        for _ in range(rng.randint(1, 4)):
            response.readline()
        connection.close()
        soak.note("cancelled", "" if response.status == 200 else f"status {response.status}")
        return False
    stream = {"stream": True, "stream_options": {"include_usage": True}} if rng.random() < 0.5 else {}
    for _ in range(100):
        response = post(connection, path, body | stream)
        if response.status != 429:
            break
        wait = int(response.headers["Retry-After"])
        response.read()
        soak.note("busy")
        time.sleep(wait)
    soak.note("streamed" if stream else "answered", whole(soak, response, body | stream))
    return True


def client(soak: Soak, number: int) -> None:
    """Request after request until none is left."""
    connection = http.client.HTTPConnection(soak.where, timeout=120)
    while (request := soak.next()) is not None:
        try:
            if not one(soak, connection, random.Random(f"{soak.args.seed} {request}")):
                connection.close()
        except Exception as error:
            soak.note("failed", f"{type(error).__name__}: {error}")
            connection.close()
    connection.close()


def idle(where: str) -> bool:
    """Whether, within some seconds, no row is in use and nobody waits."""
    for _ in range(100):
        connection = http.client.HTTPConnection(where, timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        if "minigpt_running 0.0\n" in text and "minigpt_waiting 0.0\n" in text:
            return True
        time.sleep(0.1)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--new", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.perf_counter()
    with served() as (where, process):
        soak = Soak(where, process.pid, args)
        threads = [threading.Thread(target=client, args=(soak, i)) for i in range(args.clients)]
        for action in (threading.Thread.start, threading.Thread.join):
            list(map(action, threads))
        rested, end = idle(where), soak.rss()
        process.terminate()
        code = process.wait(60)
    start = next(size for number, size in sorted(soak.memory.items()) if number >= min(args.warmup, args.requests // 2))
    growth = 100 * (end / start - 1)
    good = not soak.problems and growth < 5 and rested and code == 0
    for problem in soak.problems[:10]:
        print(problem, file=sys.stderr)
    c.report("soak", [dict(soak.count)], sorted(soak.count), ok=good, problems=len(soak.problems), idle_at_end=rested,
             exit_code=code, rss_after_warmup_mb=round(start, 1), rss_end_mb=round(end, 1), growth_percent=round(growth, 2),
             rss_mb={n: round(size) for n, size in soak.memory.items()}, seconds=round(time.perf_counter() - begun, 1))
    sys.exit(not good)


if __name__ == "__main__":
    main()
