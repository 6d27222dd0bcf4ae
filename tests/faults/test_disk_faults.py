"""Wherever the disk is full, or the process is killed, while a file is written: the old one is whole, or the new one.

What is read afterwards is compared with what was written into folders where nothing failed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from faults.disk_trials import CASES, trials
from faults.preloaded import build, environment

HIDDEN = re.compile(r"(.*/)?\..+\.(tmp|new)")
"""What a killed process may leave: a hidden file that nobody takes for the real one."""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(build("failing_disk.cpp", tmp_path_factory.mktemp("failing")))


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_whole_or_not_there(case: str, failing: dict[str, str]) -> None:
    if case == "pictures":
        pytest.importorskip("matplotlib")
    for mode, found in trials(failing, case).items():
        assert [each for each in found if each.wrong] == [], mode
        assert all(HIDDEN.fullmatch(name) for each in found for name in each.left), mode
        # Without a kill only vectors that already count are left under their other name, until they are written again.
        assert mode == "killed" or all(each.state == "new" for each in found if each.left), mode
        assert len(found) >= 5, mode
        if case != "prefix cache":  # which tells it, and goes on
            assert {each.end for each in found} >= {"killed" if mode == "killed" else "raised"}, mode


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_what_cannot_be_printed_is_one_line() -> None:
    script = Path(sys.executable).with_name("adaskip-cpp")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        told = subprocess.run(
            [script, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=buffered
        )
    (line,) = told.stderr.splitlines()
    assert told.returncode == 1 and line.startswith("Error: ") and "the space left" in line
