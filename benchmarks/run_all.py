"""Run the benchmarks one after the other and keep their results for the site's page.

  python benchmarks/run_all.py                     all of them (an hour on two cores that do nothing else)
  python benchmarks/run_all.py --only generate pack
  python benchmarks/run_all.py --list

benchmarks.json names them: the command, and how the page shows its rows. Rows alike in `group` are compared by what stands
in `who`, in each of `metrics` (`less`: less is better; `spread`: its lowest and highest, min and max if not said); with no
`who` the `columns` are shown as they are. Each script's last line (JSON) goes into benchmarks/results/NAME.json with the
date and the command; then `python tools/pages.py` writes nbs/benchmarks.md. Peers that are checkouts come from the environment, and rows of
those that are missing are left out: NANOGPT_DIR, MINBPE_DIR, LLMS_FROM_SCRATCH_DIR. BENCH_CACHE and BENCH_THREADS as in
_common.py. The texts are made first if they are not there (prepare_text.py). Compare ratios of one run only.
"""
from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import _common as c

HERE = Path(__file__).resolve().parent
RUNS = json.loads((HERE / "benchmarks.json").read_text(encoding="utf-8"))
# Scripts that measure something else than speed, or need another checkout; run them by hand.
OTHERS = {"clients.py", "soak.py", "decode.py", "training_lesson.py"}


def why_not(script: str) -> str:
    """Why a benchmark cannot run here, or ""."""
    if not (HERE / script).exists():
        return "its script is not there"
    if script == "gpu_train.py":
        import torch
        return "" if torch.cuda.is_available() else "no CUDA device"
    return ""


def run(name: str, results: Path) -> str:
    """Run one benchmark; what to print about it."""
    script, *arguments = shlex.split(RUNS[name]["command"])
    if reason := why_not(script):
        return f"left out: {reason}"
    if script == "attention.py" and os.environ.get("NANOGPT_DIR"):
        arguments += ["--nanogpt", os.environ["NANOGPT_DIR"]]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(HERE / script), *arguments], cwd=HERE.parent, capture_output=True, text=True)
    (results / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return f"failed (code {done.returncode}): {(done.stderr.strip() or 'no output').splitlines()[-1]}"
    result.setdefault("machine", c.machine())
    kept = {"name": name, "date": date.today().isoformat(), "command": f"python benchmarks/{RUNS[name]['command']}",
            "seconds": round(time.perf_counter() - start), "result": result}
    (results / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8", newline="\n")
    return f"{kept['seconds']} s, {len(result['rows'])} rows"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), metavar="NAME", default=list(RUNS))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        for name, run_ in RUNS.items():
            print(f"{name:20} {run_['command']:60} {why_not(run_['command'].split()[0])}")
        return 0
    args.results.mkdir(parents=True, exist_ok=True)
    if not (c.cache_dir() / "text-20mb.txt").exists():
        subprocess.run([sys.executable, str(HERE / "prepare_text.py")], check=True)
    failed = False
    for name in args.only:
        said = run(name, args.results)
        failed |= said.startswith("failed")
        print(f"{name}: {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
