"""The tokenizer's benchmark scripts run, and what they compare is equal."""
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tiktoken")
pytest.importorskip("tokenizers")
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cache = tmp_path_factory.mktemp("bench")
    stories = (ROOT / "minigpt" / "assets" / "data" / "stories.txt").read_text(encoding="utf-8")
    with lzma.open(cache / "chats.jsonl.xz", "wt", encoding="utf-8") as file:
        for story in stories.split("<|endoftext|>")[:300]:
            file.write(json.dumps(["story", ["Tell me a story.", story.strip()]]) + "\n")

    def call(script, *args):
        env = os.environ | {"BENCH_CACHE": str(cache), "BENCH_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *args], env=env, text=True,
                              capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    sizes = call("prepare_text.py", "--conversations", str(cache / "chats.jsonl.xz"), "--mb", "0.1")["bytes"]
    assert set(sizes) == {"text-1mb.txt", "text-20mb.txt", "text-other.txt"} and all(sizes.values())
    return call


def test_training_has_the_merges_of_hf_tokenizers(run):
    rows = run("bpe_train.py", "--quick", "--only", "hf-tokenizers", "minigpt", "--repeat", "1")["rows"]
    assert [r["same_merges"] for r in rows if r["trainer"] == "minigpt"] == [True] * 3


def test_encoding_has_the_ids_of_tiktoken(run):
    rows = run("bpe_encode.py", "--texts", "text-other.txt", "--threads", "1", "--only", "tiktoken", "minigpt",
               "minigpt-numpy", "--passes", "1", "--rounds", "1")["rows"]
    assert {r["encoder"]: r["same_ids"] for r in rows} == {"tiktoken": True, "minigpt": True, "minigpt-numpy": True}
