"""Progress on a terminal, and where there is none."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaskip_cpp.progress import progress_bar

ERASED = "\x1b[2K"
"""What takes the last line of a terminal away."""

_RUN = "import adaskip_cpp.progress as p; p._SHOW_AFTER_S = {}; from adaskip_cpp.cli.main import main; main()"


def test_without_a_terminal_there_is_a_line_a_minute_with_an_estimate_or_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("adaskip_cpp.progress.time.monotonic", lambda: now)
    with progress_bar("Searching", lines=True) as on_progress, progress_bar("Reading") as on_no_progress:
        for now, fraction in ((130.0, 0.1), (160.0, 0.2), (190.0, 0.3), (221.0, 0.4)):  # noqa: B007  # read above
            on_progress(fraction)
            on_no_progress(fraction)
    assert capsys.readouterr().err.splitlines() == [
        "Searching: 20% done, about 4 min left",
        "Searching: 40% done, about 3 min left",
    ]


def shown(*words: object, after: float, typed: str = "") -> str:
    """What a terminal gets of a verb whose bars show after so many seconds."""
    pty = pytest.importorskip("pty", reason="Windows has no pseudo terminals")
    here, there = pty.openpty()
    command = [sys.executable, "-c", _RUN.format(after), *map(str, words)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=there, stderr=there, env=environment, text=True
    ) as process:
        os.close(there)
        assert process.stdin is not None
        process.stdin.write(typed)
        process.stdin.close()
        told = b""
        with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
            while part := os.read(here, 4096):
                told += part
    os.close(here)
    assert process.returncode == 0, told
    return told.decode()


def test_a_prompt_or_message_that_takes_long_has_a_bar_which_is_gone_before_the_first_token(served_model: Path) -> None:
    model = served_model, "--ctx", 1024, "--max-tokens", 4, "--temp", 0
    long = "the of to an in error there other one " * 12
    bar, _, answer = shown("generate", *model, "-p", long, after=0).rpartition(ERASED)
    assert "Reading the prompt" in bar and "100%" in bar
    assert "Reading" not in answer and "first token after" in answer
    assert "Reading" not in shown("generate", *model, "-p", long, after=1e6), "what takes no time has no bar"
    bar, _, answer = shown("chat", *model, after=0, typed=f"{long}\n").rpartition(ERASED)
    assert "Reading the prompt" in bar and "Reading" not in answer and "context" in answer


def test_a_bar_shows_in_time_though_its_work_has_not_moved_and_after_one_move_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("adaskip_cpp.progress._SHOW_AFTER_S", 0.05)
    with progress_bar("Reading") as on_progress:
        on_progress(0.0)
        time.sleep(0.5)
        assert "-:--:--" in capsys.readouterr().err
        on_progress(0.25)
    assert re.search(r" 25% .* 0:00:0[2-9]", re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().err))
