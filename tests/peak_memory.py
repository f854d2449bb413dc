"""What a process of Linux holds in memory, for the programs that tests start."""
import ctypes
import gc


def status(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is what it holds now, VmHWM the most since forget_peak()."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def forget_peak() -> int:
    """Begin to look for the peak anew; what is held now."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return status("VmRSS")
