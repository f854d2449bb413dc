"""The API beyond plain answers: forms, tools, echo, embeddings, conversations that are not read twice, connections."""
import http.client
import json
import math
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import numpy as np
import openai
import pytest
import torch
from openai.types import Completion, CreateEmbeddingResponse, chat
from test_server import ASK, JSON, call_raw, ids_of, said, send, small, pair, wait_until  # noqa: F401

from minigpt.engine.api_schema import Limits, as_api_error
from minigpt.engine.app import create_app
from minigpt.engine.cache import KVCache
from minigpt.engine.embedders import ModelEmbedder
from minigpt.engine.prefix_cache import PrefixCache
from minigpt.engine.scheduler import Engine, QueueFull
from minigpt.engine.sequence import Request, Sequence
from minigpt.engine.serving import make_server, running
from minigpt.generation import Options, generate
from minigpt.gpt2 import GPT2Config
from minigpt.server import Batch

ROOT = Path(__file__).resolve().parent.parent
PET = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "legs": {"enum": [2, 4, 6]}},
       "required": ["name", "legs"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "pet", "description": "Keep a pet.", "parameters": PET}},
         {"type": "function", "function": {"name": "wait"}}]


@pytest.fixture(scope="module")
def url(pair):  # noqa: F811
    with running(create_app(*pair)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("path, body, kind", [
    ("chat/completions", {"messages": said("Hi"), "logprobs": True, "top_logprobs": 2, "n": 2}, chat.ChatCompletion),
    ("chat/completions", {"messages": said("Hi"), "tools": TOOLS, "tool_choice": "required", "max_tokens": 40}, chat.ChatCompletion),
    ("chat/completions", {"messages": said("Hi"), "logprobs": True, "stream": True, "stream_options": {"include_usage": True}},
     chat.ChatCompletionChunk),
    ("completions", {"prompt": ["One", "Two"], "logprobs": 2}, Completion),
    ("embeddings", {"input": ["One", "Two"]}, CreateEmbeddingResponse)],
    ids=["chat", "tool", "stream", "text", "embedding"])
def test_bodies_are_of_openais_types(url, path, body, kind):
    """OpenAI's client takes what it gets; its types, asked strictly, say whether every field is there and of its kind."""
    body = {"model": "minigpt-chat", "max_tokens": 3} | body
    data = send(url, "POST", f"/v1/{path}", json.dumps(body).encode(), JSON)[1]
    events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")] or [data]
    assert len(events) > 1 or "stream" not in body
    for event in events:
        kind.model_validate_json(event)


# ------------------------------------------------------------------ forms and tools

@pytest.mark.parametrize("temperature, seed", [(0, 0), (1.5, 1), (2, 2)])
def test_json_is_valid_however_wild(client, temperature, seed):
    kind = dict(model="minigpt-chat", messages=said("Make up a pet."), temperature=temperature, seed=seed, max_tokens=60)
    wanted = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": PET}}
    got = client.chat.completions.create(**kind, response_format=wanted).choices[0]
    jsonschema.validate(json.loads(got.message.content), PET)
    assert got.finish_reason == "stop"
    got = client.chat.completions.create(**kind, response_format={"type": "json_object"}).choices[0]
    assert isinstance(json.loads(got.message.content), dict)


@pytest.mark.parametrize("choice, names", [("required", {"pet", "wait"}), ({"type": "function", "function": {"name": "pet"}}, {"pet"})])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_call_of_a_tool_cannot_be_malformed(client, choice, names, seed):
    kind = dict(model="minigpt-chat", messages=said("Keep my dog."), tools=TOOLS, tool_choice=choice, temperature=2, seed=seed)
    whole = client.chat.completions.create(**kind).choices[0]
    call, = whole.message.tool_calls
    assert whole.message.content is None and whole.finish_reason == "tool_calls" and call.function.name in names
    jsonschema.validate(json.loads(call.function.arguments), PET if call.function.name == "pet" else {"type": "object"})
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**kind, stream=True)]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
    assert [part.function for part in parts] == [part.function for part in parts if part.function.name == call.function.name]
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls" and not any(chunk.delta.content for chunk in chunks)


def test_tools_that_may_be_called_change_no_answer(client):
    kind = dict(model="minigpt-chat", messages=said("Hi"), temperature=0, max_tokens=9)
    texts = {client.chat.completions.create(**kind, **more).choices[0].message.content for more in
             ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "auto"}, {"tools": TOOLS, "tool_choice": "none"})}
    assert len(texts) == 1


