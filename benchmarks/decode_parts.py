"""Where a step of decoding goes: the shipped model, greedy, milliseconds a step for 1 row and 8.

  python benchmarks/decode_parts.py [--batches 1 8] [--new 32] [--rounds 7]

`step`: one token of `generate` for each row, the prompt's reading taken off. `products`: all linear layers and the head,
called alone on rows of random numbers. `rest`: all else (attention, norms, GELU, the cache, the choice of a token, and
Python between them). The best of the rounds, which take turns. Set BENCH_THREADS=1 on a busy machine: CPU time.
"""
from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import _common as c


def matrices(net):
    """Pairs of a linear layer (the head, too) and its number of inputs."""
    found = [(m, m.weight.shape[1]) for m in net.modules() if hasattr(m, "multiply") or isinstance(m, torch.nn.Linear)]
    if net.lm_head is None:
        table = net.wte.weight
        found.append((lambda x: F.linear(x, table), table.shape[1]))
    return found


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    ap.add_argument("--new", type=int, default=32)
    ap.add_argument("--rounds", type=int, default=7)
    a = ap.parse_args()
    torch.set_num_threads(c.threads())
    if c.project() is None:
        return
    from minigpt.deeper.fast_decoding import Decoder
    from minigpt.generation import generate
    from minigpt.gpt2 import GPT2
    model = GPT2.from_pretrained()
    rows = []

    def best(*calls):
        """The least milliseconds of each call, in turns."""
        times = [[1000 * c.repeat(call, 1, warmup=not turn)[0] for call in calls] for turn in range(a.rounds)]
        return [min(found) for found in zip(*times)]

    for batch in a.batches:
        prompts = [[5] * 32] * batch
        for weights in ("live", "fast", "int8"):
            decoder = Decoder(model, weights)
            parts = [(layer, torch.randn(batch, 1, width)) for layer, width in matrices(decoder.net)]

            @torch.inference_mode()
            def products():
                for _ in range(a.new):
                    for layer, x in parts:
                        layer(x)

            def draw(count):
                decoder.ids = []
                generate(model, prompts, max_new_tokens=count, temperature=0, stop_ids=(), decoder=decoder)

            whole, first, alone = best(lambda: draw(a.new + 1), lambda: draw(1), products)
            step, alone = (whole - first) / a.new, alone / a.new
            rows.append({"weights": weights, "batch": batch, "step": step, "products": alone, "rest": step - alone})
    c.report("decode_parts", rows, list(rows[0]))


if __name__ == "__main__":
    main()
