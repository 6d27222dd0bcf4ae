"""What was found stays found: every target of ``make fuzz`` takes all of its seeds, without the fuzzer.

In a process of its own, as an input may end it. A seed is named by what is interesting about it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="every model is opened in a fork, with a limit of memory")
from faults.fuzz_targets import TARGETS
from oracles.programs import environment

HERE = Path(__file__).parent


@pytest.mark.parametrize("target", TARGETS)
def test_every_seed_is_taken_or_refused_by_an_error_of_ours(target: str) -> None:
    seeds = sorted((HERE / "seeds" / target).iterdir())
    assert seeds
    command = [sys.executable, str(HERE / "fuzz_targets.py"), target, *map(str, seeds)]
    quiet = {**environment(), "GGML_NO_BACKTRACE": "1"}
    process = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-200:] + process.stderr[-3000:]
