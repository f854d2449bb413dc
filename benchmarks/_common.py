"""Shared helpers of the benchmark scripts: cache folder, timing, memory, reporting.

Every script prints a small table and, as its last line, one JSON object.
Environment:
  MINIGPT_DIR    folder that holds the package (default: the folder above this one)
  BENCH_CACHE    folder for texts and vocabularies (default: ~/.cache/minigpt-bench)
  BENCH_THREADS  threads for torch and friends (default: all cores of this process)
"""
from __future__ import annotations

import importlib
import json
import multiprocessing as mp
import os
import platform
import statistics
import sys
import time
import traceback
from pathlib import Path

try:
    import resource
except ImportError:  # Windows: no memory figures there
    resource = None

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def cache_dir() -> Path:
    default = Path.home() / ".cache" / "minigpt-bench"
    path = Path(os.environ.get("BENCH_CACHE", default))
    path.mkdir(parents=True, exist_ok=True)
    return path


def threads() -> int:
    n = os.environ.get("BENCH_THREADS")
    return int(n) if n else cores()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_text(name: str) -> str:
    """`name` is a file of the cache folder ("text-1mb.txt") or a path."""
    path = Path(name)
    if not path.exists():
        path = cache_dir() / name
    if not path.exists():
        sys.exit(f"{path} is missing: run `python benchmarks/prepare_text.py` first (its docstring names the sources)")
    return path.read_text(encoding="utf-8")


def find_module(name: str, directory: str | Path | None = None):
    """Import `name`, from `directory` when one is given; None if that fails."""
    if directory:
        directory = str(Path(directory).expanduser())
        if not Path(directory).is_dir():
            return None
        sys.path.insert(0, directory)
    try:
        return importlib.import_module(name)
    except Exception:
        return None
    finally:
        if directory:
            sys.path.remove(directory)


def project():
    """The project's package, or None (with a message on stderr) while it isn't importable."""
    module = find_module("minigpt", os.environ.get("MINIGPT_DIR", Path(__file__).resolve().parent.parent))
    if module is None:
        print("minigpt: skipped, the package isn't importable yet", file=sys.stderr)
    return module


# ---------------------------------------------------------------- measuring

def rss_mb() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_rss_mb() -> float:
    if resource is None:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak_rss() -> bool:
    """Make the kernel forget this process's peak RSS (VmHWM); False where that isn't allowed."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        return True
    except OSError:
        return False


def vm_hwm_mb() -> float:
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return peak_rss_mb()


def summary(values) -> dict:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def clock() -> float:
    """CPU time of the process with one thread (a busy machine hardly changes it), else wall time."""
    return time.process_time() if threads() == 1 else time.perf_counter()


def repeat(fn, n: int, warmup: int = 1) -> list[float]:
    """Times of `n` calls after `warmup` calls, by clock()."""
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(n):
        t = clock()
        fn()
        times.append(clock() - t)
    return times


def _child(conn, fn, args, kwargs):
    try:
        conn.send(("ok", fn(*args, **kwargs)))
    except BaseException as e:  # report any failure to the parent
        conn.send(("error", f"{type(e).__name__}: {e}\n{traceback.format_exc(limit=4)}"))
    finally:
        conn.close()


def in_subprocess(fn, *args, timeout_s: float = 600, **kwargs):
    """Run fn in a fresh Python process (own peak RSS, own thread pools).
    Returns (result, None) or (None, reason)."""
    ctx = mp.get_context("spawn")
    here, there = ctx.Pipe(duplex=False)
    p = ctx.Process(target=_child, args=(there, fn, args, kwargs))
    p.start()
    there.close()
    result, reason = None, None
    if here.poll(timeout_s):
        try:
            kind, value = here.recv()
            if kind == "ok":
                result = value
            else:
                reason = value
        except EOFError:
            reason = "the process died"
    else:
        reason = f"over {timeout_s:.0f} s"
        p.kill()
    p.join()
    return result, reason


# ---------------------------------------------------------------- reporting

def machine() -> dict:
    cpu = ""
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next(l.split(":", 1)[1].strip() for l in f if l.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    info = {"cpu": cpu, "cores": cores(), "threads": threads(),
            "load1": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None, "python": platform.python_version(),
            "kernel": platform.release()}
    from importlib import metadata
    for name in ("torch", "transformers", "tokenizers", "tiktoken", "rustbpe", "bpeasy", "peft",
                 "ctranslate2", "llama-cpp-python", "rank-bm25", "bm25s", "regex", "minigpt"):
        try:
            info[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return info


def fmt(x, digits=4) -> str:
    if isinstance(x, float):
        if x != 0 and (abs(x) >= 1000):
            return f"{x:,.0f}"
        return f"{x:.{digits}g}"
    return str(x)


def table(rows: list[dict], columns: list[str]) -> str:
    cells = [[fmt(r.get(c, "")) for c in columns] for r in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) if cells else len(c) for i, c in enumerate(columns)]
    def line(values):
        return "| " + " | ".join(v.ljust(w) for v, w in zip(values, widths)) + " |"
    return "\n".join([line(columns), "|" + "|".join("-" * (w + 2) for w in widths) + "|"] + [line(c) for c in cells])


def report(name: str, rows: list[dict], columns: list[str], **extra) -> None:
    print(table(rows, columns))
    print(json.dumps({"bench": name, "machine": machine(), "rows": rows, **extra}))
