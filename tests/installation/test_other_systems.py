"""What other systems lack or do otherwise, as far as any system can be made to."""

import builtins
import errno
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaskip_cpp import files
from adaskip_cpp.cli import chat
from adaskip_cpp.cli.main import main
from adaskip_cpp.cli.terminal import is_broken_pipe
from adaskip_cpp.engine import cores
from adaskip_cpp.engine.binding import Libraries
from adaskip_cpp.errors import FileError

Refuse = Callable[..., Iterator[int]]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """``refuse(number, times)``: Windows refuses to replace files, with a number of its own; returns what counts it."""
    real, tries = os.replace, itertools.count()

    def refuse_(winerror: int, times: int) -> Iterator[int]:
        def replace(source: str, target: str) -> None:
            if next(tries) >= times:
                return real(source, target)
            error = PermissionError(errno.EACCES, "Access is denied")
            error.winerror = winerror  # elsewhere the constructor takes no code of Windows
            raise error

        monkeypatch.setattr("os.replace", replace)
        return tries

    return refuse_


@pytest.mark.parametrize("winerror", [5, 32])
def test_a_file_that_is_read_just_now_is_replaced_as_soon_as_it_can_be(
    winerror: int, tmp_path: Path, refuse: Refuse
) -> None:
    (tmp_path / "a.json").write_text("old")
    tries = refuse(winerror, 3)
    files.write_atomically(tmp_path / "a.json", "new\n")
    assert (tmp_path / "a.json").read_bytes() == b"new\n" and next(tries) == 4
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(("winerror", "least", "most"), [(32, 2, 99), (1, 1, 1)])
def test_a_file_that_stays_open_elsewhere_or_may_not_be_replaced_is_left_as_it_was(
    winerror: int, least: int, most: int, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_text("old")
    tries = refuse(winerror, sys.maxsize)
    monkeypatch.setattr(files, "_PATIENCE_S", 0.05)
    with pytest.raises(FileError, match=r"cannot write .*a\.json' \(Access is denied\)"):
        files.write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    assert least <= next(tries) <= most


def test_windows_tells_no_load_and_counts_half_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("getloadavg", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert cores.load_average() is None and not cores.busy_warning(None)
    assert cores.physical_cores() == 6


def test_a_function_is_taken_from_the_first_library_that_has_it() -> None:
    both = Libraries(SimpleNamespace(ours=1, shared=2), SimpleNamespace(shared=3, theirs=4))
    assert (both.ours, both.shared, both.theirs) == (1, 2, 4)
    with pytest.raises(AttributeError, match="nobodys"):
        _ = both.nobodys


def test_windows_calls_a_pipe_that_nobody_reads_an_invalid_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, other = OSError(errno.EINVAL, "Invalid argument"), OSError(errno.EINVAL, "Invalid argument", "a.json")
    assert is_broken_pipe(BrokenPipeError())
    monkeypatch.setattr(sys, "platform", "linux")
    assert not is_broken_pipe(broken)
    monkeypatch.setattr(sys, "platform", "win32")
    assert is_broken_pipe(broken) and not is_broken_pipe(other) and not is_broken_pipe(ValueError())


def test_messages_are_typed_without_readline(monkeypatch: pytest.MonkeyPatch) -> None:
    def typed() -> Iterator[str]:
        yield from ("hello ", "", "bye")
        raise EOFError

    lines = typed()
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    assert list(chat._messages()) == ["hello", "bye"]


def test_piped_messages_are_utf8_whatever_the_system_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO("Grüße → Wien\n".encode()), encoding="cp1252")
    monkeypatch.setattr("sys.stdin", piped)
    assert list(chat._messages()) == ["Grüße → Wien"]


SAY_AN_ARROW = """
import json, sys
from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.cli.main import main

AdaSkipLlama.detokenize = lambda *_, **__: "Grüße → \U0001f600".encode()
AdaSkipLlama.is_eog = lambda *_: False  # one in ten of its answers would end at once
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments, prog_name="adaskip-cpp")
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "said"), [("cp1252", "Grüße \\u2192 \\U0001f600"), ("utf-8", "Grüße → \U0001f600")]
)
def test_what_an_encoding_lacks_is_escaped_and_ends_no_verb(encoding: str, said: str, served_model: Path) -> None:
    model = str(served_model)
    commands = [
        *([verb, "--help"] for verb in main.commands),
        ["inspect", model],
        ["generate", model, "-p", "hello", "--raw", "--max-tokens", "2"],
        ["chat", model, "--max-tokens", "2", "--ctx", "256"],
    ]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", SAY_AN_ARROW, json.dumps(commands)]
    done = subprocess.run(command, env=environment, input="Grüße →\n".encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(encoding, "replace")[-3000:]
    assert done.stdout.count(said.encode(encoding)) >= 4, "of generate and chat"
