"""What other systems lack or do otherwise, as far as any system can be made to."""

import builtins
import errno
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from adaskip_cpp import Profile, SkipPlan, files
from adaskip_cpp.cli import chat
from adaskip_cpp.cli.terminal import is_broken_pipe
from adaskip_cpp.engine.binding import Libraries
from adaskip_cpp.errors import DataError, FileError
from adaskip_cpp.evaluation import store
from adaskip_cpp.measuring import cores
from adaskip_cpp.model.plan_file import save_plan

# --- files ------------------------------------------------------------------------------------------------------------


def in_use(winerror: int) -> PermissionError:
    """What Windows says of a file that is open; elsewhere the constructor takes no code of Windows."""
    error = PermissionError(errno.EACCES, "Access is denied")
    error.winerror = winerror
    return error


Refuse = Callable[..., Iterator[int]]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """``refuse(error, times)``: the next replacements of files fail; returns what counts them."""
    real, tries = os.replace, itertools.count()

    def refuse_(error: PermissionError, times: int = sys.maxsize) -> Iterator[int]:
        def replace(source: str, target: str) -> None:
            if next(tries) < times:
                raise error
            real(source, target)

        monkeypatch.setattr("os.replace", replace)
        return tries

    return refuse_


@pytest.mark.parametrize("winerror", [5, 32])
def test_a_file_that_is_read_just_now_is_replaced_as_soon_as_it_can_be(
    winerror: int, tmp_path: Path, refuse: Refuse
) -> None:
    (tmp_path / "a.json").write_text("old")
    tries = refuse(in_use(winerror), 3)
    files.write_atomically(tmp_path / "a.json", "new\n")
    assert (tmp_path / "a.json").read_bytes() == b"new\n" and next(tries) == 4
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_that_stays_open_elsewhere_is_left_as_it_was(
    tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_text("old")
    refuse(in_use(32))
    monkeypatch.setattr(files, "_PATIENCE_S", 0.05)
    with pytest.raises(FileError, match=r"cannot write .*a\.json' \(Access is denied\)"):
        files.write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_what_one_may_not_replace_is_told_at_once(tmp_path: Path, refuse: Refuse) -> None:
    tries = refuse(PermissionError(errno.EPERM, "Operation not permitted"))
    with pytest.raises(FileError, match="not permitted"):
        files.write_atomically(tmp_path / "a.json", "new")
    assert next(tries) == 1


@pytest.fixture
def store_on_windows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module imported once more, where files are locked by ``msvcrt``."""
    locked: set[tuple[int, int]] = set()

    def locking(file: int, mode: int, n_bytes: int) -> None:
        assert (mode, n_bytes) == (2, 1)
        facts = os.fstat(file)
        if (facts.st_dev, facts.st_ino) in locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        locked.add((facts.st_dev, facts.st_ino))

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(sys, "platform", "win32")
    name = "adaskip_cpp.evaluation.store_on_windows"
    spec = importlib.util.spec_from_file_location(name, store.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_windows_keeps_other_runs_out_of_a_folder_too(store_on_windows: ModuleType, tmp_path: Path) -> None:
    with (
        store_on_windows.open_store(tmp_path, {"n": 1}),
        pytest.raises(DataError, match="another evaluation is writing"),
        store_on_windows.open_store(tmp_path, {"n": 1}),
    ):
        pass


# --- the machine and its libraries ------------------------------------------------------------------------------------


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


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_windows_calls_a_pipe_that_nobody_reads_an_invalid_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, other = OSError(errno.EINVAL, "Invalid argument"), OSError(errno.EINVAL, "Invalid argument", "a.json")
    assert is_broken_pipe(BrokenPipeError())
    monkeypatch.setattr(sys, "platform", "linux")
    assert not is_broken_pipe(broken)
    monkeypatch.setattr(sys, "platform", "win32")
    assert is_broken_pipe(broken) and not is_broken_pipe(other) and not is_broken_pipe(ValueError())


def test_messages_are_typed_without_readline(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["hello ", "", "bye"])

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(builtins, "input", read)
    assert list(chat._messages()) == ["hello", "bye"]


def test_piped_messages_are_utf8_whatever_the_system_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO("Grüße → Wien\n".encode()), encoding="cp1252")
    monkeypatch.setattr("sys.stdin", piped)
    assert list(chat._messages()) == ["Grüße → Wien"]


ALL_SAY_AN_ARROW = """
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
VERBS = ["bench", "calibrate", "chat", "demo", "evaluate", "generate", "inspect", "plan", "plot", "serve", "tune"]


@pytest.fixture
def told(served_model: Path, tmp_path: Path) -> Callable[..., bytes]:
    """``told(encoding, first=0)``: what verbs print into a pipe of it, of a model that says what cp1252 lacks."""
    profile, plan, text = tmp_path / "p.json", tmp_path / "plan.json", tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 40, encoding="utf-8")
    save_plan(plan, SkipPlan.manual(3, ffn=[1]))
    model = str(served_model)
    quick = ["--data", str(text), "--requests", "4", "--tokens", "20", "--no-cost"]
    commands = [
        *([verb, "--help"] for verb in VERBS),
        ["inspect", model],
        ["calibrate", model, "-o", str(profile), *quick],
        ["plan", str(profile), "--skip", "2"],
        ["plot", str(profile), "-o", str(tmp_path / "pictures")],
        ["generate", model, "-p", "hello", "--raw", "--max-tokens", "2", "--plan", str(plan)],
        ["chat", model, "--max-tokens", "2", "--ctx", "256"],
    ]

    def run(encoding: str, first: int = 0) -> bytes:
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        command: list[Any] = [sys.executable, "-c", ALL_SAY_AN_ARROW, json.dumps(commands[first:])]
        done = subprocess.run(command, env=environment, input="Grüße →\n".encode(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode(encoding, "replace")[-3000:]
        assert Profile.load(profile).n_layer == 3
        return done.stdout

    return run


@pytest.mark.slow
def test_what_an_encoding_lacks_is_escaped_and_ends_no_verb(told: Callable[..., bytes]) -> None:
    said, all_said = told("cp1252"), told("utf-8", first=-2).decode()
    assert said.count("Grüße \\u2192 \\U0001f600".encode("cp1252")) >= 4  # generate and chat
    assert "Grüße → \U0001f600" in all_said
