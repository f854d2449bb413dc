"""Bad input, invented from the server's own OpenAPI schema: never a 500, always an error in OpenAI's shape.

    FUZZ=800 python -m pytest tests/test_server_fuzz.py -k schema       800 requests for each route instead of 40
"""
import json
import os

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from minigpt.engine.tokenizer import Tokenizer
from minigpt.gpt2 import GPT2, GPT2Config
from minigpt.engine.api_schema import Limits
from minigpt.engine.app import create_app

torch.manual_seed(0)
TOKENIZER = Tokenizer.from_pretrained()
MODEL = GPT2(GPT2Config(vocab_size=TOKENIZER.vocab_size, block_size=64, n_layer=1, n_head=2, n_embd=16, bos_token_id=0,
                        eos_token_id=0))
APP = create_app(MODEL, TOKENIZER, limits=Limits(max_tokens=8, timeout=20))
QUICK = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
schema = schemathesis.openapi.from_dict(APP.openapi())


@pytest.fixture(scope="module")
def client():
    with TestClient(APP, raise_server_exceptions=False) as client:
        yield client


def check(response):
    """No 500; errors have OpenAI's shape; answers are whole."""
    assert response.status_code < 500, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        *events, done, end = response.text.split("\n\n")
        assert done == "data: [DONE]" and end == "" and all(json.loads(event[6:]) for event in events)
    elif response.status_code >= 400:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        assert response.status_code in (400, 401, 404, 405, 408, 413, 421, 429)
    return response


@schema.parametrize()
@settings(max_examples=int(os.environ.get("FUZZ", 40)), phases=[Phase.generate], **QUICK)
def test_whatever_the_schema_allows_or_forbids(client, case):
    sent = case.as_transport_kwargs(base_url="http://testserver")
    data = sent.pop("data", None)
    check(client.request(content=data, **{key: value for key, value in sent.items() if value is not None}))


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
                   st.sampled_from([0, 1, -1, 1e-300, 1e300, 2**63, -2**63, "", "\x00", "😀", [], {}, [[]], [1, 2], ["a"]]),
                   st.lists(st.one_of(st.integers(-2, 20001), st.text(max_size=5), st.lists(st.integers(0, 30000))), max_size=4))
FIELDS = ["temperature", "top_p", "n", "seed", "stop", "stream", "stream_options", "presence_penalty", "frequency_penalty",
          "top_k", "min_p", "repetition_penalty", "logprobs", "top_logprobs", "max_tokens", "prompt", "messages", "model",
          "response_format", "user", "tools", "logit_bias"]


@settings(max_examples=150, **QUICK)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), chat=st.booleans())
def test_good_requests_with_some_wrong_fields(client, changes, chat):
    """Close to right is where bugs live: a good request with a few fields replaced, some by legal extremes."""
    path = "chat/completions" if chat else "completions"
    body = ({"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}) | {"model": "minigpt-chat"}
    raw = json.dumps(body | {"max_tokens": 2} | changes)                          # NaN and Infinity stay as they are
    check(client.post(f"/v1/{path}", content=raw.encode("utf-8", "surrogatepass"),
                      headers={"content-type": "application/json"}))


@settings(max_examples=60, **QUICK)
@given(raw=st.binary(max_size=60), kind=st.sampled_from(["application/json", "text/plain", "", "application/json; charset=x"]))
def test_bytes_that_are_no_request(client, raw, kind):
    assert 400 <= check(client.post("/v1/completions", content=raw, headers={"content-type": kind})).status_code < 500


@settings(max_examples=60, **QUICK)
@given(temperature=st.floats(0, 2), top_p=st.floats(0, 1, exclude_min=True), min_p=st.floats(0, 1),
       top_k=st.integers(1, 2**31), penalty=st.floats(0.1, 10), presence=st.floats(-2, 2), seed=st.integers(-2**63, 2**63 - 1))
def test_every_legal_setting_gives_an_answer(client, temperature, top_p, min_p, top_k, penalty, presence, seed):
    body = dict(model="minigpt-chat", prompt=[0], max_tokens=4, temperature=temperature, top_p=top_p, min_p=min_p,
                top_k=top_k, repetition_penalty=penalty, presence_penalty=presence, frequency_penalty=-presence, seed=seed)
    assert check(client.post("/v1/completions", json=body)).status_code == 200
