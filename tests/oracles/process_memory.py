"""What this process holds: bytes that malloc gave out, and resident memory once all that is free went back. Linux."""

import ctypes
import gc
import os
from pathlib import Path

__all__ = ["CAN_MEASURE", "malloc_bytes", "resident_bytes"]


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc: of its main arena, that of the first thread, and of all that is mapped."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


_libc = ctypes.CDLL(None) if os.name == "posix" else None
CAN_MEASURE = hasattr(_libc, "mallinfo2")  # glibc 2.33


def malloc_bytes() -> int:
    """Bytes in use: of C and C++, and of Python's objects above 512 bytes."""
    gc.collect()
    assert _libc is not None
    _libc.mallinfo2.restype = _Mallinfo2
    info = _libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident_bytes() -> int:
    """Resident memory that is no file's, after malloc returned to the system what it holds free.

    Of libraries the system drops pages when others want memory, which would hide as much that grew.
    """
    gc.collect()
    assert _libc is not None
    _libc.malloc_trim(0)
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
