"""Run as a program: writes files again and again, while one call after the other finds the disk full or is the last.

Each trial runs in a fork of its own, on a folder of its own; the parent looks at what it left. :func:`trials` starts
all this in a process that has failing_disk.cpp in front of its libraries.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CASES", "MODES", "Outcome", "trials"]

MODES = ("once", "full", "killed")
"""The call that fails is the only one; every one after it that needs space fails too; the process is killed in it."""

CASES = (
    "plan", "plan with maps", "profile", "evaluation", "other settings", "prefix cache", "pictures",
    "report", "plan verb",
)  # fmt: skip
"""What is written."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: ``end`` is "worked", "raised" or "killed"; ``state`` "old", "new" or "between".

    ``left`` are files that neither an old nor a new folder has; ``left_behind`` those of them that are still there once
    the same thing was written again. ``wrong`` is what was not as it should be.
    """

    n: int
    end: str
    state: str
    error: str
    left: tuple[str, ...]
    left_behind: tuple[str, ...]
    wrong: tuple[str, ...]


def trials(library_environment: dict[str, str], case: str) -> dict[str, list[Outcome]]:
    """All trials of a case, by their mode: the n-th call fails, for every n."""
    command = [sys.executable, __file__, case]
    process = subprocess.run(command, env=library_environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise RuntimeError(process.stderr[-3000:])
    found: dict[str, list[Outcome]] = {mode: [] for mode in MODES}
    for line in process.stdout.splitlines():
        mode, *values = json.loads(line)
        found[mode].append(Outcome(*(tuple(value) if isinstance(value, list) else value for value in values)))
    return found


@dataclass(frozen=True)
class _Case:
    """What was written before, what is written, and how to read what is there; ``names`` a word of each error."""

    old: Callable[[Path], object]
    new: Callable[[Path], object]
    read: Callable[[Path], Any]
    names: str
    between: tuple[Any, ...] = ()
    swallows: bool = False  # whether an error is told and nothing is raised


def main(case_name: str) -> None:
    failing = ctypes.CDLL(None)
    failing.failing_arm.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64]
    failing.failing_disarm.restype = ctypes.c_int64
    case = _case(case_name)
    for mode in MODES:
        _try(failing, case, mode)


def _try(failing: Any, case: _Case, mode: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        pristine = Path(place, "pristine")
        pristine.mkdir()
        case.old(pristine)
        expected_files, old = {*_files(pristine)}, case.read(pristine)
        case.new(pristine)
        expected_files, new = expected_files | {*_files(pristine)}, case.read(pristine)
        assert old != new
        for n in itertools.count(1):
            folder = Path(place, str(n))
            folder.mkdir()
            case.old(folder)
            ended = _in_a_fork(lambda: _write(failing, case, folder, 1 + MODES.index(mode), n))  # noqa: B023
            if ended is not None and ended["seen"] < n:
                assert not ended["error"] and case.read(folder) == new
                return
            wrong = []
            state = case.read(folder)
            where = "old" if state == old else "new" if state == new else "between"
            if where == "between" and state not in case.between:
                wrong.append(f"what is there is neither old nor new: {state!r}")
            error = "" if ended is None else ended["error"]
            if error and not (case.names in error and re.search("space left|choose another", error)):
                wrong.append(f"the error does not say what and what to do: {error}")
            if ended is not None and not error and not case.swallows and where != "new":
                wrong.append("nothing was raised, and it is not there")
            left = sorted({*_files(folder)} - expected_files)
            case.new(folder)
            if case.read(folder) != new:
                wrong.append("it cannot be written again")
            left_behind = sorted({*_files(folder)} - expected_files)
            end = "killed" if ended is None else "raised" if error else "worked"
            print(json.dumps([mode, n, end, where, error, left, left_behind, wrong]), flush=True)


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def _write(failing: Any, case: _Case, folder: Path, mode: int, n: int) -> dict[str, Any]:
    from adaskip_cpp.cli.terminal import users_error

    error = ""
    failing.failing_arm(os.fsencode(folder), mode, n)
    try:
        case.new(folder)
    except Exception as caught:
        error = users_error(caught) or repr(caught)
    return {"seen": failing.failing_disarm(), "error": error}


def _in_a_fork(what: Callable[[], Any]) -> Any:
    """What it returns; None if it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            content = pickle.dumps(what())
            os.write(writer, content)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        content = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    assert os.waitstatus_to_exitcode(status) == 0
    return pickle.loads(content)


def _case(name: str) -> _Case:
    import numpy as np
    from oracles.tiny_families import N_EMBD

    from adaskip_cpp import Profile, SkipPlan, load_plan, save_plan
    from adaskip_cpp.model.identity import ModelInfo
    from adaskip_cpp.model.skip_set import SkipSet
    from adaskip_cpp.model.statistics import PhaseStatistics

    def plan_with_maps(seed: int) -> SkipPlan:
        rng = np.random.default_rng(seed)
        skip = rng.random((3, 2)) < 0.7
        bias = rng.normal(size=(3, 2, N_EMBD)).astype(np.float32)
        down = rng.normal(size=(3, 2, 2, N_EMBD)).astype(np.float32)
        chosen = SkipSet(skip, np.ones((3, 2)), bias, down, down.swapaxes(2, 3).copy())
        return SkipPlan(chosen, chosen)

    def profile(value: float) -> Profile:
        ones, vectors = np.ones((3, 2)), np.full((3, 2, N_EMBD), value, np.float32)
        statistics = PhaseStatistics(np.full((3, 2), value), ones, ones, np.ones(3), vectors, vectors, 10)
        lost, known = np.full((3, 2), value), ModelInfo("0" * 64, "llama", 3)
        return Profile(statistics, statistics, 1, 10, known, divergence=lost, copying=lost)

    match name:
        case "plan":
            plans = SkipPlan.manual(3, ffn=[1]), SkipPlan.manual(3, attention=[1])
            return _files_case("p.json", lambda path, i: save_plan(path, plans[i]), load_plan)
        case "plan with maps":
            plans = plan_with_maps(0), plan_with_maps(1)
            return _files_case("p.json", lambda path, i: save_plan(path, plans[i]), load_plan, names="p.")
        case "profile":
            profiles = profile(0.5), profile(0.75)
            return _files_case("p.json", lambda path, i: profiles[i].save(path), Profile.load, names="p.")
        case "evaluation" | "other settings":
            return _store_case(name)
        case "prefix cache":
            return _cache_case()
        case "pictures":
            return _pictures_case()
        case "report":
            return _report_case()
        case _:
            return _verb_case(profile(0.5))


