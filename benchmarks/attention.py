"""Attention: time and memory against length, plain against SDPA, and our layer against nanoGPT's.

    python benchmarks/attention.py [--lengths 128 512 2048] [--rounds 9] [--threads 1] [--nanogpt CHECKOUT]

Forward and backward, B=1, 8 heads of 64, float32. `kept` is what autograd keeps for the backward pass. All candidates
take turns in every round; the median of their CPU time is shown (it hardly feels other programs on the machine when
--threads is 1).
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import _common as c
from minigpt.attention import CausalSelfAttention, attention, set_attn_implementation
from minigpt.engine import kernels  # noqa: F401  registers "blockwise"


def kept_bytes(function) -> int:
    """Bytes of the tensors that autograd keeps while `function` runs, each storage once."""
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(found.values())


def take_turns(candidates: dict, rounds: int) -> dict[str, dict]:
    """CPU milliseconds of forward and backward (median, min, max), the candidates in turn in every round."""
    times = {name: [] for name in candidates}
    for r in range(rounds + 1):
        for name, function in candidates.items():
            start = time.process_time()
            function().float().sum().backward()
            if r:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: {"ms": 1000 * statistics.median(ts), "min": 1000 * min(ts), "max": 1000 * max(ts)}
            for name, ts in times.items()}


def rows_of(case: str, found: dict[str, dict]) -> list[dict]:
    return [{"case": case, "engine": name, **ms} for name, ms in found.items()]


def by_length(lengths: list[int], rounds: int) -> list[dict]:
    rows = []
    print(f"{'T':>6} {'plain ms':>10} {'SDPA ms':>10} {'plain MiB':>10} {'SDPA MiB':>10}")
    for T in lengths:
        q, k, v = torch.randn(3, 1, 8, T, 64).requires_grad_().unbind()
        candidates = {"plain": lambda: attention(q, k, v)[0],
                      "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
        ms = take_turns(candidates, rounds)
        kept = {name: kept_bytes(f) / 2**20 for name, f in candidates.items()}
        rows += rows_of(f"{T} tokens", ms)
        print(f"{T:6} {ms['plain']['ms']:10.2f} {ms['SDPA']['ms']:10.2f} {kept['plain']:10.1f} {kept['SDPA']:10.1f}")
    return rows


def against_nanogpt(folder: str, rounds: int) -> list[dict]:
    rows = []
    sys.path.insert(0, folder)
    import model as nanogpt
    print(f"\n{'layer':>24} {'dtype':>6} {'ours ms':>9} {'eager ms':>10} {'nanoGPT ms':>11} {'nanoGPT/ours':>13}")
    for B, T, C, H in ((8, 256, 384, 6), (4, 256, 512, 8), (2, 256, 768, 12)):
        config = nanogpt.GPTConfig(block_size=T, n_head=H, n_embd=C, dropout=0.0, bias=True)
        ours, eager, theirs = CausalSelfAttention(C, H), CausalSelfAttention(C, H), nanogpt.CausalSelfAttention(config)
        set_attn_implementation(ours, "blockwise")
        set_attn_implementation(eager, "eager")
        x = torch.randn(B, T, C, requires_grad=True)
        for bf16 in (False, True):
            def run(layer):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    return layer(x)
            ms = take_turns({"minigpt": lambda: run(ours), "minigpt, eager": lambda: run(eager),
                             "nanoGPT": lambda: run(theirs)}, rounds)
            rows += rows_of(f"layer {B}x{T}x{C}, {H} heads, {'bf16' if bf16 else 'fp32'}", ms)
            mine, plain, nano = (one["ms"] for one in ms.values())
            print(f"{f'{B}x{T}x{C}, {H} heads':>24} {'bf16' if bf16 else 'fp32':>6} {mine:9.2f} "
                  f"{plain:10.2f} {nano:11.2f} {nano / mine:13.3f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nanogpt", metavar="CHECKOUT", help="a checkout of karpathy/nanoGPT, to measure against")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = by_length(args.lengths, args.rounds)
    if args.nanogpt:
        rows += against_nanogpt(args.nanogpt, 3 * args.rounds)
    c.report("attention", rows, ["case", "engine", "ms", "min", "max"])


if __name__ == "__main__":
    main()
