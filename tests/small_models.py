"""A model that takes no time, none of whose weights is 0 or 1, and ids for it."""
import pytest
import torch

from minigpt.gpt2 import GPT2, GPT2Config

TINY = GPT2Config(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=8, bos_token_id=0, eos_token_id=1)


@pytest.fixture
def tiny() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(TINY).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def ids_of(batch: int = 2, length: int = 10, vocab: int = 50) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(3))
