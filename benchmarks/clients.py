"""Do other people's clients get from `minigpt serve` what plain HTTP gets? litellm, langchain-openai and llm, each asked
the same question at temperature 0, whole and as a stream; the first two also for an object of a schema and a tool call.

    minigpt serve                                     in one terminal
    pip install litellm langchain-openai llm          in another one (the package needs none of them)
    python benchmarks/clients.py [http://127.0.0.1:8000]

A line for each check; the exit code is 1 if one of them failed.
"""
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

MODEL, QUESTION = "minigpt-chat", "Why is the sky blue?"
ASK = [{"role": "user", "content": QUESTION}]
PET = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "legs": {"enum": [2, 4, 6]}},
       "required": ["name", "legs"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "pet", "description": "Keep a pet.", "parameters": PET}}
FORM = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": PET}}
CHOICE = {"type": "function", "function": {"name": "pet"}}


def plain_answer(url: str) -> str:
    body = json.dumps({"model": MODEL, "messages": ASK, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]


def is_pet(arguments: str | dict) -> bool:
    pet = json.loads(arguments) if isinstance(arguments, str) else arguments
    return set(pet) == {"name", "legs"} and pet["legs"] in (2, 4, 6) and len(pet["name"]) <= 12


def litellm_checks(url: str, want: str):
    import litellm
    kind = dict(model=f"openai/{MODEL}", api_base=f"{url}/v1", api_key="none", messages=ASK, temperature=0)
    yield "whole", litellm.completion(**kind).choices[0].message.content == want
    pieces = [part.choices[0].delta.content or "" for part in litellm.completion(**kind, stream=True)]
    yield "stream", "".join(pieces) == want and len(pieces) > 3
    yield "schema", is_pet(litellm.completion(**kind, response_format=FORM).choices[0].message.content)
    call = litellm.completion(**kind, tools=[TOOL], tool_choice=CHOICE).choices[0].message.tool_calls[0]
    yield "tool", call.function.name == "pet" and is_pet(call.function.arguments)
    kind = dict(model=f"openai/{MODEL}", api_base=f"{url}/v1", api_key="none")
    yield "embedding", len(litellm.embedding(**kind, input=["a whale", "a ship"]).data) == 2


def langchain_checks(url: str, want: str):
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings
    chat = ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", temperature=0)
    yield "whole", chat.invoke(QUESTION).content == want
    pieces = [part.content for part in chat.stream(QUESTION)]
    yield "stream", "".join(pieces) == want and len(pieces) > 3
    yield "schema", is_pet(chat.with_structured_output(PET | {"title": "pet"}, method="json_schema").invoke(QUESTION))
    call, = chat.bind_tools([TOOL], tool_choice="pet").invoke(QUESTION).tool_calls
    yield "tool", call["name"] == "pet" and is_pet(call["args"])
    texts = OpenAIEmbeddings(model=MODEL, base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False)
    yield "embedding", len(texts.embed_documents(["a whale", "a ship"])) == 2


def llm_checks(url: str, want: str):
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "extra-openai-models.yaml").write_text(
            f"- model_id: {MODEL}\n  model_name: {MODEL}\n  api_base: {url}/v1\n  api_key_name: none\n")
        for name, more in ("whole", ["--no-stream"]), ("stream", []):
            command = [sys.executable, "-m", "llm", "-m", MODEL, "-o", "temperature", "0", "--key", "none", *more, QUESTION]
            done = subprocess.run(command, env=os.environ | {"LLM_USER_PATH": home}, capture_output=True, text=True)
            yield name, done.returncode == 0 and done.stdout.strip() == want.strip()


def main() -> int:
    url = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    want, failed = plain_answer(url), 0
    for package, checks in (("litellm", litellm_checks), ("langchain-openai", langchain_checks), ("llm", llm_checks)):
        for name, held in checks(url, want):
            failed += not held
            print(f"{package} {version(package)}: {name}: {'as over plain HTTP' if held else 'FAILED'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
