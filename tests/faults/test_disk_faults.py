"""Wherever the disk is full, or the process is killed, while a file is written: the old one is whole, or the new one.

What is read afterwards is compared with what was written into folders where nothing failed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from faults.disk_trials import CASES, MODES
from faults.preloaded import build, trials

HIDDEN = re.compile(r"(.*/)?\..+\.(tmp|new)")
"""What a killed process may leave: a hidden file that nobody takes for the real one."""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("failing_disk.cpp", tmp_path_factory.mktemp("failing"))


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_whole_or_not_there(case: str, failing: Path) -> None:
    if case == "pictures":
        pytest.importorskip("matplotlib")
    found = trials(failing, "disk_trials.py", case)
    for trial in found:
        assert trial["wrong"] == [], trial
        assert all(HIDDEN.fullmatch(name) for name in trial["left"]), trial
        # Without a kill only vectors that already count are left under their other name, until they are written again.
        assert trial["mode"] == "killed" or trial["is_new"] or not trial["left"], trial
    for mode in MODES:
        ends = [trial["end"] for trial in found if trial["mode"] == mode]
        assert len(ends) >= 5, mode
        if case != "prefix cache":  # which tells it, and goes on
            assert ("killed" if mode == "killed" else "raised") in ends, mode


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
