"""Generate 128 tokens after a 32-token prompt, greedy, random weights: new tokens/s for batch 1 and 8.

  python benchmarks/generate.py [--configs shipped mini gpt2-small] [--rounds 3] [--new 128] [--nanogpt DIR] [--llms DIR]
                           [--only NAME ...] [--skip NAME ...]
  NANOGPT_DIR, LLMS_FROM_SCRATCH_DIR: checkouts of karpathy/nanoGPT and rasbt/LLMs-from-scratch

fp32 unless the name says otherwise. CTranslate2 converts the same HF model (saved with save_pretrained under
BENCH_CACHE) and stands for what the machine can do outside PyTorch. The bandwidth row gives the limit of a
batch-1 step: every weight read once per token at the measured matrix-vector speed.
`mean_tok_ms` is time over --new steps (prompt included).
On a busy machine set BENCH_THREADS=1: `tok_cpu_s` (tokens per second of CPU time) and `vs_HF` are then taken from CPU
time and hardly feel the neighbours.
"""
from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import time

import torch
import torch.nn.functional as F

import _common as c
import _models as m

PROMPT = 32
CONFIGS = m.CONFIGS | {"shipped": dict(n_layer=8, n_head=8, n_embd=512, block=1024, vocab=20000)}  # of minigpt-chat


def project_model(cfg, state_dict, dtype=torch.float32):
    """The project's model with the HF model's weights, or None where the package isn't importable."""
    if c.project() is None:
        return None
    from minigpt.gpt2 import GPT2, GPT2Config
    model = GPT2(GPT2Config(vocab_size=cfg["vocab"], block_size=cfg["block"], n_layer=cfg["n_layer"],
                            n_head=cfg["n_head"], n_embd=cfg["n_embd"], bos_token_id=0, eos_token_id=0))
    names = {k: k.removeprefix("transformer.").replace("h.", "blocks.", 1) if ".h." in k else k.removeprefix("transformer.")
             for k in state_dict if not k.startswith("lm_head")}
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D keeps (in, out)
    model.load_state_dict({ours: state_dict[k].t() if k.endswith(turned) else state_dict[k] for k, ours in names.items()})
    return model.eval().to(dtype)


def load_project(cfg, state_dict, dtype=torch.float32, weights="auto", beams=0):
    """generate(ids, new_tokens) -> ids, from the HF model's weights. `weights`: see minigpt.deeper.fast_decoding.Decoder."""
    model = project_model(cfg, state_dict, dtype)
    if model is None:
        return None
    from minigpt.deeper.beam_search import beam_search
    from minigpt.deeper.fast_decoding import Decoder
    from minigpt.generation import generate
    decoder = Decoder(model, weights)

    def run(ids, new):
        if beams:
            best = beam_search(model, ids[0], num_beams=beams, max_new_tokens=new, stop_ids=(), decoder=decoder)[0]
            return torch.cat([ids, torch.tensor([best.ids])], 1)
        rows = ids.tolist()
        out = generate(model, rows, max_new_tokens=new, temperature=0, stop_ids=(), decoder=decoder)
        return torch.tensor([row + g.ids for row, g in zip(rows, out)])
    return run


def hf_generate(model, **kw):
    def run(ids, new):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                              do_sample=False, pad_token_id=0, eos_token_id=None, **kw)
    return run


