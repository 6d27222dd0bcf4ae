"""How many threads to compute with, and whether the machine is free to."""

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_BUSY = 0.5  # load average from which a machine counts as busy: other programs disturb what is timed


def load_average() -> float | None:
    """Return that of the last minute, in CPUs; None where the system keeps none, as Windows."""
    if sys.platform == "win32":
        return None
    return os.getloadavg()[0]


def is_busy(load: float | None) -> bool:
    return load is not None and load > _BUSY


def physical_cores() -> int:
    """Return the number of physical cores that this process may use.

    llama.cpp's matrix products gain nothing from a second thread on the same core, and lose from waiting for slow
    cores: on Apple Silicon only performance cores count.
    """
    if sys.platform == "linux":
        return _linux(os.sched_getaffinity(0))
    return (_darwin() if sys.platform == "darwin" else None) or max((os.cpu_count() or 2) // 2, 1)


def logical_cores() -> int:
    """Return the number of hardware threads that this process may use."""
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
