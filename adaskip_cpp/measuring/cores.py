"""How many threads to compute with, and whether the machine is free to."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

__all__ = ["BUSY", "physical_cores"]

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
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return max(min(len(cores), _cgroup_quota() or len(cores)), 1)


def _cgroup_quota() -> int | None:
    """Return a container's limit in whole CPUs, rounded up; None without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return None


def _darwin() -> int | None:
    libc, count = ctypes.CDLL(None), ctypes.c_int(0)
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):
        size = ctypes.c_size_t(ctypes.sizeof(count))
        if libc.sysctlbyname(name, ctypes.byref(count), ctypes.byref(size), None, 0) == 0 and count.value > 0:
            return count.value
    return None
