"""Speculative decoding on the shipped model: does a draft pay at this size?

  python benchmarks/speculative.py [--prompts 24] [--new 64] [--guesses 2 3 4] [--draft FOLDER ...] [--temperature 0]

Each candidate draws the same texts (greedy unless --temperature says otherwise) after questions of the bundled held-out
conversations. `tokens_a_step`: drawn tokens for each time that the model was asked, 1 without a draft; `accepted`: share
of guesses that were right; `vs_plain`: CPU time (one thread) or wall time of plain decoding divided by the candidate's.
Drafts: n-grams of the text itself; n-grams of the bundled conversations and stories too; the model's own first layers;
any model folder with the same vocabulary. Set BENCH_THREADS=1 on a busy machine.
"""
from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import _common as c


def first_layers(model, layers):
    """The model without its later blocks; its weights are shared."""
    from minigpt.gpt2 import GPT2
    with torch.device("meta"):
        small = GPT2(replace(model.config, n_layer=layers))
    kept = {name: tensor for name, tensor in model.state_dict().items()
            if not name.startswith("blocks.") or int(name.split(".")[1]) < layers}
    small.load_state_dict(kept, assign=True)
    return small.eval()


class Counting:
    """A draft that counts its guesses."""

    def __init__(self, draft):
        self.draft, self.guesses = draft, 0

    def start(self, prompt):
        guess = self.draft.start(prompt)

        def counted(ids, count, rng):
            guesses, probs = guess(ids, count, rng)
            self.guesses += len(guesses)
            return guesses, probs
        return counted


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--prompts", type=int, default=24)
    ap.add_argument("--new", type=int, default=64)
    ap.add_argument("--guesses", type=int, nargs="*", default=[2, 3, 4])
    ap.add_argument("--draft", nargs="*", default=[])
    ap.add_argument("--layers", type=int, nargs="*", default=[1, 2])
    ap.add_argument("--temperature", type=float, default=0.0)
    ap.add_argument("--rounds", type=int, default=2)
    ap.add_argument("--weights", default="auto", choices=["auto", "fast", "live", "int8"])
    a = ap.parse_args()
    torch.set_num_threads(c.threads())
    if c.project() is None:
        return
    from minigpt.engine.tokenizer import Tokenizer
    from minigpt.chat_format import ChatRenderer
    from minigpt.engine.dataset_readers import load_chats, load_text
    from minigpt.deeper.fast_decoding import Decoder
    from minigpt.deeper.speculative import ModelDraft, NGramDraft, speculate
    from minigpt.generation import Options, generate
    from minigpt.gpt2 import GPT2
    model, tokenizer = GPT2.from_pretrained(), Tokenizer.from_pretrained()
    renderer = ChatRenderer(tokenizer)
    chats = load_chats("held")
    step = max(1, len(chats) // a.prompts)
    prompts = [renderer.prompt(chat["messages"][:1]) for chat in chats[::step]][:a.prompts]
    options = Options(max_new_tokens=a.new, temperature=a.temperature, top_k=None if a.temperature == 0 else 50, seed=0,
                      stop_ids=sorted(tokenizer.special_tokens.values()))
    read = [renderer.render(chat["messages"]).ids for chat in load_chats("chats")]
    read += [tokenizer.encode_ordinary(text) for text in load_text("stories")]
    drafts = {"n-grams of the text": NGramDraft(), "n-grams, bundled texts too": NGramDraft(read)}
    for layers in a.layers:
        drafts[f"its first {layers} layers"] = ModelDraft(first_layers(model, layers), options)
    for folder in a.draft:
        drafts[folder] = ModelDraft(GPT2.from_pretrained(folder), options)
    decoder, rows, seconds, counted = Decoder(model, a.weights), [], {}, {}

    def plain():
        return [generate(model, ids, options, decoder=decoder) for ids in prompts]

    def guessing(draft, count):
        def run():
            results = []
            for ids in prompts:
                tokens = speculate(model, draft, ids, options, guesses=count, decoder=decoder)
                for _ in tokens:
                    pass
                results.append(tokens.result)
            return results
        return run

    runs = {("none", 0): plain}
    for name, draft in drafts.items():
        for count in a.guesses:
            counted[name, count] = Counting(draft)
            runs[name, count] = guessing(counted[name, count], count)
    texts = {}
    for turn in range(a.rounds + 1):  # the first warms up
        for key, run in runs.items():
            if key in counted:
                counted[key].guesses = 0
            decoder.ids = []
            begin = c.clock()
            texts[key] = run()
            if turn:
                seconds.setdefault(key, []).append(c.clock() - begin)
    base = c.summary(seconds["none", 0])["median"]
    for (name, count), found in texts.items():
        tokens, steps = sum(len(t.ids) + (t.finish_reason == "stop") for t in found), sum(t.steps for t in found)
        guesses = counted[name, count].guesses if count else 0
        s = c.summary(seconds[name, count])
        rows.append({"draft": name, "guesses": count, "tokens_a_step": tokens / steps,
                     "accepted": (tokens - steps) / guesses if guesses else "", "tok_s": tokens / s["median"],
                     "vs_plain": base / s["median"],
                     "same_tokens": [t.ids for t in found] == [t.ids for t in texts["none", 0]]})
    c.report("speculative", rows, ["draft", "guesses", "tokens_a_step", "accepted", "tok_s", "vs_plain", "same_tokens"],
             temperature=a.temperature, weights=a.weights)


if __name__ == "__main__":
    main()
