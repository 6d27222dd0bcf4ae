"""What tests of the command line share."""

import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

import adaskip_cpp
from adaskip_cpp.cli.main import main

RUN = "-c", "from adaskip_cpp.cli.main import main; main()", "run"
"""What :func:`python` is given for ``adaskip-cpp run ...``."""


def run(*args: object, stdin: str | None = None, code: int = 0) -> Result:
    """The result of ``adaskip-cpp ...`` in this process, which ends with this code."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin, prog_name="adaskip-cpp")
    assert result.exit_code == code, result.output
    return result


def line(result: Result) -> str:
    """The one line of a user's error, which is all that is printed."""
    assert result.stdout == ""
    (only,) = result.stderr.splitlines()
    assert only.startswith("Error: ")
    return only


def fails(*args: object, code: int = 1) -> str:
    """That line, of ``adaskip-cpp ...`` in this process."""
    return line(run(*args, code=code))


def python(folder: Path, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """What ``python`` ends with after a command in a folder, with this package and these environment variables."""
    environment = {**os.environ, "PYTHONPATH": str(Path(adaskip_cpp.__file__).parents[1]), **variables}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
