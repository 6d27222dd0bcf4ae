"""Ctrl-C at any moment: a verb ends with its code and its line, files are whole, and a model in a program goes on.

What a model computes afterwards is compared with one that was never interrupted.
"""

import ctypes
import inspect
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from click.testing import CliRunner
from oracles.fixtures import Open
from oracles.readable import logits
from oracles.served import Nobody
from oracles.tiny_models import write_model

from adaskip_cpp import AdaSkipLlama, Profile, SkipPlan, calibrate, load_plan, save_plan
from adaskip_cpp.cli.terminal import Verbs, verb

ATTENTION, FFN = SkipPlan.manual(3, attention=[1]), SkipPlan.manual(3, ffn=[1], scale=1.1)
PROMPT, MORE = [1, *range(20, 32)], [*range(40, 44)]

VERBS = {"generate": 0.4, "calibrate": 0.2, "tune": 0.2, "serve": 0.12, "bench": 0.04, "evaluate": 0.04}
"""Their shares of the trials: those that take longer get fewer."""

OPTIONS = {
    "generate": "-p the --raw --max-tokens 200 --ctx 512 --plan plan.json",
    "calibrate": "-o out/p.json --data 0.txt --no-cost --requests 4 --tokens 64",
    "tune": "-o out/plan.json --data data.txt --text 0.txt --text 1.txt --context 64 --answer 4 --flash-attn off",
    "bench": "--contexts 16 --repeats 1 --decode-tokens 2 --plan plan.json",
    "evaluate": "-o out/folder --text 0.txt --profile m.adaskip.json --skip 2 --mode e2e --strategy adaskip "
    "--texts 2 --tokens 24 --continuation 6 --rounds 2 --speed-context 16",
    "serve": "--port 0 --ctx 512 --cache-dir out/cache",
}
"""Quick enough to be run a thousand times, and long enough in every part to be hit there."""

BOUND_S = 60.0
"""A process that has not ended by then does not end: whatever is between two looks at signals takes a tenth of it."""

TRACEBACK = re.compile("Traceback|Exception ignored")


def interrupt(verb: str, folder: Path, n: int) -> list[str]:
    """Interrupt a verb ``n`` times, and return what was not as it should be."""
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
        code, stderr = _run(verb, folder, delay_s)
        found = [] if _is_an_end(verb, code, stderr) else [f"code {code}, stderr {stderr[-1500:]!r}"]
        wrong += [f"trial {i}, signal after {delay_s:.3f} s: {each}" for each in found + _check_files(folder, before)]
        if i % 25 == 24 or i == n - 1:
            wrong += _run_to_the_end(verb, folder)
    return wrong