def test_docs_and_the_log_say_what_auto_means(client, url, caplog, monkeypatch):
    """Tools that nobody is told to call: a text, once a line in the log; none where they have to be called, or never."""
    monkeypatch.setattr("minigpt.engine.api_schema._told", set())
    kind = dict(model="minigpt-chat", messages=said("Hi"), max_tokens=40, tools=TOOLS)
    for choice in ("none", "required", "auto", "auto"):
        message = client.chat.completions.create(**kind, tool_choice=choice).choices[0].message
        assert bool(message.tool_calls) == (choice == "required")
        lines = [record.message for record in caplog.records if record.name == "minigpt"]
        assert lines == ["ChatBody: ignored 'tools, with tool_choice auto'"] * (choice == "auto")
    body = json.loads(send(url, "GET", "/openapi.json")[1])["components"]["schemas"]["ChatBody"]["properties"]
    assert all("never learned to choose" in body[name]["description"] for name in ("tools", "tool_choice"))


def test_calls_and_results_are_read_as_turns(client, pair):  # noqa: F811
    call = {"id": "c1", "type": "function", "function": {"name": "pet", "arguments": '{"name": "Rex"}'}}
    talk = [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}, *said("Keep my dog."),
            {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "kept"},
            *said("Thanks!")]
    got = client.chat.completions.create(model="minigpt-chat", messages=talk, max_tokens=3)
    same = [{"role": "system", "content": "Be brief.\n\nBe kind."}, *said("Keep my dog."),
            {"role": "assistant", "content": '{"name": "pet", "arguments": {"name": "Rex"}}'}, *said("kept\n\nThanks!")]
    from minigpt.chat_format import ChatRenderer
    assert got.usage.prompt_tokens == len(ChatRenderer(pair[1]).prompt(same))


# ------------------------------------------------------------------ echo and the older log-probabilities

def logprobs(model, ids):
    """log p of each token of ids but the first, by the plain model."""
    with torch.no_grad():
        logp = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    return logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), logp


@pytest.mark.parametrize("new", [0, 1, 4])
def test_echo_tells_how_likely_the_prompt_was(client, pair, new):  # noqa: F811
    text = "One day the little dog found a bone under the old tree, and was happy."
    ids = pair[1].encode_ordinary(text)
    kind = dict(model="minigpt-chat", prompt=[ids, ids[:5]], max_tokens=new, temperature=0, logprobs=1)
    got = client.completions.create(**kind, echo=True)
    for choice, row in zip(got.choices, (ids, ids[:5])):
        want, logp = logprobs(pair[0], row)
        noted = choice.logprobs
        assert noted.token_logprobs[0] is None and noted.token_logprobs[1:len(row)] == pytest.approx(want, abs=1e-3)
        assert "".join(noted.tokens) == choice.text and choice.text.startswith(pair[1].decode(row))
        assert len(noted.tokens) == len(row) + len(noted.tokens[len(row):]) and choice.finish_reason in ("stop", "length")
        assert all(choice.text[at:].startswith(t) for at, t in zip(noted.text_offset, noted.tokens))
        best = [max(d.values()) for d in noted.top_logprobs[1:len(row)]]
        assert best == pytest.approx(logp.max(-1).values.tolist(), abs=1e-3)
    assert client.completions.create(model="minigpt-chat", prompt="One", max_tokens=0, echo=True).choices[0].text == "One"


def test_offsets_go_on_from_piece_to_piece(client):
    for more in ({}, {"echo": True}):
        kind = dict(model="minigpt-chat", prompt="One day", max_tokens=8, logprobs=0, seed=5, **more)
        whole = client.completions.create(**kind).choices[0]
        chunks = [chunk.choices[0] for chunk in client.completions.create(**kind, stream=True)]
        assert "".join(chunk.text for chunk in chunks) == whole.text
        for name in ("text_offset", "tokens", "token_logprobs", "top_logprobs"):
            assert [x for chunk in chunks for x in getattr(chunk.logprobs, name)] == getattr(whole.logprobs, name), name
        assert [list(row) for row in whole.logprobs.top_logprobs if row] == [
            [t] for t, row in zip(whole.logprobs.tokens, whole.logprobs.top_logprobs) if row], "the drawn token is among them"


