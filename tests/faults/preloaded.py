"""Shared libraries that a process is started with, in front of all others, to make what it calls fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracles import programs

__all__ = ["build", "trials"]

HERE = Path(__file__).parent


def build(source: str, folder: Path, *more: str) -> Path:
    """Compile a source of the tests, with ``more`` options; skip the test where that is not possible."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None or compiler is None:
        pytest.skip("it needs Linux with glibc, and a C++ compiler")
    target = folder / f"{Path(source).stem}.so"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, str(HERE / source), "-o", str(target), "-ldl", *more], check=True)
    return target


def trials(library: Path, program: str, *arguments: object) -> list[dict[str, Any]]:
    """Run a program of this folder with a library in front; return the lines of JSON that it prints, one per trial.

    It computes on one thread, as it is forked or counts calls.

    Raises:
        RuntimeError: the program failed, or a trial ended it; the message has the last line and the end of stderr.
    """
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**programs.environment(), **one, "LD_PRELOAD": str(library), "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = process.stdout.splitlines()
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode} after {lines[-1:]}: {process.stderr[-3000:]}")
    return [json.loads(line) for line in lines]