def _run(verb: str, folder: Path, delay_s: float | None) -> tuple[int | None, str]:
    """Run a verb, and interrupt it after a while, or a server once it has answered; its code, if any, and stderr."""
    log, script = folder.with_suffix(".log"), Path(sys.executable).with_name("adaskip-cpp")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [script, verb, "m.gguf", *OPTIONS[verb].split(), "--threads", "1"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            # A terminal's Ctrl-C finds SIGINT as it is by default; a shell's background jobs ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    if verb == "serve":
        threading.Thread(target=_ask, args=(process, log, delay_s is None), daemon=True).start()
    for patience_s in (4 * BOUND_S if delay_s is None else delay_s, BOUND_S):
        try:
            return process.wait(patience_s), log.read_text()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
    process.kill()
    process.wait()
    return None, log.read_text()


def _ask(process: subprocess.Popen[bytes], log: Path, ends: bool) -> None:
    """Ask a server something as soon as it says where it listens, and end it then."""
    while process.poll() is None:
        if found := re.search(r"A page to try it: (http\S+)\. ", " ".join(log.read_text().split())):
            body = {"prompt": "the to of " * 20, "max_tokens": 50}
            with suppress(httpx.HTTPError):  # it is told to end meanwhile
                httpx.post(f"{found[1]}/v1/completions", json=body, timeout=BOUND_S)
            break
        time.sleep(0.05)
    if ends:
        process.send_signal(signal.SIGINT)


def _run_to_the_end(verb: str, folder: Path) -> list[str]:
    code, stderr = _run(verb, folder, None)
    return [] if code == 0 and not TRACEBACK.search(stderr) else [f"a whole run: code {code}, stderr {stderr[-1500:]}"]


def _is_an_end(verb: str, code: int | None, stderr: str) -> bool:
    if not TRACEBACK.search(stderr):
        is_told = stderr.endswith("Error: interrupted\n") or (verb == "evaluate" and "All results are kept" in stderr)
        if code == 0 or (code == 130 and is_told):
            return True
    # Until the package can import the signals, Python itself is starting, and tells that in its way.
    ours = re.findall(r'File "[^"]*/adaskip_cpp/[^"]*", line \d+, in .*\n +(.*)', stderr)
    is_python = set(ours) <= {"import signal as _signal"} and "Error: " not in stderr
    return code in (-signal.SIGINT, 1, 130) and is_python


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _check_files(folder: Path, before: dict[str, bytes]) -> list[str]:
    """What was there is as it was, or whole; what is new is whole."""
    after, out = _content(folder), folder / "out"
    # What a stopped run of `tune` keeps goes when a later one has written its plan.
    may_go = ("out/cache/", "out/plan-unfinished") if "out/plan.json" in after else ("out/cache/",)
    found = {
        "changed": [path for path in before if not path.startswith("out/") and after.get(path) != before[path]],
        "lost": [path for path in before if path not in after and not path.startswith(may_go)],
        "left over": [path for path in after if path.endswith((".tmp", ".new"))],
    }
    wrong = [f"{words}: {paths}" for words, paths in found.items() if paths]
    for file, read in (("p.json", Profile.load), ("plan.json", load_plan), ("folder", _reopen)):
        if (out / file).exists():
            read(out / file)
    return wrong


def _reopen(folder: Path) -> None:
    if (results := folder / "results.json").exists():
        json.loads(results.read_text())
    for path in folder.glob("items-*.json"):
        assert path.name == f"items-{json.loads(path.read_text())['key'][:12]}.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its profile, a plan, and three texts."""
    folder = tmp_path_factory.mktemp("interrupted")
    model, words = write_model(folder / "m.gguf"), ["the", "of", "to", "an", "in", "error", "there", "one", "ten"]
    for i, name in enumerate(("0.txt", "1.txt", "data.txt")):
        (folder / name).write_text(" ".join(random.Random(i).choices(words, k=9000)))
    with closing(AdaSkipLlama(str(model), n_ctx=64, verbose=False)) as llm:
        profile = calibrate(llm, [[1, *range(3 + i, 30 + i)] for i in range(4)], n_decode=4, cost=False)
    profile.save(folder / "m.adaskip.json")
    save_plan(folder / "plan.json", profile.plan(2))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tried on Linux alone")
@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupted_verb_leaves_whole_files(verb: str, folder: Path, pytestconfig: pytest.Config) -> None:
    if verb == "serve":
        pytest.importorskip("uvicorn")
    n = max(round(pytestconfig.option.sigint_trials * VERBS[verb]), 1)
    assert interrupt(verb, folder, n) == []


AMONG_IMPORTS = """
import signal, sys
from importlib.abc import MetaPathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
sys.argv[0] = "/usr/bin/adaskip-cpp"
from adaskip_cpp.cli.main import main
"""


@pytest.mark.parametrize("module", ["adaskip_cpp.errors", "llama_cpp", "rich.console"])
def test_ctrl_c_among_the_imports_of_the_script_is_one_line(module: str) -> None:
    command = [sys.executable, "-c", AMONG_IMPORTS, module]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (130, "Error: interrupted\n")


def test_ctrl_c_in_a_callback_from_c_still_ends_the_verb() -> None:
    # Nothing can be raised through C: Python would tell a traceback, and the verb would go on.
    @ctypes.CFUNCTYPE(None)
    def callback() -> None:
        signal.raise_signal(signal.SIGINT)

    @verb("Wait.", "")
    def wait() -> None:
        callback()
        for _ in range(1000):
            time.sleep(0.01)

    result = CliRunner().invoke(Verbs(commands={"wait": wait}), ["wait"])
    assert (result.exit_code, result.stderr.strip()) == (130, "Error: interrupted")


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="no timers here")
def test_a_server_that_is_just_starting_hears_ctrl_c() -> None:
    pytest.importorskip("uvicorn")
    from adaskip_cpp.serving.queue import FairQueue
    from adaskip_cpp.serving.server import Server, listen

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks")

    class Ended(Nobody):
        async def close(self, seconds: float) -> None:
            ended.append(True)

    ended: list[bool] = []
    signal.alarm(30)  # would end this process
    with listen("127.0.0.1", 0) as listener:
        Server(app, FairQueue(1), Ended(), listener, lambda: signal.raise_signal(signal.SIGINT)).run()
    signal.alarm(0)
    assert ended == [True]


