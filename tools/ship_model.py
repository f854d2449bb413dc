"""Make the shipped model from trained weights: int8 rows, tokenizer, and what it loses by that.

    python tools/ship_model.py MODEL_FOLDER HELD_JSONL

MODEL_FOLDER holds config.json, model.safetensors (transformers' layout) and tokenizer.json; HELD_JSONL has one
conversation a line. Writes minigpt/assets/minigpt-chat/ (but not its model card) and prints the losses of both.
"""
import json
import shutil
import sys
from pathlib import Path

from minigpt.chat_format import ChatRenderer
from minigpt.engine.dataset_readers import load_chats
from minigpt.engine.files import ASSETS
from minigpt.engine.hub import save_int8
from minigpt.engine.scoring import score_chats
from minigpt.engine.tokenizer import Tokenizer
from minigpt.gpt2 import GPT2


def held_loss(model: GPT2, renderer: ChatRenderer, chats: list[dict]) -> dict[str, float]:
    """Mean loss in nats per token of the assistant's, each conversation alone (not packed)."""
    nats, tokens, *_ = score_chats(model, renderer, chats, progress=True).columns().sum(0)
    return {"loss_assistant": nats / tokens, "assistant_tokens": int(tokens)}


def main(source: Path, held: Path) -> None:
    target, bundled, report = ASSETS / "minigpt-chat", load_chats("held"), {}
    renderer, original = ChatRenderer(Tokenizer.from_pretrained(source)), GPT2.from_pretrained(source)
    save_int8(original, target, overwrite=True)
    shutil.copy(source / "tokenizer.json", target)
    models = {"bf16": original, "int8": GPT2.from_pretrained(target)}
    for name, file, chats in (("sample_120", "held.jsonl of the package", bundled[:120]),
                              ("sample", "held.jsonl of the package", bundled), ("held", held.name, load_chats(held))):
        losses = {kind: held_loss(model, renderer, chats) for kind, model in models.items()}
        report[name] = {"file": file, "conversations": len(chats)} | losses
        print(name, *(f"{kind}: {loss['loss_assistant']:.5f} nats a token" for kind, loss in losses.items()), sep="  ")
    (target / "eval.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