def sketch(hf, cfg, dtype=torch.float32):
    """A plain decode loop for GPT-2: preallocated KV cache, fused qkv, SDPA on the filled part, head on the last
    position only. What a small readable PyTorch implementation can reach."""
    sd = {k: v.detach().to(dtype) for k, v in hf.state_dict().items()}
    n_head, e, n_layer = cfg["n_head"], cfg["n_embd"], cfg["n_layer"]
    wte, wpe = sd["transformer.wte.weight"], sd["transformer.wpe.weight"]
    layers = []
    for i in range(n_layer):
        g = lambda name: sd[f"transformer.h.{i}.{name}"]
        layers.append(dict(ln1=(g("ln_1.weight"), g("ln_1.bias")), ln2=(g("ln_2.weight"), g("ln_2.bias")),
                           **{k: (g(f"{n}.weight").t().contiguous(), g(f"{n}.bias")) for k, n in
                              (("qkv", "attn.c_attn"), ("out", "attn.c_proj"), ("fc", "mlp.c_fc"), ("proj", "mlp.c_proj"))}))
    ln_f = (sd["transformer.ln_f.weight"], sd["transformer.ln_f.bias"])

    def forward(ids, pos, cache):
        b, t = ids.shape
        x = F.embedding(ids, wte) + wpe[pos:pos + t]
        for layer, (k_cache, v_cache) in zip(layers, cache):
            h = F.layer_norm(x, (e,), *layer["ln1"])
            q, k, v = F.linear(h, *layer["qkv"]).view(b, t, 3, n_head, e // n_head).permute(2, 0, 3, 1, 4)
            k_cache[:, :, pos:pos + t], v_cache[:, :, pos:pos + t] = k, v
            y = F.scaled_dot_product_attention(q, k_cache[:, :, :pos + t], v_cache[:, :, :pos + t], is_causal=t > 1)
            x = x + F.linear(y.transpose(1, 2).reshape(b, t, e), *layer["out"])
            h = F.layer_norm(x, (e,), *layer["ln2"])
            x = x + F.linear(F.gelu(F.linear(h, *layer["fc"]), approximate="tanh"), *layer["proj"])
        return F.linear(F.layer_norm(x[:, -1], (e,), *ln_f), wte)

    @torch.inference_mode()
    def run(ids, new):
        b, t = ids.shape
        cache = [tuple(torch.empty(b, n_head, t + new, e // n_head, dtype=dtype) for _ in "kv") for _ in layers]
        out, pos, last = [ids], 0, ids
        for _ in range(new):
            logits = forward(last, pos, cache)
            pos += last.shape[1]
            last = logits.argmax(-1, keepdim=True)
            out.append(last)
        return torch.cat(out, 1)
    return run


def ct2(hf, cfg, name, compute_type):
    import ctranslate2
    from transformers import GPT2TokenizerFast
    source, target = c.cache_dir() / f"hf-{name}", c.cache_dir() / f"ct2-{name}-{compute_type}"
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    hf.save_pretrained(source)
    # the converter wants a tokenizer of the right size; its words don't matter here
    from tokenizers import Tokenizer, models
    GPT2TokenizerFast(tokenizer_object=Tokenizer(models.BPE({f"t{i}": i for i in range(cfg["vocab"])}, [])),
                      bos_token="t0", eos_token="t0", unk_token="t0").save_pretrained(source)
    # GPT-2's plain gelu_new loader expects the classic config; a quantization is applied at conversion
    ctranslate2.converters.TransformersConverter(str(source)).convert(
        str(target), quantization=None if compute_type == "float32" else compute_type, force=True)
    gen = ctranslate2.Generator(str(target), device="cpu", compute_type=compute_type, inter_threads=1,
                                intra_threads=c.threads())

    def run(ids, new, beam=1):
        prompts = [[f"t{i}" for i in row] for row in ids.tolist()]
        out = gen.generate_batch(prompts, max_length=new, min_length=new, beam_size=beam, end_token=[],
                                 include_prompt_in_result=False)
        assert all(len(o.sequences_ids[0]) == new for o in out), [len(o.sequences_ids[0]) for o in out]
        return torch.cat([ids, torch.tensor([o.sequences_ids[0] for o in out])], 1)
    return run


def bandwidth_gb_s(rows=50257, cols=768) -> dict:
    out = {}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        w, x = torch.randn(rows, cols).to(dtype), torch.randn(1, cols).to(dtype)
        t = min(c.repeat(lambda: F.linear(x, w), 15, warmup=3))
        out[label] = w.numel() * w.element_size() / t / 1e9
    return out


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--nanogpt", default=os.environ.get("NANOGPT_DIR"))
    ap.add_argument("--llms", default=os.environ.get("LLMS_FROM_SCRATCH_DIR"))
    ap.add_argument("--configs", nargs="*", default=list(CONFIGS))
    ap.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--new", type=int, default=128)
    ap.add_argument("--only", nargs="*")
    ap.add_argument("--skip", nargs="*", default=[])
    a = ap.parse_args()
    torch.set_num_threads(c.threads())
    rows, limits = [], []
    for name in a.configs:
        cfg = CONFIGS[name]
        torch.manual_seed(0)
        hf = m.hf_gpt2(cfg).eval()
        with torch.no_grad():  # spread the logits, so that greedy choices aren't near ties
            hf.transformer.wte.weight.mul_(4)
        weights = sum(p.numel() for p in hf.parameters()) - cfg["block"] * cfg["n_embd"]
        gb = bandwidth_gb_s()  # best of several, by c.clock()
        for dtype, size in (("fp32", 4), ("bf16", 2)):
            limits.append({"config": name, "dtype": dtype, "gemv_gb_s": gb[dtype],
                           "tok_s_limit_batch1": gb[dtype] * 1e9 / (weights * size)})
        makers = {
            "HF generate": lambda: hf_generate(hf),
            "HF generate, static cache": lambda: hf_generate(hf, cache_implementation="static"),
            "HF generate, 4 beams": lambda: hf_generate(hf, num_beams=4),
            "nanoGPT (no cache)": lambda: (lambda g: lambda ids, new: g.generate(ids, new, top_k=1))(m.nanogpt(cfg, a.nanogpt).eval()),
            "LLMs-from-scratch, KV cache": lambda: (lambda mm: lambda ids, new: mm[1].generate_text_simple_cached(mm[0].eval(), ids, new))(
                m.llms_from_scratch(cfg, a.llms, kv_cache=True)),
            "PyTorch sketch": lambda: sketch(hf, cfg),
            "PyTorch sketch, bf16": lambda: sketch(hf, cfg, torch.bfloat16),
            "CTranslate2": lambda: ct2(hf, cfg, name, "float32"),
            "CTranslate2 int8": lambda: ct2(hf, cfg, name, "int8"),
            "CTranslate2, 4 beams": lambda: (lambda r: lambda ids, new: r(ids, new, beam=4))(ct2(hf, cfg, name, "float32")),
            "minigpt": lambda: load_project(cfg, hf.state_dict()),
            "minigpt, live weights": lambda: load_project(cfg, hf.state_dict(), weights="live"),
            "minigpt, bf16": lambda: load_project(cfg, hf.state_dict(), torch.bfloat16),
            "minigpt, int8": lambda: load_project(cfg, hf.state_dict(), weights="int8"),
            "minigpt, 4 beams": lambda: load_project(cfg, hf.state_dict(), beams=4),
        }
        made = {}
        for cand, make in makers.items():
            if a.only and cand not in a.only or cand in a.skip:
                continue
            try:
                run = make()
                if run is not None:
                    made[cand] = run
            except Exception as e:
                print(f"{cand}: {type(e).__name__}: {str(e).splitlines()[0]}", file=sys.stderr)
        for batch in a.batches:
            ids = torch.randint(cfg["vocab"], (batch, PROMPT), generator=torch.Generator().manual_seed(1))
            times, cpus, want, same, first = {}, {}, None, {}, {}
            for cand, run in made.items():
                if "beams" in cand and batch > 1:
                    continue
                try:
                    t = time.perf_counter()
                    out = run(ids, a.new)
                    first[cand] = time.perf_counter() - t
                    assert out.shape == (batch, PROMPT + a.new), out.shape
                    want = out if cand == "HF generate" else want
                    same[cand] = None if want is None else (out == want)[:, PROMPT:].float().mean().item()
                    times[cand], cpus[cand] = [], []
                    print(f"{name} batch {batch} {cand}: first {first[cand]:.1f} s", file=sys.stderr, flush=True)
                except Exception as e:
                    print(f"{cand}: {type(e).__name__}: {str(e).splitlines()[0]}", file=sys.stderr)
            for _ in range(a.rounds):
                for cand in times:
                    t, cpu = time.perf_counter(), time.process_time()
                    made[cand](ids, a.new)
                    times[cand].append(time.perf_counter() - t)
                    cpus[cand].append(time.process_time() - cpu)
            ratio = cpus if c.threads() == 1 else times
            base = c.summary(ratio.get("HF generate", [float("nan")]))["median"]
            for cand, ts in times.items():
                s, n = c.summary(ts), batch * a.new
                rows.append({"config": name, "batch": batch, "engine": cand, "tok_s": n / s["median"], "min": n / s["max"],
                             "max": n / s["min"], "tok_cpu_s": n / c.summary(cpus[cand])["median"],
                             "vs_HF": base / c.summary(ratio[cand])["median"], "mean_tok_ms": s["median"] / a.new * 1e3,
                             "same_tokens_as_HF": same[cand]})
                print(c.table(rows[-1:], list(rows[-1])).splitlines()[-1], file=sys.stderr, flush=True)
        made.clear()
        gc.collect()
    print(c.table(limits, ["config", "dtype", "gemv_gb_s", "tok_s_limit_batch1"]))
    c.report("generate", rows, ["config", "batch", "engine", "tok_s", "min", "max", "tok_cpu_s", "vs_HF", "mean_tok_ms", "same_tokens_as_HF"],
             limits=limits)


if __name__ == "__main__":
    main()
