"""Does it matter that packed conversations do not see one another?

The same base model (recipe nano-stories), the same rows in the same order, tuned twice for each seed: with the mask and the
positions of `documents_apart`, and without. Measured on held-out conversations, each alone, as a chat reads them.

    python benchmarks/finetune_packing.py [--steps 200] [--seeds 3] [--base FOLDER]

Prints a table and, as its last line, one JSON object.
"""
from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minigpt.engine.tokenizer import Tokenizer  # noqa: E402
from minigpt.chat_format import ChatRenderer  # noqa: E402
from minigpt.engine.dataset_readers import load_chats  # noqa: E402
from minigpt.finetuning import finetune  # noqa: E402
from minigpt.gpt2 import GPT2  # noqa: E402
from minigpt.engine.recipes import run_recipe  # noqa: E402

LONG = {"context", "story", "paragraph", "questions"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", default=None, help="folder of a base model; default: one is trained here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = args.base or str(Path(folder) / "model")
        if args.base is None:
            run_recipe("nano-stories", out=folder, progress=False, changes={"save_every": 0})
        base, tokenizer = GPT2.from_pretrained(place), Tokenizer.from_pretrained(place)
    renderer = ChatRenderer(tokenizer)
    chats = [c for c in load_chats("chats") if c["kind"] not in LONG]
    held = [c for c in load_chats("held") if c["kind"] not in LONG and len(renderer.render(c["messages"]).ids) < 200]
    found: dict[str, list[dict]] = {"apart": [], "leaking": []}
    for seed in range(args.seeds):
        for name in found:
            result = finetune(copy.deepcopy(base), chats, tokenizer=tokenizer, held=held, too_long="cut",
                              apart=name == "apart", progress=False,
                              config={"max_steps": args.steps, "lr": 3e-3, "final_lr": 0.05, "seed": seed, "eval_every": 0})
            found[name].append(result.after)
            print(f"seed {seed} {name:8} " + ", ".join(f"{k} {v:.3f}" for k, v in result.after.items()), flush=True)
    for name, rows in found.items():
        values = [row["answers_perplexity"] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:8} perplexity of held-out answers {statistics.mean(values):.2f} +- {spread:.2f}")
    print(json.dumps({"steps": args.steps, "seeds": args.seeds, **found}))


if __name__ == "__main__":
    main()