def _files_case(
    file: str, write: Callable[[Path, int], object], read: Callable[[Path], Any], *, names: str = ""
) -> _Case:
    """One thing that is written over another; its error names the file."""
    return _Case(
        lambda folder: write(folder / file, 0),
        lambda folder: write(folder / file, 1),
        lambda folder: read(folder / file),
        names or file,
    )


def _store_case(name: str) -> _Case:
    from adaskip_cpp.evaluation.store import Record, open_store

    settings = {"model": "abc"}, {"model": "def"}
    which = 1 if name == "other settings" else 0

    def fill(folder: Path, which: int, first: int, n: int) -> None:
        with open_store(folder, settings[which]) as store:
            for i in range(first, first + n):
                key = f"item {which}.{i}"
                if (key, "full", "prompt") not in store.records:
                    store.append(Record(key, "full", "prompt", {"loss": i / 3}))

    def read(folder: Path) -> Any:
        # Looking at settings begins a file of their results, so it is done in a copy.
        import shutil

        found = []
        for each in settings:
            with tempfile.TemporaryDirectory() as place:
                shutil.copytree(folder, place, dirs_exist_ok=True)
                with open_store(place, each) as store:
                    found.append(tuple((item, record.values["loss"]) for (item, *_), record in store.records.items()))
        return tuple(found)

    def states(n: int) -> Any:
        """With so many of the new results."""
        counts = (2, n) if which else (2 + n, 0)
        return tuple(tuple((f"item {each}.{i}", i / 3) for i in range(counts[each])) for each in (0, 1))

    between = tuple(states(n) for n in range(4))
    return _Case(
        lambda folder: fill(folder, 0, 0, 2),
        lambda folder: fill(folder, which, 0 if which else 2, 3),
        read,
        "/",
        between,
    )


def _cache_case() -> _Case:
    import numpy as np

    from adaskip_cpp.serving.prefix_cache import PrefixCache, Tokens

    tokens: tuple[Tokens, Tokens] = np.arange(5, dtype=np.int32), np.arange(50, 70, dtype=np.int32)

    def put(folder: Path, i: int) -> None:
        cache = PrefixCache(1 << 20, folder / "cache")
        cache.put("key", tokens[i], bytearray(range(100 + i)))
        cache.close()

    def read(folder: Path) -> Any:
        cache = PrefixCache(1 << 20, folder / "cache")
        found = [cache.find({"key"}, each) for each in tokens]
        result = [None if entry is None else (n, bytes(cache.take(entry) or b"")) for entry, n in found]
        cache.close()
        return result

    return _Case(lambda folder: put(folder, 0), lambda folder: put(folder, 1), read, "", swallows=True)


def _pictures_case() -> _Case:
    from matplotlib.figure import Figure

    from adaskip_cpp.pictures import plots

    figures = []
    for i in range(2):
        figure = Figure(figsize=(0.5, 0.5))
        figure.add_axes((0, 0, 1, 1)).plot([0, 1], [i, 1 - i])
        figures.append(figure)
    names = [f"pictures/{name}" for name in ("p.png", "p.svg")]
    return _several_files(lambda folder, i: plots.save(figures[i], folder / "pictures", "p"), names, "p.")


def _report_case() -> _Case:
    """The files of an evaluation, without pictures."""
    from adaskip_cpp.evaluation import report
    from adaskip_cpp.evaluation.results import About, Results
    from adaskip_cpp.pictures import plots

    plots.has_matplotlib = lambda: False

    def write(folder: Path, i: int) -> None:
        report.write_results(Results(i, 2, About(f"title {i}", "summary", {}, "command", {}, ()), ()), folder)

    return _several_files(write, ["results.json", "report.html"], "re")


def _several_files(write: Callable[[Path, int], object], files: list[str], names: str) -> _Case:
    """Files that are written one after the other: each is a whole one, the old or the new."""

    def read(folder: Path) -> Any:
        return [(folder / name).read_bytes() for name in files]

    states = []
    with tempfile.TemporaryDirectory() as place:
        for i in range(2):
            write(Path(place), i)
            states.append(read(Path(place)))
    between = tuple([*states[1][:n], *states[0][n:]] for n in range(1, len(files)))
    return _Case(lambda folder: write(folder, 0), lambda folder: write(folder, 1), read, names, between)


def _verb_case(profile: Any) -> _Case:
    """``adaskip-cpp plan``, as it is called."""
    from adaskip_cpp import load_plan
    from adaskip_cpp.cli.main import main as verbs

    place = tempfile.mkdtemp()
    path = Path(place, "p.json")
    profile.save(path)

    def write(file: Path, i: int) -> None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        try:
            verbs(["plan", str(path), "--skip", str(1 + i), "-o", str(file)], standalone_mode=False)
        finally:
            sys.stdout = sys.__stdout__

    return _files_case("q.json", write, load_plan, names="q.")


if __name__ == "__main__":
    main(sys.argv[1])
