"""Ctrl-C at random moments of the verbs that take long, each in a process of its own as a user starts it.

    PYTHONPATH=tests python tests/faults/interrupt_trials.py --trials 1000

prints a line per verb, and whatever was not as it should be, with the seed that draws the same moments again. The tests
run a short sample; `pytest tests/faults/test_interrupts.py --sigint-trials=1000` runs as many as that.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["VERBS", "Found", "interrupt", "prepare"]

VERBS = {"generate": 0.4, "calibrate": 0.2, "tune": 0.2, "serve": 0.12, "bench": 0.04, "evaluate": 0.04}
"""Their shares of the trials: those that take longer get fewer."""

BOUND_S = 60.0
"""A process that has not ended by then does not end: whatever is between two looks at signals takes a tenth of it."""

AGAIN_EVERY = 25
"""Behind so many trials of a verb the same command runs to its end."""

_WORDS = ["the", "of", "to", "an", "in", "error", "there", "other", "one", "ten"]
_MARK = "ADASKIP_TRIAL"


@dataclass
class Found:
    """What became of the trials of a verb: how they ended, seconds from the signal to the end, and what was wrong."""

    verb: str
    duration_s: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    n_again: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ends = ", ".join(f"{n} {end}" for end, n in self.ends.most_common())
        times = f"{statistics.median(self.seconds):.2f} s, at most {max(self.seconds):.2f} s" if self.seconds else "-"
        return (
            f"{self.verb}: {self.ends.total()} trials of {self.duration_s:.1f} s ({ends}); ended after {times}; "
            f"{self.n_again} whole runs after them; {len(self.wrong)} wrong"
        )


def prepare(folder: Path) -> None:
    """Write a tiny model, its profile, two texts, and one that is long enough to calibrate on."""
    from oracles.tiny_models import write_model

    import adaskip_cpp

    write_model(folder / "m.gguf")
    for i, (name, n_words) in enumerate((("0.txt", 9000), ("1.txt", 9000), ("data.txt", 9000))):
        (folder / name).write_text(" ".join(random.Random(i).choices(_WORDS, k=n_words)))
    llm = adaskip_cpp.AdaSkipLlama(str(folder / "m.gguf"), n_ctx=64, verbose=False)
    requests = [[1, *range(3 + i, 30 + i)] for i in range(4)]
    adaskip_cpp.calibrate(llm, requests, n_decode=4, cost=False).save(folder / "m.adaskip.json")
    llm.close()


def interrupt(verb: str, folder: Path, n: int, seed: int) -> Found:
    """Interrupt a verb ``n`` times, in a folder that :func:`prepare` filled."""
    found, draw = Found(verb), random.Random(f"{seed} {verb}")
    start = time.monotonic()
    _run_to_the_end(verb, folder, found)
    found.duration_s, found.n_again = time.monotonic() - start, 0
    for i in range(n):
        if draw.random() < 0.5:
            shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir(exist_ok=True)
        delay_s = draw.uniform(0, 1.02 * found.duration_s)
        before = _content(folder)
        _trial(verb, folder, delay_s, found, f"trial {i} (signal after {delay_s:.3f} s)")
        _check_files(verb, folder, before, found, f"trial {i}")
        if (i + 1) % AGAIN_EVERY == 0 or i == n - 1:
            _run_to_the_end(verb, folder, found)
    return found


def _command(verb: str) -> list[str]:
    """Quick enough to be run a thousand times, and long enough in every part to be hit there."""
    script = str(Path(sys.executable).with_name("adaskip-cpp"))
    profile = ["--profile", "m.adaskip.json"]
    words = {
        "generate": ["-p", "the to of", "--raw", "--max-tokens", "200", "--ctx", "512", "--skip", "2", *profile],
        "calibrate": ["-o", "out/p.json", "--data", "0.txt", "--no-cost", "--requests", "4", "--tokens", "64"],
        "tune": [
            *("-o", "out/plan.json", "--data", "data.txt", "--text", "0.txt", "--text", "1.txt"),
            *("--context", "64", "--answer", "4", "--no-flash-attn"),
        ],
        "bench": ["--contexts", "16", "--repeats", "1", "--decode-tokens", "2", "--skip", "2", *profile],
        "evaluate": [
            *("-o", "out/folder", "--text", "0.txt", "--skip", "2", "--mode", "e2e", "--strategy", "adaskip", *profile),
            *("--texts", "2", "--tokens", "24", "--continuation", "6", "--rounds", "2", "--speed-context", "16"),
        ],
        "serve": ["--port", "0", "--ctx", "512", "--cache-dir", "out/cache"],
    }[verb]
    return [script, verb, "m.gguf", *words, "--threads", "1"]


def _start(verb: str, folder: Path, mark: str) -> subprocess.Popen[str]:
    # A terminal's Ctrl-C finds SIGINT as it is by default; a shell's background jobs ignore it.
    def as_in_a_terminal() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        _command(verb),
        cwd=folder,
        env={**os.environ, _MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=as_in_a_terminal,
    )


def _trial(verb: str, folder: Path, delay_s: float, found: Found, name: str) -> None:
    mark = f"{os.getpid()}-{random.random()}"
    process = _start(verb, folder, mark)
    told: dict[str, str] = {}
    readers = [_reading(process, told, each, ask=verb == "serve") for each in ("stdout", "stderr")]
    try:
        process.wait(delay_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    start = time.monotonic()
    try:
        code = process.wait(BOUND_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        found.wrong.append(f"{name}: it had not ended after {BOUND_S} s: {told}")
        return
    finally:
        for each in readers:
            each.join(5)
    found.seconds.append(time.monotonic() - start)
    found.ends[_end(verb, code, told.get("stderr", ""), found, name)] += 1
    if _left_running(mark):
        found.wrong.append(f"{name}: a process that it started still runs")


def _reading(process: subprocess.Popen[str], told: dict[str, str], name: str, *, ask: bool) -> threading.Thread:
    """Read an output to its end; a server that says where it listens is asked something."""

    def read() -> None:
        text = ""
        for line in getattr(process, name):
            text += line
            if ask and "A page to try it: http" in text.replace("\n", " "):
                url = text.replace("\n", "").partition("A page to try it: ")[2].partition(". ")[0]
                threading.Thread(target=_ask, args=(url,), daemon=True).start()
        told[name] = text

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _ask(url: str) -> None:
    body = json.dumps({"prompt": "the to of " * 20, "max_tokens": 50}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with contextlib.suppress(OSError):  # it is told to end meanwhile
        urllib.request.urlopen(request, timeout=BOUND_S).read()


def _end(verb: str, code: int, stderr: str, found: Found, name: str) -> str:
    last = (stderr.strip().splitlines() or [""])[-1]
    if code == 130 and last == "Error: interrupted" and not _has_traceback(stderr):
        return "interrupted"
    if code == 130 and verb == "evaluate" and "All results are kept" in stderr and not _has_traceback(stderr):
        return "to go on"
    if code == 0 and not _has_traceback(stderr):
        return "ended" if verb == "serve" else "over before"
    # Until the package can import the signals, Python itself is starting, and tells that in its way.
    ours = re.findall(r'File "[^"]*/adaskip_cpp/[^"]*", line \d+, in .*\n +(.*)', stderr)
    if code in (-signal.SIGINT, 1, 130) and set(ours) <= {"import signal as _signal"} and "Error: " not in stderr:
        return "before the package"
    found.wrong.append(f"{name}: code {code}, stderr {stderr[-1500:]!r}")
    return "wrong"


def _has_traceback(stderr: str) -> bool:
    return "Traceback" in stderr or "Exception ignored" in stderr


def _left_running(mark: str) -> list[str]:
    """Processes that a trial started and that do not end by themselves soon: a worker sees its pipe closed."""
    wanted = f"{_MARK}={mark}".encode()
    for _ in range(50):
        alive = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (path / "environ").read_bytes() and "\nState:\tZ" not in (path / "status").read_text():
                    alive.append(path.name)
            except OSError:
                continue  # it has ended, or is not ours
        if not alive:
            return []
        time.sleep(0.1)
    return alive


def _content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check_files(verb: str, folder: Path, before: dict[str, str], found: Found, name: str) -> None:
    """What was there is as it was, or whole; what is new is whole."""
    from adaskip_cpp import Profile, load_plan
    from adaskip_cpp.evaluation.store import open_store

    after = _content(folder)
    changed = [path for path in before if not path.startswith("out/") and after.get(path) != before[path]]
    # What a stopped run of `tune` keeps goes when a later one has written its plan.
    may_go = ("out/cache/", "out/plan-unfinished") if "out/plan.json" in after else ("out/cache/",)
    lost = [path for path in before if path not in after and not path.startswith(may_go)]
    hidden = [path for path in after if path.endswith((".tmp", ".new"))]
    for words, paths in (("changed", changed), ("lost", lost), ("left over", hidden)):
        if paths:
            found.wrong.append(f"{name}: {words}: {paths}")
    out = folder / "out"
    readers: dict[str, Callable[[], object]] = {
        "p.json": lambda: Profile.load(out / "p.json"),
        "plan.json": lambda: load_plan(out / "plan.json"),
        "folder/results.json": lambda: json.loads((out / "folder" / "results.json").read_text()),
        "folder": lambda: _reopen(out / "folder", open_store),
    }
    for file, read in readers.items():
        if (out / file).exists():
            try:
                read()
            except Exception as error:
                found.wrong.append(f"{name}: {file} cannot be read: {error!r}")


def _reopen(folder: Path, open_store: Callable[..., object]) -> None:
    for path in folder.glob("items-*.jsonl"):
        settings, end, _ = path.read_text().partition("\n")
        if end:
            with open_store(folder, json.loads(settings)["settings"]) as store:  # type: ignore[attr-defined]
                if store.path != path:
                    raise AssertionError("its settings are not those of its results")


def _run_to_the_end(verb: str, folder: Path, found: Found) -> None:
    """The same command, uninterrupted; a server is told to end as soon as it listens."""
    (folder / "out").mkdir(exist_ok=True)
    process = _start(verb, folder, "whole")
    lines: list[str] = []
    if verb == "serve":
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "Ctrl-C ends it" in "".join(lines).replace("\n", " "):
                break
        process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=4 * BOUND_S)
    except subprocess.TimeoutExpired:
        process.kill()
        _, stderr = process.communicate()
    found.n_again += 1
    if process.returncode != 0 or _has_traceback(stderr):
        found.wrong.append(f"a whole run ended with {process.returncode}: {''.join(lines)[-500:]} {stderr[-1500:]}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="in all (default: 1000)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}", flush=True)
    n_wrong = 0
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        for verb in options.verbs:
            start = time.monotonic()
            found = interrupt(verb, Path(place), max(round(options.trials * VERBS[verb]), 1), options.seed)
            print(f"{found}; {time.monotonic() - start:.0f} s in all", flush=True)
            for each in found.wrong:
                print(f"  {each}", flush=True)
            n_wrong += len(found.wrong)
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