def is_interrupted(n: int, call: Callable[[], None]) -> bool:
    """Raise a KeyboardInterrupt at the n-th moment at which Python would, and return whether the call came to it.

    Python looks at signals where a function begins, or has returned, and where a loop goes round.
    """
    n_seen = 0

    def moment(frame: Any, event: str, argument: Any) -> None:
        nonlocal n_seen
        name, is_generator = frame.f_code.co_filename, frame.f_code.co_flags & inspect.CO_GENERATOR
        # Where a generator yields nothing is raised in it, but in who asked it.
        if event == "c_call" or (event == "return" and is_generator):
            return
        if any(part in name for part in ("adaskip_cpp", "llama_cpp", "contextlib")):
            n_seen += 1
            if n_seen == n:
                sys.setprofile(None)
                raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        sys.setprofile(moment)
        try:
            call()
        finally:
            sys.setprofile(None)
    return n_seen >= n


def generate(llm: Any) -> None:
    tokens = llm.generate([*PROMPT, *MORE], temp=0)
    for _ in range(3):
        next(tokens)
    tokens.close()


def change_plan(llm: Any) -> None:
    llm.set_plan(FFN)
    llm.eval(MORE)


def collect(llm: Any) -> None:
    with llm.collect_statistics(lambda batch: None, keep_logits=True):
        llm.eval(MORE)


CALLS = {"evaluate": lambda llm: llm.eval(MORE), "generate": generate, "change plan": change_plan, "collect": collect}


def check(llm: Any, fresh: Any) -> None:
    """It goes on from where it is, generates and takes plans as one that was never interrupted."""
    assert llm.plan in (ATTENTION, FFN)
    fresh.set_plan(llm.plan)
    fresh.reset()
    fresh.eval([*llm.input_ids[: llm.n_tokens].tolist(), 7, 8])
    llm.eval([7, 8])
    # F32, but other batch sizes; and recurrent states are carried over.
    np.testing.assert_allclose(logits(llm), logits(fresh), rtol=1e-3, atol=1e-4)
    for each in (llm, fresh):
        next(each.generate([*PROMPT, 9], temp=0))
    np.testing.assert_allclose(logits(llm), logits(fresh), rtol=1e-3, atol=1e-4)
    with llm.collect_statistics(lambda batch: None):
        llm.eval([5])
    for plan in (None, FFN):
        for each in (llm, fresh):
            each.reset()
            each.set_plan(plan)
            each.eval([*PROMPT, *MORE])
        np.testing.assert_array_equal(logits(llm), logits(fresh))


@pytest.mark.parametrize("family", ["llama", "gemma3", "jamba"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_model_goes_on_wherever_a_call_is_interrupted(
    call: Callable[[Any], None], family: str, open_tiny: Open
) -> None:
    llm, fresh = (open_tiny(family, swa_full=False) for _ in range(2))
    n_interrupted = 0
    for n in itertools.count(random.randrange(1, 3), 2):
        llm.reset()
        llm.set_plan(ATTENTION)
        llm.eval(PROMPT)
        if not is_interrupted(n, partial(call, llm)):
            break
        n_interrupted += 1
        print(f"interrupted at moment {n}")
        check(llm, fresh)
    assert n_interrupted > 10