def test_lm_eval_scores_over_the_api(url, pair, tmp_path):  # noqa: F811
    """The loglikelihoods of its local-completions are those of the plain model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    pair[0].save_pretrained(tmp_path, pair[1])
    lm = LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="minigpt-chat", tokenizer=str(tmp_path), max_length=512)
    encode = pair[1].encode_ordinary
    asked = [("One day the little dog", " ran away"), ("The sky is", " blue")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair_, i) for i, pair_ in enumerate(asked)], disable_tqdm=True)
    for (context, rest), (got, greedy) in zip(asked, found):
        ids = encode(context + rest)
        want, logp = logprobs(pair[0], ids)
        tail = len(ids) - len(encode(context))
        assert got == pytest.approx(sum(want[-tail:]), abs=1e-2)
        assert greedy == (logp[-tail:].argmax(-1).tolist() == ids[-tail:])


def test_a_bias_forbids_and_forces(client, pair):  # noqa: F811
    word, = pair[1].encode_ordinary(" yes")
    got = client.completions.create(model="minigpt-chat", prompt="One day", max_tokens=3, logit_bias={str(word): 100})
    assert got.choices[0].text == " yes yes yes"


# ------------------------------------------------------------------ embeddings

def test_embeddings_are_the_embedders(client, pair):  # noqa: F811
    texts = ["What is a whale?", "A large animal of the sea"]
    want = ModelEmbedder(*pair)(texts)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    for form in ("float", "base64"):
        got = client.embeddings.create(model="minigpt-chat", input=texts, encoding_format=form)
        rows = [row.embedding for row in got.data]
        if form == "base64":
            import base64
            rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        assert np.allclose(rows, want, atol=1e-6) and [row.index for row in got.data] == [0, 1]
    assert got.usage.prompt_tokens == sum(len(pair[1].encode_ordinary(text)) for text in texts)
    ids = pair[1].encode_ordinary(texts[0])
    assert np.allclose(client.embeddings.create(model="minigpt-chat", input=ids).data[0].embedding, want[0], atol=1e-6)
    for bad, words in ((dict(input="a" * 9, dimensions=3), "dimensions=3"), (dict(input=[[1] * 1025]), "1025 tokens"),
                       (dict(input=[]), "empty"), (dict(input=["a"] * 17), "17 prompts")):
        with pytest.raises(openai.BadRequestError, match=words):
            client.embeddings.create(model="minigpt-chat", **bad)


# ------------------------------------------------------------------ what was read before

def test_a_turn_reads_only_what_is_new(client, pair):  # noqa: F811
    """And says what it says without a memory: a conversation of five turns, against generate()."""
    talk, specials, before = [], tuple(pair[1].special_tokens.values()), 0
    from minigpt.chat_format import ChatRenderer
    for text in ("Hi, my friend.", "What is a lake?", "Why?", "Tell me more.", "Thanks!"):
        talk += said(text)
        ids = ChatRenderer(pair[1]).prompt(talk)
        got = client.chat.completions.create(model="minigpt-chat", messages=talk, temperature=0, max_tokens=24)
        want = generate(pair[0], ids, temperature=0, max_new_tokens=24, stop_ids=specials)
        assert got.choices[0].message.content == pair[1].decode(want.ids)
        assert got.usage.prompt_tokens_details.cached_tokens >= before
        before = len(ids) + len(want.ids) - 1
        talk.append({"role": "assistant", "content": pair[1].decode(want.ids)})


def test_the_memory_is_right_and_bounded(small):  # noqa: F811
    """Against plain lists: the longest common beginning, never the last token, least recently used first."""
    import random
    rng, model = random.Random(0), small[0]
    cache, prefixes, kept = KVCache(model.config), PrefixCache(60), []
    for _ in range(300):
        ids = [rng.randrange(2) + 5 for _ in range(rng.randrange(1, 25))]
        common = [sum(all(a == b for a, b in zip(ids[:n + 1], text)) and n < len(text) for n in range(len(ids) - 1)) for text in kept]
        found = prefixes.load(ids, cache)
        assert found == max(common, default=0) == cache.length
        if found:
            kept.append(kept.pop(common.index(found)))
            with torch.inference_mode():
                got = model(torch.tensor([ids[found:]]), cache)[0, -1]
                assert torch.allclose(got, model(torch.tensor([ids]))[0, -1], atol=1e-4)
        else:
            with torch.inference_mode():
                model(torch.tensor([ids]), cache)
        prefixes.store(ids, cache)
        if longer := next((text for text in kept if text[:len(ids)] == ids), None):
            kept.append(kept.pop(kept.index(longer)))
        else:
            kept = [text for text in kept if ids[:len(text)] != text] + [ids]
        while sum(map(len, kept)) > 60:
            del kept[0]
        assert list(map(list, prefixes.kept)) == kept
    empty = PrefixCache(0)
    empty.store([5, 6], cache)
    assert not empty.kept and empty.load([5, 6, 7], cache) == 0


def test_a_prompt_that_was_scored_is_not_read_again(small):  # noqa: F811
    model, tokenizer = small
    from minigpt.engine.openai_api import score_prompt
    engine, ids = Engine(model, tokenizer, chunk=4), list(range(5, 25))
    scores = score_prompt(engine, ids, 2)
    want, _ = logprobs(model, ids)
    assert [t.id for t in scores] == ids and [t.logprob for t in scores[1:]] == pytest.approx(want, abs=1e-4)
    request = Request(ids, [Sequence(tokenizer, ids, Options(temperature=0), 3)])
    engine.submit(request)
    while engine.busy:
        engine.step()
    assert request.cached == 19 and request.sequences[0].result.ids == generate(model, ids, max_new_tokens=3, temperature=0).ids


# ------------------------------------------------------------------ the queue

def asks(small, answers, tokens=9):  # noqa: F811
    return Request([5], [Sequence(small[1], [5], Options(temperature=0), tokens) for _ in range(answers)])


def test_a_wide_request_is_passed_but_not_for_ever(small):  # noqa: F811
    """While a row is taken narrow ones pass one that needs all rows, eight of them; then it is its turn."""
    engine = Engine(*small, max_batch=2, max_queue=99)
    long, wide = asks(small, 1, 200), asks(small, 2, 3)
    narrow = [asks(small, 1, 3) for _ in range(20)]
    engine.submit(long, wide, *narrow)
    while wide.first is None:
        engine.step()
    assert sum(r.first is not None for r in narrow) == 8 and long.sequences[0].finish_reason == "length"
    while engine.busy:
        engine.step()
    assert all(r.sequences[0].finish_reason == "length" for r in narrow)


def test_free_rows_count_as_room_in_the_queue(small):  # noqa: F811
    engine = Engine(*small, max_batch=4, max_queue=3)
    engine.submit(*(asks(small, 1) for _ in range(7)))
    with pytest.raises(QueueFull):
        engine.submit(asks(small, 1))
    engine.step()
    assert len(engine.batch.rows) == 4 and len(engine.waiting) == 3


def test_who_is_refused_hears_how_long_answers_take(small, monkeypatch):  # noqa: F811
    """On a clock that a step moves by two seconds an answer of nine tokens takes 8 x 2; two rows, six waiting: 3 x 16."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    engine = Engine(*small, max_batch=2, max_queue=6, prefix_tokens=0)
    step = engine.batch.step
    engine.batch.step = lambda: (now.__setitem__(0, now[0] + 2), step())[1]

    def refused():
        engine.submit(*(asks(small, 1) for _ in range(engine.free + 6 - len(engine.waiting))))
        with pytest.raises(QueueFull) as error:
            engine.submit(asks(small, 1))
        return error.value

    first = refused()
    assert first.waiting == 8 and first.seconds == 8 / 2 * 1                     # nothing has ended: a second for each round
    for _ in range(300):
        engine.step()
        if not engine.waiting:
            engine.submit(*(asks(small, 1) for _ in range(6)))
    while len(engine.batch.rows) < 2:
        engine.step()
    last = refused()
    assert last.waiting == 6 and last.seconds == pytest.approx(3 * 16, rel=0.01)
    answer = as_api_error(last)
    assert (answer.status, answer.headers["Retry-After"]) == (429, str(math.ceil(last.seconds)))


