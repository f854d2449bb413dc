"""The bundled texts and their tokenizer as fixtures, and conversations out of their texts."""
import pytest

from minigpt.engine.dataset_readers import load_chats, load_text
from minigpt.engine.tokenizer import Tokenizer

U, A, S = "user", "assistant", "system"


def talk(*texts, system=None):
    messages = [{"role": A if n % 2 else U, "content": t} for n, t in enumerate(texts)]
    return [{"role": S, "content": system}] * (system is not None) + messages


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.from_pretrained()


@pytest.fixture(scope="module")
def stories():
    return load_text()


@pytest.fixture(scope="module")
def chats():
    return load_chats()
