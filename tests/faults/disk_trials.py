"""Run as a program: writes files again and again, while one call after the other finds the disk full or is the last.

Each trial runs in a fork of its own, on a folder of its own; the parent looks at what it left. It prints of each:

- ``mode``, one of ``MODES``, and ``n``: the n-th call fails;
- ``end``: "worked", "raised" or "killed";
- ``is_new``: whether all that was to be written is there;
- ``left``: files that neither an old nor a new folder has;
- ``wrong``: what was not as it should be.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faults.forks import ForkEndedError, in_a_fork
from oracles.profiles import profile
from oracles.skip_sets import same, skip_set

from adaskip_cpp import Profile, SkipPlan, load_plan, save_plan
from adaskip_cpp.cli.terminal import users_error
from adaskip_cpp.evaluation import report
from adaskip_cpp.evaluation.results import About, Results
from adaskip_cpp.evaluation.store import Record, open_store
from adaskip_cpp.pictures import plots
from adaskip_cpp.serving.prefix_cache import PrefixCache, Tokens

__all__ = ["CASES", "MODES"]

MODES = ("once", "full", "killed")
"""The call that fails is the only one; every one after it that needs space fails too; the process is killed in it."""


@dataclass(frozen=True)
class Case:
    """What is written: ``write(folder, 0)``, and then ``write(folder, 1)`` while the disk fails.

    ``read`` lists what is there, in the order in which it is written: the first of the new may stand before the rest of
    the old. ``name`` is a word of each error. Unless ``raises``, an error is logged and nothing is raised.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], list[Any]]
    name: str = ""
    raises: bool = True


def main(case: Case) -> None:
    failing = ctypes.CDLL(None)
    failing.failing_arm.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64]
    failing.failing_disarm.restype = ctypes.c_int64
    for mode in MODES:
        with tempfile.TemporaryDirectory() as place:
            _try(failing, case, mode, Path(place))


def _try(failing: Any, case: Case, mode: str, place: Path) -> None:
    pristine = _folder(place, 0)
    case.write(pristine, 0)
    old, files = case.read(pristine), _files(pristine)
    case.write(pristine, 1)
    new, files = case.read(pristine), files | _files(pristine)
    assert old != new
    for n in itertools.count(1):
        folder = _folder(place, n)
        case.write(folder, 0)
        try:
            n_seen, error = in_a_fork(lambda: _write(failing, case, folder, mode, n))  # noqa: B023
            end = "raised" if error else "worked"
        except ForkEndedError as ended:
            assert ended.code == -signal.SIGKILL
            n_seen, error, end = n, "", "killed"
        state = case.read(folder)
        if n_seen < n:
            assert not error and state == new
            return
        wrong = []
        if state not in [new[:k] + old[k:] for k in range(len(new) + 1)]:
            wrong.append(f"what is there is neither old nor new: {state!r}")
        if error and not (case.name in error and re.search("space left|choose another", error)):
            wrong.append(f"the error does not say what and what to do: {error}")
        if end == "worked" and case.raises and state != new:
            wrong.append("nothing was raised, and it is not there")
        left = sorted(_files(folder) - files)
        case.write(folder, 1)
        if case.read(folder) != new:
            wrong.append("it cannot be written again")
        trial = {"mode": mode, "n": n, "end": end, "is_new": state == new, "left": left, "wrong": wrong}
        print(json.dumps(trial), flush=True)


def _folder(place: Path, n: int) -> Path:
    folder = place / str(n)
    folder.mkdir()
    return folder


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _write(failing: Any, case: Case, folder: Path, mode: str, n: int) -> tuple[int, str]:
    """Write while the n-th call fails; return the number of calls, and the error."""
    error = ""
    failing.failing_arm(os.fsencode(folder), 1 + MODES.index(mode), n)
    try:
        case.write(folder, 1)
    except Exception as caught:
        error = users_error(caught) or repr(caught)
    return failing.failing_disarm(), error


def _file(write: Callable[[Path, int], object], read: Callable[[Path], Any]) -> Case:
    """One file, with or without another one beside it for its arrays."""
    return Case(lambda folder, i: write(folder / "p.json", i), lambda folder: [read(folder / "p.json")], "p.")


def _files_in_turn(write: Callable[[Path, int], object], names: list[str], name: str) -> Case:
    """Files that are written one after the other."""
    return Case(write, lambda folder: [(folder / each).read_bytes() for each in names], name)


def _store(other: int) -> Case:
    """Results that are added to those of the same settings, or of other ones, in a file of their own."""
    settings = {"model": "abc"}, {"model": "def"}

    def write(folder: Path, i: int) -> None:
        with open_store(folder, settings[i * other]) as store:
            for key in ("a", "b") if i == 0 else ("c", "d", "e"):
                if (key, "full", "prompt") not in store.records:
                    store.append(Record(key, "full", "prompt", {"loss": 1 / ord(key)}))

    def read(folder: Path) -> list[Any]:
        found = []
        for each in settings:
            # Looking at settings begins a file of their results, so it is done in a copy.
            with tempfile.TemporaryDirectory() as copy:
                shutil.copytree(folder, copy, dirs_exist_ok=True)
                with open_store(copy, each) as store:
                    found += [(item, record.values["loss"]) for (item, *_), record in store.records.items()]
        return found

    return Case(write, read, "/")


def _prefix_cache() -> Case:
    tokens: tuple[Tokens, Tokens] = np.arange(5, dtype=np.int32), np.arange(50, 70, dtype=np.int32)

    def write(folder: Path, i: int) -> None:
        cache = PrefixCache(1 << 20, folder / "cache")
        cache.put("key", tokens[i], bytearray(range(100 + i)))
        cache.close()

    def read(folder: Path) -> list[Any]:
        cache = PrefixCache(1 << 20, folder / "cache")
        found = [cache.find({"key"}, each) for each in tokens]
        result = [None if entry is None else (n, bytes(cache.take(entry) or b"")) for entry, n in found]
        cache.close()
        return result

    return Case(write, read, raises=False)


def _pictures() -> Case:
    from matplotlib.figure import Figure

    figures = Figure(figsize=(0.5, 0.5)), Figure(figsize=(0.5, 0.5))
    figures[1].add_axes((0, 0, 1, 1)).plot([0, 1], [0, 1])
    names = ["pictures/p.png", "pictures/p.svg"]
    return _files_in_turn(lambda folder, i: plots.save(figures[i], folder / "pictures", "p"), names, "p.")


def _report() -> Case:
    """The files of an evaluation, without pictures."""
    plots.has_matplotlib = lambda: False

    def write(folder: Path, i: int) -> None:
        report.write_results(Results(i, 2, About(f"title {i}", "summary", {}, "command", {}, ()), ()), folder)

    return _files_in_turn(write, ["results.json", "report.html"], "re")


CASES: dict[str, Callable[[], Case]] = {
    "plan": lambda: _file(lambda path, i: save_plan(path, SkipPlan.manual(3, ffn=[i])), load_plan),
    "plan with maps": lambda: _file(lambda path, i: save_plan(path, same(skip_set((i,), (2,), seed=i))), load_plan),
    "profile": lambda: _file(lambda path, i: profile(np.full((3, 2), 0.5 + i / 4)).save(path), Profile.load),
    "evaluation": lambda: _store(other=0),
    "other settings": lambda: _store(other=1),
    "prefix cache": _prefix_cache,
    "pictures": _pictures,
    "report": _report,
}
"""What is written."""


if __name__ == "__main__":
    main(CASES[sys.argv[1]]())