def test_a_job_runs_in_the_engines_thread(small):  # noqa: F811
    engine = Engine(*small)
    engine.start()
    assert engine.call(threading.get_ident).result(20) == engine.thread.ident
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(20)
    engine.close()
    assert not engine.thread.is_alive()


# ------------------------------------------------------------------ connections

def test_idle_connections_and_endless_headers_are_closed(small):  # noqa: F811
    with running(create_app(*small), idle_seconds=1) as url:
        where = url.removeprefix("http://").split(":")
        silent, endless, keeps = (socket.create_connection(where) for _ in range(3))
        endless.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        keeps.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        begun, open_ = time.monotonic(), {silent, endless, keeps}
        for raw in open_:
            raw.setblocking(False)
        while open_ and time.monotonic() < begun + 15:
            for raw in list(open_):
                try:
                    data = raw.recv(9999)
                    if not data:
                        open_.discard(raw)
                except BlockingIOError:
                    pass
                except ConnectionError:
                    open_.discard(raw)
            if endless in open_:
                try:
                    endless.send(b"X-More: 1\r\n")
                except OSError:
                    pass
            time.sleep(0.05)
        assert not open_, "all are closed"
        assert send(url, "GET", "/health")[0].status == 200


def test_a_running_answer_is_not_idle(small):  # noqa: F811
    app = create_app(*small)
    step = app.state.engine.batch.step
    app.state.engine.batch.step = lambda: (time.sleep(0.05), step())[1]
    with running(app, idle_seconds=1, most=3) as url:
        raw = call_raw(url, max_tokens=60)
        crowd = [socket.create_connection(url.removeprefix("http://").split(":")) for _ in range(8)]
        response = http.client.HTTPResponse(raw)
        response.begin()
        assert json.loads(response.read())["usage"]["completion_tokens"] == 60
        for each in crowd:
            each.close()


