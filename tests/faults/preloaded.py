"""Shared libraries that a process is started with, in front of all others, to make what it calls fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import programs

__all__ = ["build", "environment"]


def build(source: str, folder: Path, *more: str) -> Path:
    """Compile a source of the tests, with ``more`` options; skip the test where that is not possible."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None or compiler is None:
        pytest.skip("it needs Linux with glibc, and a C++ compiler")
    target = folder / f"{Path(source).stem}.so"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC"]
    command = [compiler, *options, str(Path(__file__).with_name(source)), "-o", str(target), "-ldl", *more]
    subprocess.run(command, check=True)
    return target


def environment(library: Path, **more: str) -> dict[str, str]:
    """The environment of a process that has it; one thread for whatever computes, as it is forked or counts calls."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**programs.environment(), **one, "LD_PRELOAD": str(library), "GGML_NO_BACKTRACE": "1", **more}
