"""What this process holds: bytes that malloc gave out, and resident memory once all that is free went back. Linux."""

import gc
import sys

import psutil

CAN_MEASURE = sys.platform == "linux" and hasattr(psutil, "heap_info")  # psutil 7.2 has it, with glibc


def malloc_bytes() -> int:
    """Bytes in use: of C and C++, and of Python's objects above 512 bytes."""
    gc.collect()
    heap = psutil.heap_info()
    return int(heap.heap_used + heap.mmap_used)


def resident_bytes() -> int:
    """Resident memory that is no file's: of libraries the system drops pages when others want memory."""
    gc.collect()
    psutil.heap_trim()
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)
