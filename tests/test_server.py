"""The server through OpenAI's own client: every answer against `generate`, and every refusal."""
import functools
import http.client
import json
import re
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from exercise_cells import exercises, said as told
from fastapi.exceptions import RequestValidationError
from prometheus_client.parser import text_string_to_metric_families

from minigpt.engine.tokenizer import Tokenizer
from minigpt.chat_format import ChatRenderer
from minigpt.engine.hub import load_pair
from minigpt.engine.kernels import for_inference
from minigpt.deeper.fast_decoding import Decoder
from minigpt.engine.cache import KVCache
from minigpt.engine.logits_processors import FrequencyPenalty, PresencePenalty
from minigpt.engine.streaming import TextStream
from minigpt.generation import Options, generate
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.engine.api_schema import Limits
from minigpt.engine.app import create_app
from minigpt.engine.scheduler import Engine
from minigpt.engine.sequence import Request, Sequence
from minigpt.engine.serving import running
from minigpt.server import Batch, SlotCache, row_model, step_rows

TALKS = ["What is a whale?", "Tell me a joke.", "Hi", "What is 7 plus 5?", "Why is the sky blue?",
         "Write a long story about a lighthouse and the old man who lives in it.", "Who are you?", "Name three fruits."]


@pytest.fixture(scope="module")
def pair():
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return load_pair()


