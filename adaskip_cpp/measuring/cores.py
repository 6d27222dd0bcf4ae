"""How many threads to compute with, and whether the machine is free to."""

import ctypes
import os
import sys
from pathlib import Path

BUSY = 0.5
"""Load average of a minute, in CPUs, from which a machine counts as busy: other programs disturb what is timed."""


def physical_cores() -> int:
    """Return the number of physical cores that this process may use.

    llama.cpp's matrix products gain nothing from a second thread on the same core, and lose from waiting for slow
    cores: on Apple Silicon only performance cores count.
    """
    if sys.platform == "linux":
        return _linux()
    return (_darwin() if sys.platform == "darwin" else None) or max((os.cpu_count() or 2) // 2, 1)


def _linux() -> int:
    cores = set()
    for cpu in os.sched_getaffinity(0):
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
