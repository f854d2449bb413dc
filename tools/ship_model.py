"""Make the shipped model from trained weights: int8 rows, tokenizer, and what it loses by that.

    python tools/ship_model.py MODEL_FOLDER HELD_JSONL

MODEL_FOLDER holds config.json, model.safetensors (transformers' layout) and tokenizer.json; HELD_JSONL has one
conversation a line. Writes minigpt/assets/minigpt-chat/ (but not its model card) and prints the losses of both.
"""
from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minigpt.engine.tokenizer import Tokenizer
from minigpt.chat_format import ChatRenderer
from minigpt.engine.dataset_readers import load_chats
from minigpt.engine.hub import save_int8
from minigpt.gpt2 import GPT2

ASSETS = Path(__file__).resolve().parent.parent / "minigpt" / "assets"


@torch.inference_mode()
def held_loss(model: GPT2, tokenizer: Tokenizer, chats: list[dict], batch: int = 16) -> dict[str, float]:
    """Mean loss in nats per assistant token and per token, each conversation alone (not packed)."""
    renderer = ChatRenderer(tokenizer)
    rows = sorted((renderer.render(c["messages"], model.config.block_size) for c in chats), key=lambda r: len(r.ids))
    sums = {"assistant": 0.0, "all": 0.0, "assistant_tokens": 0, "tokens": 0}
    for start in tqdm(range(0, len(rows), batch)):
        some = rows[start:start + batch]
        longest = max(len(r.ids) for r in some)
        ids = torch.tensor([r.ids + [0] * (longest - len(r.ids)) for r in some])
        mask = torch.tensor([r.mask + [0] * (longest - len(r.mask)) for r in some])[:, 1:]
        real = torch.tensor([[1] * len(r.ids) + [0] * (longest - len(r.ids)) for r in some])[:, 1:]
        logits = model(ids)[:, :-1]                                          # (B, T - 1, V)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(mask)
        sums["assistant"] += (loss * mask).sum().item()
        sums["all"] += (loss * real).sum().item()
        sums["assistant_tokens"] += int(mask.sum())
        sums["tokens"] += int(real.sum())
    return {"loss_assistant": sums["assistant"] / sums["assistant_tokens"], "loss_all": sums["all"] / sums["tokens"],
            "assistant_tokens": sums["assistant_tokens"], "tokens": sums["tokens"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("held", type=Path)
    args = parser.parse_args()
    target = ASSETS / "minigpt-chat"
    tokenizer = Tokenizer.from_pretrained(args.model)
    original = GPT2.from_pretrained(args.model)
    save_int8(original, target, overwrite=True)
    shutil.copy(args.model / "tokenizer.json", target)
    shipped = GPT2.from_pretrained(target)
    report = {}
    bundled = load_chats("held")
    for name, path, chats in (("sample_120", "held.jsonl of the package", bundled[:120]),
                              ("sample", "held.jsonl of the package", bundled),
                              ("held", args.held.name, load_chats(args.held))):
        report[name] = {"file": path, "conversations": len(chats)}
        for kind, model in (("bf16", original), ("int8", shipped)):
            report[name][kind] = held_loss(model, tokenizer, chats)
            loss = report[name][kind]["loss_assistant"]
            print(f"{name} {kind}: loss per assistant token {loss:.5f}, perplexity {math.exp(loss):.4f}")
        (target / "eval.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