CONNECTIONS, FILES = int(os.environ.get("CONNECTIONS", 1200)), int(os.environ.get("FILES", 256))


def test_more_connections_than_file_descriptors(tmp_path):
    """1,200 that say nothing, where the process may have 256 descriptors: others are answered, and the log stays small.

    CONNECTIONS=5000 FILES=1024 in the environment: the same with so many."""
    code = f"""import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
import torch; from minigpt.engine.app import create_app; from minigpt.engine.serving import serve
from minigpt.engine.tokenizer import Tokenizer; from minigpt.gpt2 import GPT2, GPT2Config
t = Tokenizer.from_pretrained()
serve(create_app(GPT2(GPT2Config(vocab_size=t.vocab_size, block_size=64, n_layer=1, n_head=1, n_embd=8)), t), port=0)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(CONNECTIONS + 1000, hard), hard))
    log = tmp_path / "log"
    with log.open("w") as errors:
        server = subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
    crowd = []
    try:
        url = server.stdout.readline().split(" at ")[1].split()[0]
        where = url.removeprefix("http://").split(":")
        for i in range(CONNECTIONS):
            raw = socket.create_connection(where, timeout=30)
            if i % 2:
                raw.sendall(b"G")
            crowd.append(raw)
            if i % 200 == 199:
                assert send(url, "GET", "/health")[0].status == 200
        assert send(url, "POST", "/v1/completions", ASK, JSON)[0].status == 200
        assert log.stat().st_size < 10_000, log.read_text()[:2000]
    finally:
        for raw in crowd:
            raw.close()
        server.kill()
        server.wait()
        server.stdout.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ------------------------------------------------------------------ the end

def test_at_the_end_answers_are_cut_and_health_says_so(small):  # noqa: F811
    """One signal: /health turns 503, nobody new comes in, and after the grace time a stream ends with a reason and [DONE]."""
    app = create_app(*small)
    step = app.state.engine.batch.step
    app.state.engine.batch.step = lambda: (time.sleep(0.05), step())[1]
    sock = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    server = make_server(app, grace=60)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    raw = call_raw(url, stream=True)
    wait_until(lambda: app.state.engine.batch.rows)
    server.handle_exit(15, None)
    health, data = send(url, "GET", "/health")
    assert health.status == 503 and json.loads(data)["error"]["code"] == "shutting_down"
    late, data = send(url, "POST", "/v1/completions", ASK, JSON)
    assert late.status == 503 and late.headers["Retry-After"]
    app.state.engine.ends = 0                          # the patience is over
    response = http.client.HTTPResponse(raw)
    response.begin()
    text = response.read().decode()
    assert text.endswith("data: [DONE]\n\n") and text.count('"finish_reason": "length"') == 1
    thread.join(20)
    assert not thread.is_alive()


def test_a_bearer_in_small_letters_and_exposed_headers(small):  # noqa: F811
    with running(create_app(*small, api_key="k", cors=["https://page.example"])) as url:
        headers = {"Authorization": "bearer k", "Origin": "https://page.example"}
        response, _ = send(url, "GET", "/v1/models", headers=headers)
        assert response.status == 200 and "X-Request-Id" in response.headers["access-control-expose-headers"]
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        other, _ = send(url, "GET", "/v1/models", headers=headers | {"Origin": "https://other.example"})
        assert other.headers["access-control-allow-origin"] is None


def test_batches_count_what_they_do(small):  # noqa: F811
    batch = Batch(small[0], 2, chunk=64, prefix_tokens=100)
    for _ in range(2):
        request = Request([5, 6, 7], [Sequence(small[1], [5, 6, 7], Options(temperature=0), 4)])
        batch.read(request)
        while batch.rows:
            batch.step()
    assert batch.counts == {"prompt": 6, "cached": 2, "generated": 8}
    assert isinstance(small[0].config, GPT2Config) and Limits().prefix_tokens > 0
