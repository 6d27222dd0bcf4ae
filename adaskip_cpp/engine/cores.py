"""Counts the cores to compute with, and finds out whether other programs use the machine."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_BUSY = 0.5  # with a load average above this, other programs disturb timings


def load_average() -> float | None:
    """Return the load average of the last minute, in CPUs; None on Windows or without ``/proc``, which have none."""
    if sys.platform != "win32":  # a statement, as mypy knows no platform in an expression
        with contextlib.suppress(OSError):
            return os.getloadavg()[0]
    return None


def busy_warning(load: float | None) -> str:
    """Return a sentence for the user before a measurement on a busy machine, else an empty one."""
    if load is None or load <= _BUSY:
        return ""
    why = "If other programs are running, they disturb the times: close them, and start again."
    return f"Warning: the load average is {load:.2f}. {why}"


def physical_cores() -> int:
    """Return the number of physical cores that this process may use; on Apple Silicon, of performance cores alone.

    A second thread on the same core does not speed up llama.cpp's matrix products, and slow cores make the others wait.
    """
    if sys.platform == "linux":
        return _linux(os.sched_getaffinity(0))
    return (_darwin() if sys.platform == "darwin" else None) or max((os.cpu_count() or 2) // 2, 1)


def logical_cores() -> int:
    """Return how many hardware threads this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _linux(cpus: Iterable[int]) -> int:
    cores = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    try:  # a container's limit, rounded up to whole CPUs
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return min(len(cores), -(-quota // period))
    except (OSError, ValueError):  # no container, or "max": no limit
        return len(cores)


def _darwin() -> int | None:
    libc, count = ctypes.CDLL(None), ctypes.c_int(0)
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):
        size = ctypes.c_size_t(ctypes.sizeof(count))
        if libc.sysctlbyname(name, ctypes.byref(count), ctypes.byref(size), None, 0) == 0 and count.value > 0:
            return count.value
    return None