@pytest.fixture(scope="module")
def small():
    """A tiny model with random weights and the shipped tokenizer: quick, and it never ends by itself."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained()
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, block_size=256, n_layer=2, n_head=2, n_embd=32,
                            bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        model.wte.weight.mul_(15)
    return model, tokenizer


@pytest.fixture(scope="module")
def url(pair):
    with running(create_app(*pair)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(text):
    return [{"role": "user", "content": text}]


def ids_of(pair, text):
    return ChatRenderer(pair[1]).prompt(said(text))


def alone(pair, ids, **options):
    specials = tuple(pair[1].special_tokens.values())
    return generate(pair[0], ids, stop_ids=specials, decoder=decoder_of(pair[0]), **options)


@functools.cache
def decoder_of(model):
    return Decoder(model)


# ------------------------------------------------------------------ the batch

def test_slots_are_rows_of_unequal_length():
    config = GPT2Config(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=2)
    slots, one = SlotCache(config, 3), KVCache(config, 1)
    for number, length in enumerate((3, 5, 2)):
        one.k.fill_(number + 1), one.v.fill_(number + 1)
        one.length = length
        slots.join(one)
    slots.leave(0)
    assert slots.lengths == [2, 5]
    assert (slots.k[0, 0, 0, :2] == 3).all() and (slots.v[0, 1, 0, :5] == 2).all()


def test_a_row_does_not_feel_its_neighbours(pair, ledger):
    """The logits of a row, whoever sits beside it, are the same bits on the machines we know; close on all."""
    model, _ = pair
    reader = for_inference(model)
    stepper = row_model(reader)
    prompts = [ids_of(pair, text) for text in TALKS]

    def steps(chosen, count=6):
        slots, found = SlotCache(model.config, len(chosen)), []
        for i in chosen:
            one = KVCache(model.config, 1)
            with torch.inference_mode():
                reader(torch.tensor([prompts[i]]), one)
            slots.join(one)
        for step in range(count):
            found.append(step_rows(stepper, slots, [100 + 7 * i + step for i in chosen]))
        return torch.stack(found, 1)                                             # (B, steps, V)

    together, worst = steps(range(8)), 0.0
    for chosen in ([0], [5], [3, 5], [5, 1, 0]):
        worst = max(worst, float((steps(chosen) - together[list(chosen)]).abs().max()))
    ledger("server: logits of a row alone and among 7 others, largest difference", worst, bound=1e-4)
    assert worst < 1e-4
    with torch.no_grad():
        tokens = [100 + 7 * 5 + step for step in range(6)]
        plain = model(torch.tensor([prompts[5] + tokens]))[0, -6:]
    worst = float((together[5] - plain).abs().max())
    ledger("server: logits of a row among 7 others and of the plain model, largest difference", worst, bound=1e-3)
    assert worst < 1e-3


@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(temperature=0.9, top_p=0.9, processors=[PresencePenalty(0.4)]),
                                     dict(temperature=1.0, top_k=20, repetition_penalty=1.2)])
def test_rows_that_join_and_leave_draw_what_they_draw_alone(small, options, ledger):
    """24 texts of different lengths through 4 rows, prompts in chunks of 5 tokens: each as by generate()."""
    model, tokenizer = small
    engine = Engine(model, tokenizer, max_batch=4, chunk=5, max_queue=99)
    prompts = [[(7 * i + j) % 900 + 3 for j in range(1 + i % 13)] for i in range(24)]
    asks = [Request(ids, [Sequence(tokenizer, ids, Options(seed=i, **options), 3 + i % 17)]) for i, ids in enumerate(prompts)]
    engine.submit(*asks)
    rounds = 0
    while engine.busy:
        engine.step()
        rounds += 1
        assert len(engine.batch.rows) <= 4
    wrong = 0
    for i, (ids, ask) in enumerate(zip(prompts, asks)):
        want = generate(model, ids, max_new_tokens=3 + i % 17, seed=i, decoder=decoder_of(model), **options)
        wrong += ask.sequences[0].result.ids != want.ids
        assert ask.sequences[0].finish_reason == "length"
        assert ask.sequences[0].text == "".join(TextStream(tokenizer, iter(want.ids)))
    names = re.sub(r"<[^>]*\.(\w+) object at \w+>", r"\1", str(options))    # a processor without its address
    ledger(f"server: texts of 24 in a continuous batch that differ from generate(), {names}", wrong, bound=0)
    assert wrong == 0 and rounds < sum(3 + i % 17 for i in range(24)) / 2


def test_n_answers_share_one_reading(small):
    model, tokenizer = small
    batch = Batch(model, 4, chunk=64)
    ask = Request([5, 6, 7], [Sequence(tokenizer, [5, 6, 7], Options(seed=i), 8) for i in range(3)])
    assert batch.read(ask) == 3 and batch.slots.lengths == [3, 3, 3]
    while batch.rows:
        batch.step()
    want = generate(model, [[5, 6, 7]] * 3, max_new_tokens=8, seed=0)
    assert [a.result.ids for a in ask.sequences] == [g.ids for g in want]


def test_a_failing_row_fails_alone(small):
    model, tokenizer = small
    engine, heard = Engine(model, tokenizer), []

    def broken(ids, logits, step):
        return logits / (2 - step) if 1 // (2 - step) else logits

    good = Request([5], [Sequence(tokenizer, [5], Options(temperature=0), 6)])
    bad = Request([5], [Sequence(tokenizer, [5], Options(processors=(broken,), seed=1), 6)],
              tell=lambda number, piece: heard.append(piece))
    engine.submit(bad, good)
    while engine.busy:
        engine.step()
    assert isinstance(heard[-1].error, ZeroDivisionError) and bad.sequences[0].finish_reason == "error"
    assert good.sequences[0].result.ids == generate(model, [5], max_new_tokens=6, temperature=0).ids


# ------------------------------------------------------------------ OpenAI's client

def test_models(client):
    model, = client.models.list().data
    assert model.id == "minigpt-chat" and client.models.retrieve("minigpt-chat").id == model.id


def test_a_chat_answer_is_what_generate_draws(client, pair):
    ids = ids_of(pair, TALKS[0])
    want = alone(pair, ids, temperature=0, max_new_tokens=40)
    got = client.chat.completions.create(model="minigpt-chat", messages=said(TALKS[0]), temperature=0, max_tokens=40)
    assert got.choices[0].message.content == pair[1].decode(want.ids) and got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == want.finish_reason and got.object == "chat.completion"
    assert got.usage.prompt_tokens == len(ids) and got.usage.completion_tokens == len(want.ids)
    assert got.usage.total_tokens == len(ids) + len(want.ids) and got._request_id.startswith("req-")


def test_eight_at_once_answer_as_one_by_one(client, pair, ledger):
    """Greedy and with seeds, streamed and not, 8 requests at once: each as asked alone, and as generate() draws."""
    answers, wrong = {}, 0

    def ask(i, temperature):
        stream = i % 2 == 1
        got = client.chat.completions.create(model="minigpt-chat", messages=said(TALKS[i]), temperature=temperature,
                                             max_tokens=24, seed=100 + i, top_p=0.9, stream=stream)
        answers[i, temperature] = ("".join(chunk.choices[0].delta.content or "" for chunk in got) if stream
                                   else got.choices[0].message.content)

    for temperature in (0, 0.8):
        threads = [threading.Thread(target=ask, args=(i, temperature)) for i in range(8)]
        for action in (threading.Thread.start, threading.Thread.join):
            list(map(action, threads))
    together = dict(answers)
    for i, temperature in together:
        ask(i, temperature)
        want = alone(pair, ids_of(pair, TALKS[i]), temperature=temperature, max_new_tokens=24, seed=100 + i, top_p=0.9)
        wrong += not together[i, temperature] == answers[i, temperature] == pair[1].decode(want.ids)
    ledger("server: of 16 answers drawn 8 at once, those that differ when asked alone", wrong, bound=0)
    assert len(together) == 16 and wrong == 0


def test_n_seed_and_stop(client, pair):
    kind = dict(model="minigpt-chat", messages=said(TALKS[5]), max_tokens=30, seed=7, temperature=0.9, n=3)
    first, second = (client.chat.completions.create(**kind) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices] and len(set(texts)) == 3
    own = client.chat.completions.create(**kind | {"n": 1, "seed": 8})
    assert own.choices[0].message.content == texts[1], "answer i is drawn with seed + i"
    word = next(w for w in texts[0].split()[3:] if len(w) > 2)
    for stop in (word, ["never said", word]):
        cut = client.chat.completions.create(**kind | {"n": 1, "stop": stop})
        assert cut.choices[0].finish_reason == "stop"
        assert cut.choices[0].message.content == texts[0][:texts[0].index(word)]


def test_streams(client):
    kind = dict(model="minigpt-chat", messages=said(TALKS[0]), max_tokens=20, temperature=0, n=2)
    whole = client.chat.completions.create(**kind)
    chunks = list(client.chat.completions.create(**kind, stream=True, stream_options={"include_usage": True}))
    *rest, last = chunks
    assert last.choices == [] and last.usage == whole.usage and all(chunk.usage is None for chunk in rest)
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].object == "chat.completion.chunk"
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in rest if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant" and all(choice.delta.role is None for choice in own[1:])
        assert "".join(c.delta.content or "" for c in own) == whole.choices[index].message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [whole.choices[index].finish_reason]


def test_text_completions(client, pair):
    prompts = ["One day the little dog", "Once upon a time"]
    got = client.completions.create(model="minigpt-chat", prompt=prompts, max_tokens=12, temperature=0, n=2)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3] and got.object == "text_completion"
    for i, prompt in enumerate(prompts):
        want = alone(pair, pair[1].encode(prompt), temperature=0, max_new_tokens=12)
        assert got.choices[2 * i].text == got.choices[2 * i + 1].text == pair[1].decode(want.ids)
    as_ids = client.completions.create(model="minigpt-chat", prompt=[pair[1].encode(p) for p in prompts], max_tokens=12,
                                       temperature=0, stream=True)
    texts = ["", ""]
    for chunk in as_ids:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [got.choices[0].text, got.choices[2].text]
    empty = client.completions.create(model="minigpt-chat", prompt="", max_tokens=3)
    assert empty.usage.prompt_tokens == 1


def test_logprobs_are_the_models(client, pair):
    got = client.chat.completions.create(model="minigpt-chat", messages=said(TALKS[1]), max_tokens=8, temperature=0.7,
                                         seed=3, logprobs=True, top_logprobs=4).choices[0]
    ids = ids_of(pair, TALKS[1])
    drawn = got.logprobs.content
    want = alone(pair, ids, temperature=0.7, top_p=0.9, seed=3, max_new_tokens=8)
    assert b"".join(bytes(t.bytes) for t in drawn).decode() == got.message.content
    with torch.no_grad():
        logp = pair[0](torch.tensor([ids + want.ids]))[0, len(ids) - 1:-1].log_softmax(-1)
    for row, token, view in zip(logp, want.ids, drawn):
        assert view.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [t.logprob for t in view.top_logprobs] == pytest.approx(row.topk(4).values.tolist(), abs=1e-3)
    old = client.completions.create(model="minigpt-chat", prompt="One day", max_tokens=6, logprobs=2).choices[0]
    assert "".join(old.logprobs.tokens) == old.text and len(old.logprobs.top_logprobs[0]) == 2
    assert all(old.text[at:].startswith(t) for at, t in zip(old.logprobs.text_offset, old.logprobs.tokens))


def test_penalties_and_our_own_fields(client, pair):
    want = alone(pair, ids_of(pair, TALKS[5]), temperature=0.8, top_k=30, min_p=0.02, top_p=0.9, seed=1,
                 repetition_penalty=1.3, max_new_tokens=20, processors=[PresencePenalty(0.5), FrequencyPenalty(0.3)])
    got = client.chat.completions.create(model="minigpt-chat", messages=said(TALKS[5]), temperature=0.8, seed=1,
                                         presence_penalty=0.5, frequency_penalty=0.3, max_completion_tokens=20,
                                         top_p=0.9, extra_body={"top_k": 30, "min_p": 0.02, "repetition_penalty": 1.3})
    assert got.choices[0].message.content == pair[1].decode(want.ids)


def test_a_conversation_with_parts_goes_on(client):
    talk = [{"role": "developer", "content": "Be brief."}, *said([{"type": "text", "text": "Hi"}])]
    answer = client.chat.completions.create(model="minigpt-chat", messages=talk, max_tokens=8).choices[0].message
    more = client.chat.completions.create(model="minigpt-chat", messages=[*talk, answer, *said("And now?")], max_tokens=8)
    assert more.choices[0].message.content is not None


@pytest.mark.parametrize("change, kind, param, code, words", [
    ({"model": "gpt-9"}, openai.NotFoundError, "model", "model_not_found", "only 'minigpt-chat'"),
    ({"temperature": 3}, openai.BadRequestError, "temperature", None, "less than or equal to 2"),
    ({"top_p": 0}, openai.BadRequestError, "top_p", None, "greater than 0"),
    ({"n": 99}, openai.BadRequestError, "n", None, "n=99 is more"),
    ({"max_tokens": 5000}, openai.BadRequestError, "messages", "context_length_exceeded", "exceed the context of 1024"),
    ({"max_tokens": "many"}, openai.BadRequestError, "max_tokens", None, "got 'many'"),
    ({"messages": []}, openai.BadRequestError, "messages", None, "at least 1 item"),
    ({"messages": said("word " * 2000)}, openai.BadRequestError, "messages", "context_length_exceeded", "2009 prompt"),
    ({"messages": said("x" * 99999)}, openai.BadRequestError, "messages", "context_length_exceeded", "cannot fit"),
    ({"messages": said("Hi") * 2}, openai.BadRequestError, "messages", None, "'assistant' is due"),
    ({"messages": [{"role": "boss", "content": "x"}]}, openai.BadRequestError, "messages", None, "messages.0.role"),
    ({"messages": said([{"type": "image_url", "image_url": {"url": "x"}}])}, openai.BadRequestError, "messages", None, ""),
    ({"stop": ""}, openai.BadRequestError, "stop", None, "at least 1 character"),
    ({"seed": 2**70}, openai.BadRequestError, "seed", None, "less than"),
    ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", None, "needs logprobs"),
    ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options", None, "needs stream"),
    ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", None, "not among the tools"),
    ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "response_format", None, "needs a schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "cow"}}}},
     openai.BadRequestError, "response_format", None, "cow"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "a" * 99}}}},
     openai.BadRequestError, "max_tokens", None, "for this pattern"),
    ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias", None, "'x'"),
    ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "logit_bias", None, "out of range")])
def test_refusals(client, change, kind, param, code, words):
    asked = {"model": "minigpt-chat", "messages": said("Hi"), "max_tokens": 4} | change
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**asked)
    error = refused.value
    assert error.param == param and error.code == code and words in error.message
    assert error.type == "invalid_request_error"


# ------------------------------------------------------------------ plain HTTP

def send(url, method, path, body=b"", headers=()):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response, data


JSON = {"Content-Type": "application/json"}
ASK = json.dumps({"model": "minigpt-chat", "prompt": "One", "max_tokens": 2}).encode()


@pytest.mark.parametrize("method, path, body, headers, status", [
    ("POST", "/v1/completions", b"{", JSON, 400), ("POST", "/v1/completions", b"", JSON, 400),
    ("POST", "/v1/completions", b"\xff\xfe", JSON, 400), ("POST", "/v1/completions", b"[" * 100_000, JSON, 400),
    ("POST", "/v1/completions", b"9" * 5000, JSON, 400), ("POST", "/v1/completions", b"[1e999]", JSON, 400),
    ("POST", "/v1/completions", ASK, {"Content-Type": "text/plain"}, 400), ("POST", "/v1/completions", ASK, {}, 400),
    ("POST", "/v1/completions", b'{"model": "\\udfff", "prompt": "a", "\\ud800": 1}', JSON, 404),
    ("POST", "/v1/completions", b" " * 1_000_001, JSON, 413), ("GET", "/v1/completions", b"", {}, 405),
    ("GET", "/v1/nothing", b"", {}, 404), ("GET", "/v1/models/%FF%00", b"", {}, 404), ("DELETE", "/nowhere", b"", {}, 404)])
def test_every_error_is_shaped_as_openai_does(url, method, path, body, headers, status):
    response, data = send(url, method, path, body, headers)
    error = json.loads(data)["error"]
    assert response.status == status and error.keys() == {"message", "type", "param", "code"} and error["message"]


MANY = 20_000


@pytest.mark.parametrize("path, change, param", [
    ("completions", {"prompt": [{}] * MANY}, "prompt"), ("completions", {"prompt": [[{}] * MANY] * 2}, "prompt"),
    ("completions", {"prompt": "a", "stop": [{}] * MANY}, "stop"),
    ("chat/completions", {"messages": [{}] * MANY}, "messages"),
    ("chat/completions", {"messages": said([{}] * MANY)}, "messages"),
    ("chat/completions", {"messages": said("") * 5000}, "messages")], ids=lambda value: str(value)[:30])
def test_a_body_of_many_errors_is_refused_at_the_first(small, path, change, param):
    """pydantic has at most one complaint for each type that a list may have, however long it is."""
    app, found = create_app(*small), []
    known = app.exception_handlers[RequestValidationError]

    async def noted(request, error):
        found.append(len(error.errors()))
        return await known(request, error)

    app.add_exception_handler(RequestValidationError, noted)
    with running(app) as url:
        body = json.dumps({"model": "minigpt-chat", "max_tokens": 2} | change).encode()
        response, data = send(url, "POST", f"/v1/{path}", body, JSON)
    assert response.status == 400 and json.loads(data)["error"]["param"] == param
    assert len(found) == 1 and found[0] <= 5 and len(data) < 1000


def test_bookkeeping_fields_are_taken_whatever_they_hold(url):
    body = json.loads(ASK) | {"metadata": {str(i): i for i in range(MANY)}, "user": "me", "store": True}
    assert send(url, "POST", "/v1/completions", json.dumps(body).encode(), JSON)[0].status == 200


def test_unknown_fields_are_ignored_with_a_line_in_the_log(url, caplog, monkeypatch):
    """As vLLM does; the log stays small, however many there are and however often they come."""
    monkeypatch.setattr("minigpt.engine.api_schema._told", set())
    unused = {"reasoning_effort": "low", "best_of": 1, "tool_choice": "none", "tools": None, "logit_bias": None, "echo": False,
              "suffix": None, "stream_options": None}
    same = [json.loads(send(url, "POST", "/v1/completions", json.dumps(json.loads(ASK) | {"seed": 1} | more).encode(), JSON)[1])
            for more in ({}, unused, unused)]
    assert same[0]["choices"] == same[1]["choices"] == same[2]["choices"]
    assert [record.message for record in caplog.records if record.name == "minigpt"] == [
        "CompletionBody: ignored 'reasoning_effort', 'best_of', 'tool_choice', 'tools'"]
    for start in range(10):
        body = json.loads(ASK) | {f"x{start}{'y' * 99}{i}\n": 1 for i in range(MANY // 10)}
        assert send(url, "POST", "/v1/completions", json.dumps(body).encode(), JSON)[0].status == 200
    assert len(caplog.text) < 20_000 and "y" * 50 not in caplog.text


def test_health_metrics_and_page(url, client):
    assert json.loads(send(url, "GET", "/health")[1]) == {"status": "ok"}
    assert b"<html" in send(url, "GET", "/")[1]

    def total(name, **labels):
        families = text_string_to_metric_families(send(url, "GET", "/metrics")[1].decode())
        samples = [s for family in families for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    own = {"path": "/v1/completions", "status": "200"}
    before = [total("minigpt_requests_total", **own), total("minigpt_generated_tokens_total"),
              total("minigpt_prompt_tokens_total"), total("minigpt_first_token_seconds_count")]
    used = client.completions.create(model="minigpt-chat", prompt="One day", max_tokens=5).usage
    after = [total("minigpt_requests_total", **own), total("minigpt_generated_tokens_total"),
             total("minigpt_prompt_tokens_total"), total("minigpt_first_token_seconds_count")]
    assert [b - a for a, b in zip(before, after)] == [1, used.completion_tokens, used.prompt_tokens, 1]
    assert total("minigpt_first_token_seconds_bucket", le="+Inf") == after[3] and total("minigpt_running") == 0


def test_raw_events(url):
    body = json.dumps({"model": "minigpt-chat", "prompt": "One day", "max_tokens": 4, "stream": True, "temperature": 0})
    response, data = send(url, "POST", "/v1/completions", body.encode(), JSON)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = data.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    assert all(json.loads(event[6:])["choices"] for event in events[:-2])


class Notices:
    """Around an app: calls `then` in the moment in which the server learns that a client has left."""

    def __init__(self, app, then):
        self.app, self.then = app, then

    async def __call__(self, scope, receive, send):
        async def noticed():
            message = await receive()
            if message["type"] == "http.disconnect":
                self.then()
            return message
        await self.app(scope, noticed, send)


def call_raw(url, **body):
    """A socket over which a completion of up to 250 tokens was asked for."""
    body = json.dumps({"model": "minigpt-chat", "prompt": "One", "max_tokens": 250, "seed": 2} | body).encode()
    raw = socket.create_connection(url.removeprefix("http://").split(":"))
    raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
                + str(len(body)).encode() + b"\r\n\r\n" + body)
    return raw


def answer_of(raw):
    """The JSON that comes back over a socket."""
    response = http.client.HTTPResponse(raw)
    response.begin()
    with raw, response:
        return json.loads(response.read())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["closed", "reset"])
def test_a_client_that_leaves_stops_the_work(small, stream, how):
    """After the server has learnt of it, the row draws the token it is at, at most one more, and ends. While the news
    travels through the network, the engine is held inside a step; then it runs as fast as it can."""
    app = create_app(*small)
    engine, step = app.state.engine, app.state.engine.batch.step
    gate, held = threading.Event(), threading.Event()

    def gated():
        rows = engine.batch.rows
        if rows and not gate.is_set() and len(rows[0][0].sequences[0].result.ids) >= 3:
            held.set()
            gate.wait(120)
        return step()

    engine.batch.step = gated
    app.add_middleware(Notices, then=gate.set)
    with running(app) as url:
        raw = call_raw(url, stream=stream)
        assert held.wait(120)
        answer = engine.batch.rows[0][0].sequences[0]
        before = len(answer.result.ids)
        if how == "reset":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()
        wait_until(lambda: not engine.batch.rows)
        after, counted = len(answer.result.ids), engine.batch.counts["generated"]
        assert after - before <= 2 and counted == after and answer.finish_reason == "length"
        again = json.loads(send(url, "POST", "/v1/completions", json.dumps({"model": "minigpt-chat", "prompt": "One",
                                "max_tokens": 250, "seed": 2}).encode(), JSON)[1])["choices"][0]["text"]
        assert again.startswith(answer.text), "the engine goes on for others"


def test_a_client_that_leaves_the_queue_never_begins(small):
    app = create_app(*small, limits=Limits(max_batch=1))
    engine, step = app.state.engine, app.state.engine.batch.step
    gate, gone = threading.Event(), threading.Event()
    engine.batch.step = lambda: (engine.batch.rows and gate.wait(20), step())[1]
    app.add_middleware(Notices, then=gone.set)
    with running(app) as url:
        first = call_raw(url, max_tokens=9)
        wait_until(lambda: engine.batch.rows)
        second = call_raw(url)
        wait_until(lambda: engine.waiting)
        ask = engine.waiting[0]
        second.close()
        assert gone.wait(20)
        wait_until(lambda: ask.cancelled)
        gate.set()
        wait_until(lambda: not engine.waiting)
        assert answer_of(first)["usage"]["completion_tokens"] == 9
        assert ask.read == 0 and not ask.sequences[0].result.ids
        assert engine.batch.counts["generated"] == 9


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def test_a_cancelled_ask_gets_no_further_token(small):
    model, tokenizer = small
    engine = Engine(model, tokenizer)
    ask = Request([5], [Sequence(tokenizer, [5], Options(seed=1), 200)])
    ask.tell = lambda number, piece: ask.cancel() if len(ask.sequences[0].result.ids) == 3 else None
    other = Request([5], [Sequence(tokenizer, [5], Options(seed=2), 9)])
    engine.submit(ask, other)
    while engine.busy:
        engine.step()
    assert len(ask.sequences[0].result.ids) == 3 and len(other.sequences[0].result.ids) == 9


# ------------------------------------------------------------------ limits

def test_a_full_queue_says_when_to_come_back(small):
    """One row, two places to wait: of five long requests two are sent away at once with 429 and Retry-After."""
    limits = Limits(max_batch=1, max_queue=2)
    app, outcomes = create_app(*small, limits=limits), []
    with running(app) as url:
        def ask():
            body = json.dumps({"model": "minigpt-chat", "prompt": "One", "max_tokens": 250}).encode()
            response, data = send(url, "POST", "/v1/completions", body, JSON)
            outcomes.append((response.status, response.headers["Retry-After"], json.loads(data)))

        engine, step = app.state.engine, app.state.engine.batch.step
        gate = threading.Event()
        engine.batch.step = lambda: (gate.wait(20), step())[1]
        threads = [threading.Thread(target=ask) for _ in range(5)]
        threads[0].start()
        wait_until(lambda: engine.batch.rows)
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: len(outcomes) == 2)
        assert sorted(status for status, _, _ in outcomes) == [429, 429]
        gate.set()
        for thread in threads:
            thread.join()
    assert sorted(status for status, _, _ in outcomes) == [200, 200, 200, 429, 429]
    refused = [outcome for outcome in outcomes if outcome[0] == 429]
    assert all(int(after) >= 1 and data["error"]["code"] == "rate_limit_exceeded" for _, after, data in refused)


def test_time_runs_out(small):
    """Time that runs out cuts an answer that has begun; one that never began is told so."""
    app = create_app(*small, limits=Limits(max_batch=1, timeout=3))
    engine, step, gate = app.state.engine, app.state.engine.batch.step, threading.Event()
    engine.batch.step = lambda: (gate.wait(120), step())[1]
    with running(app) as url:
        found = {}

        def ask(name):
            body = json.dumps({"model": "minigpt-chat", "prompt": "One", "max_tokens": 250}).encode()
            found[name] = send(url, "POST", "/v1/completions", body, JSON)

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "second")]
        threads[0].start()
        wait_until(lambda: engine.batch.rows)
        threads[1].start()
        wait_until(lambda: engine.waiting)
        deadline = engine.waiting[0].deadline
        wait_until(lambda: time.monotonic() > deadline)
        gate.set()
        for thread in threads:
            thread.join()
    cut, late = json.loads(found["first"][1]), json.loads(found["second"][1])
    assert cut["choices"][0]["finish_reason"] == "length" and 0 < cut["usage"]["completion_tokens"] < 250
    assert found["second"][0].status == 503 and late["error"]["code"] == "timeout"


def test_limits_name_bad_values():
    for bad in (dict(max_batch=0), dict(max_queue=-1), dict(max_tokens=0), dict(timeout=0), dict(temperature=-1), dict(prefix_tokens=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
            Limits(**bad)


def test_key_hosts_and_cors(small):
    app = create_app(*small, name="tiny", api_key="s3cret", hosts=["localhost"], cors=["https://page.example"],
                     limits=Limits(max_tokens=5))
    with running(app) as url:
        ours = {"Host": "localhost"}
        assert send(url, "GET", "/v1/models", headers=ours)[0].status == 401
        assert send(url, "GET", "/metrics", headers=ours)[0].status == 401
        assert send(url, "GET", "/health", headers=ours)[0].status == 200
        for wrong in ("Bearer s3cre", "Bearer s3crett", "s3cret", "Bearer \xe9"):
            response, data = send(url, "GET", "/v1/models", headers=ours | {"Authorization": wrong})
            assert response.status == 401 and json.loads(data)["error"]["code"] == "invalid_api_key"
        good = ours | {"Authorization": "Bearer s3cret"}
        assert json.loads(send(url, "GET", "/v1/models", headers=good)[1])["data"][0]["id"] == "tiny"
        assert send(url, "GET", "/v1/models", headers=good | {"Host": "evil.example"})[0].status == 421
        page = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST", "Host": "localhost"}
        allowed = send(url, "OPTIONS", "/v1/completions", headers=page)[0].headers
        assert allowed["access-control-allow-origin"] == "https://page.example"
        with openai.OpenAI(base_url=f"{url.replace('127.0.0.1', 'localhost')}/v1", api_key="wrong", max_retries=0) as bad:
            with pytest.raises(openai.AuthenticationError):
                bad.models.list()
        body = json.dumps({"model": "tiny", "prompt": "One", "max_tokens": 9}).encode()
        response, data = send(url, "POST", "/v1/completions", body, good | JSON)
        assert response.status == 400 and "allows, 5" in json.loads(data)["error"]["message"]


def test_cors_is_off_unless_asked(url):
    page = {"Origin": "https://page.example"}
    response, _ = send(url, "GET", "/v1/models", headers=page)
    assert response.status == 200 and response.headers["access-control-allow-origin"] is None


def test_an_internal_failure_is_told_in_the_same_shape_and_survived(small):
    app = create_app(*small)
    engine, step = app.state.engine, app.state.engine.batch.step
    body = json.dumps({"model": "minigpt-chat", "prompt": "One", "max_tokens": 9}).encode()
    with running(app) as url:
        engine.batch.step = lambda: 1 / 0
        response, data = send(url, "POST", "/v1/completions", body, JSON)
        assert response.status == 500 and json.loads(data)["error"]["type"] == "server_error"
        engine.batch.step = step
        assert send(url, "POST", "/v1/completions", body, JSON)[0].status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_counted_and_has_an_id(small, stream):
    """A model whose table of positions is cut off cannot read a long prompt: 500, counted, with a request id. Short ones
    are answered by the same engine."""
    model = GPT2(small[0].config)
    model.load_state_dict(small[0].state_dict())
    model.wpe.weight = torch.nn.Parameter(model.wpe.weight[:8].clone())
    app = create_app(model, small[1])
    with running(app) as url:
        ask = {"model": "minigpt-chat", "prompt": list(range(5, 25)), "max_tokens": 2, "stream": stream}
        response, data = send(url, "POST", "/v1/completions", json.dumps(ask).encode(), JSON)
        error = json.loads(data)["error"]
        assert response.status == 500 and error["type"] == "server_error" and "IndexError" in error["message"]
        assert response.headers["x-request-id"].startswith("req-")
        counts = send(url, "GET", "/metrics")[1].decode()
        assert 'minigpt_requests_total{path="/v1/completions",status="500"} 1.0' in counts
        assert "minigpt_request_seconds_count 1.0\n" in counts
        response, data = send(url, "POST", "/v1/completions", json.dumps(ask | {"prompt": [5, 6]}).encode(), JSON)
        assert response.status == 200
        ended = app.state.metrics.text()
        assert 'minigpt_requests_total{path="/v1/completions",status="200"} 1.0' in ended


def test_an_error_of_any_route_is_counted_once(small):
    app = create_app(*small, cors=["https://page.example"])

    @app.get("/v1/broken")
    async def broken():
        raise ZeroDivisionError

    with running(app) as url:
        response, data = send(url, "GET", "/v1/broken", headers={"Origin": "https://page.example"})
        assert response.status == 500 and json.loads(data)["error"]["type"] == "server_error"
        assert len(response.headers.get_all("x-request-id")) == 1
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        counts = [line for line in app.state.metrics.text().splitlines() if line.startswith("minigpt_requests_total")]
        assert counts == ['minigpt_requests_total{path="other",status="500"} 1.0']


def test_names_of_hosts_are_compared_without_case(small):
    with running(create_app(*small, hosts=["Chat.Example.org", "[::1]"])) as url:
        for host, status in (("chat.example.org", 200), ("CHAT.example.ORG:8000", 200), ("[::1]:8000", 200),
                             ("example.org", 421), ("127.0.0.1:8000", 421), ("", 421)):
            assert send(url, "GET", "/health", headers={"Host": host})[0].status == status, host


def test_a_built_page_stands_at_the_root(small, tmp_path, monkeypatch):
    """Its files are sent, nothing else of the disk is; with a key the page is open and the API is not."""
    monkeypatch.setattr("minigpt.engine.app.ASSETS", tmp_path)
    (tmp_path / "web" / "assets").mkdir(parents=True)
    (tmp_path / "minigpt-chat").mkdir()
    for name in ("web/index.html", "web/icon.svg", "web/assets/app.js", "secret.txt", "minigpt-chat/config.json",
                 "minigpt-chat/tokenizer.json", "minigpt-chat/model.safetensors", "minigpt-chat/eval.json"):
        (tmp_path / name).write_text(f"this is {name}")
    with running(create_app(*small, api_key="k")) as url:
        for path, name in (("/", "web/index.html"), ("/icon.svg", "web/icon.svg"), ("/assets/app.js", "web/assets/app.js"),
                           ("/model/config.json", "minigpt-chat/config.json"),
                           ("/model/tokenizer.json", "minigpt-chat/tokenizer.json"),
                           ("/model/model.safetensors", "minigpt-chat/model.safetensors")):
            response, data = send(url, "GET", path)
            assert response.status == 200 and data.decode() == f"this is {name}"
            head, nothing = send(url, "HEAD", path)
            assert head.status == 200 and nothing == b"" and head.headers["ETag"] == response.headers["ETag"]
            assert int(head.headers["Content-Length"]) == len(data)
        for path in ("/secret.txt", "/assets/../../secret.txt", "/assets/%2e%2e/%2e%2e/secret.txt", "/nothing", "/v1/nothing",
                     "/model/eval.json", "/model/", "/model/../secret.txt"):
            response, data = send(url, "GET", path)
            assert response.status == (401 if "v1" in path else 404) and "error" in json.loads(data), path
        secret = tmp_path / "secret.txt"
        assert b"web/icon.svg" in send(url, "GET", f"/icon.svg?path={secret}&send={secret}")[1]
        assert send(url, "GET", "/v1/models")[0].status == 401


def test_without_a_page_a_line_says_what_is_here(small, tmp_path, monkeypatch):
    monkeypatch.setattr("minigpt.engine.app.ASSETS", tmp_path)
    with running(create_app(*small)) as url:
        assert "/docs" in json.loads(send(url, "GET", "/")[1])["message"]
        assert b"swagger" in send(url, "GET", "/docs")[1] and "/v1/embeddings" in json.loads(
            send(url, "GET", "/openapi.json")[1])["paths"]


def test_an_adapter_is_a_model_of_its_own(small, tmp_path):
    """Under its folder's name, beside the base model, and at the same time: what `generate` draws with each of them."""
    from minigpt.engine.adapters import adapted, save_adapter
    from minigpt.lora import LoraConfig, apply_lora
    model, tokenizer = small
    tuned = GPT2(model.config)
    tuned.load_state_dict(model.state_dict())
    apply_lora(tuned, LoraConfig(r=2, lora_alpha=64))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name or name.endswith(".B"):
                weight.normal_()
    save_adapter(tuned, tmp_path / "pirate")
    app = create_app(model, tokenizer, adapters=[tmp_path / "pirate"])
    with running(app) as url:
        def text(name):
            body = json.dumps({"model": name, "prompt": [5, 6], "max_tokens": 12, "temperature": 0}).encode()
            return json.loads(send(url, "POST", "/v1/completions", body, JSON)[1])["choices"][0]["text"]

        names = ["pirate", "minigpt-chat"]
        with ThreadPoolExecutor(6) as pool:
            texts = list(pool.map(text, names * 3))
        assert [card["id"] for card in json.loads(send(url, "GET", "/v1/models")[1])["data"]] == names[::-1]
    ids = [generate(m, [5, 6], max_new_tokens=12, temperature=0).ids for m in (adapted(model, tmp_path / "pirate"), model)]
    assert ids[0] != ids[1] and texts == ["".join(TextStream(tokenizer, iter(row))) for row in ids] * 3
    with pytest.raises(ValueError, match="two models would be called 'pirate'"):
        create_app(model, tokenizer, adapters=[tmp_path / "pirate"] * 2)


# ------------------------------------------------------------------ the notebook's exercises

@pytest.mark.parametrize("number, empty, check, solution", exercises("13"), ids=lambda value: value[:5])
def test_exercises(number, empty, check, solution, capsys, pair):
    """The empty cell is said to be unsolved, the folded solution to be correct."""
    lines = (Path(__file__).parent.parent / "nbs" / "13_server.ipynb").read_text(encoding="utf-8")
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(lines)["cells"]}
    space = {"json": json, "lengths": [1]}
    for name in ("in-turn", "static", "continuous"):
        exec(cells[name], space)
    assert told(empty, check, space, capsys).startswith("not solved yet")
    assert told(solution, check, space, capsys) == "correct"
