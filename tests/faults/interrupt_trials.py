"""Ctrl-C at random moments of the verbs that take long, each in a process of its own as a user starts it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
from oracles.tiny_models import write_model

import adaskip_cpp
from adaskip_cpp import Profile, load_plan, save_plan
from adaskip_cpp.evaluation.store import open_store

__all__ = ["VERBS", "interrupt", "prepare"]

VERBS = {"generate": 0.4, "calibrate": 0.2, "tune": 0.2, "serve": 0.12, "bench": 0.04, "evaluate": 0.04}
"""Their shares of the trials: those that take longer get fewer."""

BOUND_S = 60.0
"""A process that has not ended by then does not end: whatever is between two looks at signals takes a tenth of it."""

AGAIN_EVERY = 25
"""After so many trials of a verb the same command runs to its end."""

_WORDS = ["the", "of", "to", "an", "in", "error", "there", "other", "one", "ten"]
_MARK = "ADASKIP_TRIAL"


def prepare(folder: Path) -> None:
    """Write a tiny model, its profile, a plan, and three texts."""
    write_model(folder / "m.gguf")
    for i, name in enumerate(("0.txt", "1.txt", "data.txt")):
        (folder / name).write_text(" ".join(random.Random(i).choices(_WORDS, k=9000)))
    llm = adaskip_cpp.AdaSkipLlama(str(folder / "m.gguf"), n_ctx=64, verbose=False)
    requests = [[1, *range(3 + i, 30 + i)] for i in range(4)]
    profile = adaskip_cpp.calibrate(llm, requests, n_decode=4, cost=False)
    profile.save(folder / "m.adaskip.json")
    save_plan(folder / "plan.json", profile.plan(2))
    llm.close()


def interrupt(verb: str, folder: Path, n: int) -> list[str]:
    """Interrupt a verb ``n`` times, in a folder that :func:`prepare` filled; return what was not as it should be."""
    (folder / "out").mkdir(exist_ok=True)
    start = time.monotonic()
    wrong = _run_to_the_end(verb, folder)
    duration_s = time.monotonic() - start
    for i in range(n):
        if random.random() < 0.5:
            shutil.rmtree(folder / "out")
            (folder / "out").mkdir()
        delay_s = random.uniform(0, 1.02 * duration_s)
        before = _content(folder)
        found = [*_trial(verb, folder, delay_s), *_check_files(folder, before)]
        wrong += [f"trial {i}, signal after {delay_s:.3f} s: {each}" for each in found]
        if (i + 1) % AGAIN_EVERY == 0 or i == n - 1:
            wrong += _run_to_the_end(verb, folder)
    return wrong


def _command(verb: str) -> list[str]:
    """Quick enough to be run a thousand times, and long enough in every part to be hit there."""
    script = str(Path(sys.executable).with_name("adaskip-cpp"))
    words = {
        "generate": ["-p", "the to of", "--raw", "--max-tokens", "200", "--ctx", "512", "--plan", "plan.json"],
        "calibrate": ["-o", "out/p.json", "--data", "0.txt", "--no-cost", "--requests", "4", "--tokens", "64"],
        "tune": [
            *("-o", "out/plan.json", "--data", "data.txt", "--text", "0.txt", "--text", "1.txt"),
            *("--context", "64", "--answer", "4", "--no-flash-attn"),
        ],
        "bench": ["--contexts", "16", "--repeats", "1", "--decode-tokens", "2", "--plan", "plan.json"],
        "evaluate": [
            *("-o", "out/folder", "--text", "0.txt", "--profile", "m.adaskip.json"),
            *("--skip", "2", "--mode", "e2e", "--strategy", "adaskip"),
            *("--texts", "2", "--tokens", "24", "--continuation", "6", "--rounds", "2", "--speed-context", "16"),
        ],
        "serve": ["--port", "0", "--ctx", "512", "--cache-dir", "out/cache"],
    }[verb]
    return [script, verb, "m.gguf", *words, "--threads", "1"]


def _run(verb: str, folder: Path, mark: str, delay_s: float | None) -> tuple[int | None, str]:
    """Run a verb, and interrupt it after a while; without one, only a server, once it has answered.

    Returns:
        The exit code, None if it did not end; and what it wrote to stderr.
    """

    # A terminal's Ctrl-C finds SIGINT as it is by default; a shell's background jobs ignore it.
    def as_in_a_terminal() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    log = folder.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            _command(verb),
            cwd=folder,
            env={**os.environ, _MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=as_in_a_terminal,
        )
    if verb == "serve":
        threading.Thread(target=_ask, args=(process, log, delay_s is None), daemon=True).start()
    try:
        try:
            process.wait(4 * BOUND_S if delay_s is None else delay_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        code = process.wait(BOUND_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = None
    return code, log.read_text()


def _ask(process: subprocess.Popen[bytes], log: Path, ends: bool) -> None:
    """Ask a server something as soon as it says where it listens, and end it then."""
    while process.poll() is None:
        if found := re.search(r"A page to try it: (http\S+)\. ", " ".join(log.read_text().split())):
            body = json.dumps({"prompt": "the to of " * 20, "max_tokens": 50}).encode()
            request = urllib.request.Request(f"{found[1]}/v1/completions", body, {"content-type": "application/json"})
            with contextlib.suppress(OSError):  # it is told to end meanwhile
                urllib.request.urlopen(request, timeout=BOUND_S).read()
            break
        time.sleep(0.05)
    if ends:
        process.send_signal(signal.SIGINT)


def _run_to_the_end(verb: str, folder: Path) -> list[str]:
    code, stderr = _run(verb, folder, "whole", None)
    return [] if code == 0 and not _has_traceback(stderr) else [f"a whole run: code {code}, stderr {stderr[-1500:]!r}"]


def _trial(verb: str, folder: Path, delay_s: float) -> list[str]:
    mark = f"{os.getpid()}-{random.random()}"
    code, stderr = _run(verb, folder, mark, delay_s)
    wrong = [] if _is_an_end(verb, code, stderr) else [f"code {code}, stderr {stderr[-1500:]!r}"]
    return [*wrong, "a process that it started still runs"] if _left_running(mark) else wrong


def _is_an_end(verb: str, code: int | None, stderr: str) -> bool:
    if not _has_traceback(stderr):
        is_told = stderr.endswith("Error: interrupted\n") or (verb == "evaluate" and "All results are kept" in stderr)
        if code == 0 or (code == 130 and is_told):
            return True
    # Until the package can import the signals, Python itself is starting, and tells that in its way.
    ours = re.findall(r'File "[^"]*/adaskip_cpp/[^"]*", line \d+, in .*\n +(.*)', stderr)
    is_python = set(ours) <= {"import signal as _signal"} and "Error: " not in stderr
    return code in (-signal.SIGINT, 1, 130) and is_python


def _has_traceback(stderr: str) -> bool:
    return "Traceback" in stderr or "Exception ignored" in stderr


def _left_running(mark: str) -> list[psutil.Process]:
    """Processes that a trial started and that do not end by themselves soon: a worker sees its pipe closed."""

    def is_marked(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):  # it has ended, or is not ours
            return process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
        return False

    _, alive = psutil.wait_procs(filter(is_marked, psutil.process_iter()), timeout=5)
    return [process for process in alive if is_marked(process)]


def _content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check_files(folder: Path, before: dict[str, str]) -> list[str]:
    """What was there is as it was, or whole; what is new is whole."""
    wrong = []
    after = _content(folder)
    changed = [path for path in before if not path.startswith("out/") and after.get(path) != before[path]]
    # What a stopped run of `tune` keeps goes when a later one has written its plan.
    may_go = ("out/cache/", "out/plan-unfinished") if "out/plan.json" in after else ("out/cache/",)
    lost = [path for path in before if path not in after and not path.startswith(may_go)]
    hidden = [path for path in after if path.endswith((".tmp", ".new"))]
    for words, paths in (("changed", changed), ("lost", lost), ("left over", hidden)):
        if paths:
            wrong.append(f"{words}: {paths}")
    out = folder / "out"
    readers: dict[str, Callable[[Path], object]] = {
        "p.json": Profile.load,
        "plan.json": load_plan,
        "folder/results.json": lambda path: json.loads(path.read_text()),
        "folder": _reopen,
    }
    for file, read in readers.items():
        if (out / file).exists():
            try:
                read(out / file)
            except Exception as error:
                wrong.append(f"{file} cannot be read: {error!r}")
    return wrong


def _reopen(folder: Path) -> None:
    for path in folder.glob("items-*.jsonl"):
        settings, end, _ = path.read_text().partition("\n")
        if end:
            with open_store(folder, json.loads(settings)["settings"]) as store:
                assert store.path == path, "its settings are not those of its results"
