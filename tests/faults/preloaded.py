"""Processes of trials: with shared libraries in front of all others, to make calls fail, or forks that may end."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from oracles import programs

HERE = Path(__file__).parent
T = TypeVar("T")


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
    """Run a program of this folder, on one thread, with a library in front; return the JSON that each trial prints."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**programs.environment(), **one, "LD_PRELOAD": str(library), "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, str(HERE / program), *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = process.stdout.splitlines()
    assert process.returncode == 0, f"exit code {process.returncode} after {lines[-1:]}: {process.stderr[-3000:]}"
    return [json.loads(line) for line in lines]


class ForkEndedError(Exception):
    """The fork ended before its function did; with its exit code, negative for a signal."""


def in_a_fork(function: Callable[[], T]) -> T:
    """What a function returns in a fork of this process; ForkEndedError if that ends before."""
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: writer.send(function()))
    process.start()
    writer.close()
    with reader:
        try:
            result: T = reader.recv()
        except EOFError:
            process.join()
            raise ForkEndedError(process.exitcode) from None
    process.join()
    return result
