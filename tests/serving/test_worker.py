"""The model in a process of its own: what its death costs, and that it never outlives who asks it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from oracles.served import BULK_PLAN, Server, refusal, serving

from adaskip_cpp.serving.body import read_body
from adaskip_cpp.serving.llama import ServedLlama
from adaskip_cpp.serving.plans import Plans
from adaskip_cpp.serving.prefix_cache import PrefixCache
from adaskip_cpp.serving.worker import Done, Service

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes of models are ended by SIGKILL")

CTX = 8192
LONG = " ".join(f"the an{i} of to" for i in range(60))
BOOK = " ".join(f"the an{i} of to" for i in range(600))
"""Several thousand tokens of the tiny vocabulary, which take half a second."""

STOP, GRACE, LEAVE, LOADING = 8, 4, 2, 3
"""Seconds: instead of 28 to end in, of 20 for a running answer and of 5 without a client. And 10 limits to load in."""

ENDLESS = {"prompt": "the to of", "max_tokens": CTX, "logit_bias": {"2": -100}, "grammar": "root ::= [a-z ]+"}
"""An answer that no end-of-sequence token ends, of whole characters."""


@pytest.fixture(scope="module")
def server(served_model: Path, served_plan: Path) -> Iterator[Server]:
    sooner = f"from adaskip_cpp.serving import process; process.LEAVE = {LEAVE}; "
    with serving(served_model, "--plan", str(served_plan), "--ctx", str(CTX), before=sooner) as running:
        yield running


def until(holds: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream that are JSON."""
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def text(server: Server, prompt: str = LONG, **more: Any) -> str:
    answer = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, "temperature": 0, **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- answers ----------------------------------------------------------------------------------------------------------


def same(content: bytes) -> Any:
    """Answers as JSON without what differs from one time to the next."""
    varying = rb'"(?:id|created|\w*_ms|\w*per_second)":(?:"[^"]*"|[\d.e-]+),?'
    return [each for each in re.sub(varying, b"", content).split(b"\n") if not each.startswith(b":")]


REQUESTS = [
    ("/v1/completions", {"prompt": f"a {LONG}", "max_tokens": 8, "temperature": 0, "logprobs": 3}),
    ("/v1/completions", {"prompt": f"a {LONG} to", "max_tokens": 8, "seed": 3, "stream": True}),
    ("/v1/completions", {"prompt": "to " + 4 * LONG, "max_tokens": 4, "stream": True, "return_progress": True}),
    ("/v1/completions", {"prompt": [[1, 7, 9]], "max_tokens": 0, "echo": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the"}], "temperature": 0, "max_tokens": 5}),
]


def test_an_answer_is_that_of_the_model_in_one_process(served_model: Path, served_plan: Path) -> None:
    """To the byte, but for times and names."""
    told: list[Any] = []
    service = Service(told.append, logs_text=False)
    for path, body in REQUESTS:
        service.hear(read_body(path, json.dumps(body).encode()))
    service.hear(None)
    options: Any = {"n_ctx": CTX, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    plans, cache = Plans(BULK_PLAN, None, 0.05, CTX), PrefixCache(10**8)
    service.run(partial(ServedLlama, str(served_model), name="tiny", plans=plans, cache=cache, **options))
    answers = [b""]
    for each in told:
        answers[-1] += each.content if isinstance(each, Done) else getattr(each, "event", b"")
        if isinstance(each, Done):
            assert each.error is None
            answers.append(b"")
    with serving(served_model, "--plan", str(served_plan), "--ctx", str(CTX)) as server:
        found = [server.post(path, body).content for path, body in REQUESTS]
    assert list(map(same, found)) == list(map(same, answers[:-1]))


# --- a death ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["prompt", "stream", "whole"])
def test_a_death_costs_the_request_that_was_worked_for_alone(server: Server, when: str) -> None:
    """Those that wait go on waiting; and a stream that had begun ends with an error."""
    expected, n_deaths = text(server), server.metric("adaskip_worker_deaths")
    (before,) = server.workers()
    with ThreadPoolExecutor(4) as others:
        if when == "whole":
            dying = others.submit(server.post, "/v1/completions", ENDLESS)
            until(lambda: server.metric("adaskip_requests_running"))
            waiting = [others.submit(text, server) for _ in range(3)]
            until(lambda: server.metric("adaskip_queue_waiting") == 3)
            os.kill(before, signal.SIGKILL)
            answer = dying.result()
            assert answer.status_code == 500
            error = answer.json()["error"]
        else:
            body = {"prompt": BOOK, "return_progress": True} if when == "prompt" else ENDLESS
            with server.stream({**body, "cache_salt": when}) as answer:
                told = events(answer)
                assert ("prompt_progress" in next(told)) == (when == "prompt")
                waiting = [others.submit(text, server) for _ in range(3)]
                until(lambda: when == "prompt" or server.metric("adaskip_queue_waiting") == 3)
                os.kill(before, signal.SIGKILL)
                *_, last = told
            error = last["error"]
        assert error["type"] == "internal_server_error" and error["code"] == "worker_died"
        assert "its process ended (Killed); ask again" in error["message"]
        assert [each.result() for each in waiting] == 3 * [expected]
    (after,) = server.workers()
    assert after != before and server.metric("adaskip_worker_deaths") == n_deaths + 1
    assert "tiny: its process ended (Killed); it is started again\n" in server.lines
    assert text(server) == expected


def test_health_tells_that_it_is_restarting(server: Server) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    os.kill(server.workers()[0], signal.SIGKILL)
    until(lambda: server.get("/health").status_code == 503)
    assert server.get("/health").json() == {"status": "restarting"}
    assert server.get("/v1/models").json()["data"][0]["status"] == {"value": "restarting"}
    assert server.post("/tokenize", {"prompt": "the"}).json()["tokens"], "it waits"
    until(lambda: server.get("/health").status_code == 200)


def test_an_idle_process_that_dies_costs_nobody_anything(server: Server) -> None:
    """Not even the request that comes before the death is known."""
    expected = text(server)
    for _ in range(3):
        os.kill(server.workers()[0], signal.SIGKILL)
        assert text(server) == expected


def test_what_is_on_disk_is_read_again_after_a_death(served_model: Path, tmp_path: Path) -> None:
    with serving(served_model, "--plan", "none", "--ctx", str(CTX), "--cache-dir", str(tmp_path / "kept")) as server:
        expected = text(server)
        text(server, f"to {BOOK}")  # takes the place of the other in memory
        until(lambda: list(tmp_path.rglob("*.adaskip-prefix")))
        os.kill(server.workers()[0], signal.SIGKILL)
        answer = server.post("/v1/completions", {"prompt": LONG, "max_tokens": 4, "temperature": 0}).json()
        assert answer["choices"][0]["text"] == expected and answer["adaskip"]["prompt_tokens_read"] == 1


# --- the start --------------------------------------------------------------------------------------------------------


def starting(model: Path, *options: str) -> Server:
    """A server that is not waited for."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", "from adaskip_cpp.cli.main import main; main()", "serve", str(model)]
    process = subprocess.Popen(
        [*command, "--port", port, "--threads", "1", "--plan", "none", *options], stderr=subprocess.PIPE, text=True
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True)
    reader.start()
    return Server(f"http://127.0.0.1:{port}", model, process, lines, reader)


def test_three_deaths_at_the_start_end_the_server(served_model: Path) -> None:
    server = starting(served_model)
    killed: set[int] = set()
    while server.process.poll() is None:
        for each in set(server.workers()) - killed:
            os.kill(each, signal.SIGKILL)
            killed.add(each)
        time.sleep(0.01)
    server.reader.join()
    assert server.process.returncode == 1 and len(killed) == 3
    assert "Error: 3 starts of tiny failed: its process ended (Killed); see the log, or" in server.lines[-1]


def test_a_model_that_cannot_be_opened_ends_the_server_at_once(tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(100))
    for name, words in (("none.gguf", "there is no model file"), ("torn.gguf", "llama.cpp cannot open")):
        server = starting(tmp_path / name)
        assert server.process.wait(30) == 1
        server.reader.join()
        assert server.lines[-1].startswith("Error: ") and words in server.lines[-1]
        assert "again" not in "".join(server.lines)


def test_it_listens_while_the_model_is_loaded(served_model: Path) -> None:
    server = starting(served_model)
    try:
        until(server.workers)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)

        def health() -> httpx.Response | None:
            try:
                return server.get("/health")
            except httpx.ConnectError:
                return None

        until(health)
        answer = server.get("/health")
        assert answer.status_code == 503 and answer.json() == {"status": "loading"}
        assert [each["id"] for each in server.get("/v1/models").json()["data"]] == ["tiny"]
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(text, server)
            time.sleep(0.2)
            os.kill(worker, signal.SIGCONT)
            assert waiting.result()
        assert server.get("/health").status_code == 200
        assert server.stop() == 0
    finally:
        server.process.kill()


# --- a process that does nothing --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(served_model: Path) -> Iterator[Server]:
    sooner = f"from adaskip_cpp.serving import process; process._LOADING = {LOADING}; "
    with serving(served_model, "--plan", "none", "--ctx", str(CTX), "--stuck-timeout", "2", before=sooner) as running:
        yield running


def test_a_process_that_does_not_load_is_ended(impatient: Server) -> None:
    (first,) = impatient.workers()
    os.kill(first, signal.SIGKILL)
    until(lambda: set(impatient.workers()) - {first})
    (second,) = impatient.workers()
    os.kill(second, signal.SIGSTOP)
    assert text(impatient)
    assert second not in impatient.workers()
    why = "it did not load within 6 seconds and was ended; use a larger --stuck-timeout"
    assert f"tiny: {why}; it is started again\n" in impatient.lines


def stopped(server: Server) -> int:
    """The process of the model, which does nothing from now on."""
    (worker,) = server.workers()
    os.kill(worker, signal.SIGSTOP)
    return worker


def test_a_request_that_takes_no_step_has_its_process_ended(impatient: Server) -> None:
    """Of a request that had begun, and of one that comes to a process which does nothing already."""
    expected, n_deaths = text(impatient), impatient.metric("adaskip_worker_deaths")
    with impatient.stream(ENDLESS) as answer:
        told = events(answer)
        next(told)
        worker, begin = stopped(impatient), time.monotonic()
        *_, last = told
    assert 1.5 < time.monotonic() - begin < 4 and not is_running(worker)
    assert last["error"]["code"] == "worker_died" and "stuck for 2 seconds" in last["error"]["message"]
    assert text(impatient) == expected
    stopped(impatient)
    assert text(impatient) == expected, "it had not begun, so it is asked again"
    assert impatient.metric("adaskip_worker_deaths") == n_deaths + 2
    stopped(impatient)
    answer = impatient.post("/tokenize", {"prompt": "the"})
    assert answer.status_code == 503 and "did not answer in time" in answer.json()["error"]["message"]
    assert text(impatient) == expected


def test_a_request_that_goes_on_without_its_client_has_its_process_ended(server: Server) -> None:
    expected = text(server)
    with server.stream(ENDLESS) as answer:
        told = events(answer)
        next(told)
        worker, begin = stopped(server), time.monotonic()
    assert text(server) == expected
    assert LEAVE - 0.5 < time.monotonic() - begin < 9 and worker not in server.workers()
    assert any(f"did not stop {LEAVE} seconds after its client had left" in line for line in server.lines)


# --- several models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def three(served_model: Path, tmp_path: Path) -> list[str]:
    """Three models of one kind, whose answers tell their names."""
    return [shutil.copy(served_model, tmp_path / f"{name}.gguf") for name in ("one", "two", "three")]


def states(server: Server) -> dict[str, str]:
    listed = server.get("/v1/models").json()["data"]
    return {each["id"]: each["status"]["value"] for each in listed}


def named(server: Server, name: str | None, **more: Any) -> str:
    answer = server.post("/v1/completions", {"prompt": LONG, "max_tokens": 2, "model": name, **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


def test_models_are_asked_by_name_and_one_is_in_memory_at_a_time(three: list[str], tmp_path: Path) -> None:
    options = "--plan", "none", "--alias", "first", "--cache-dir", str(tmp_path / "kept")
    with serving(Path(three[0]), three[1], *options) as server:
        assert states(server) == {"first": "ready", "two": "unloaded"} and len(server.workers()) == 1
        assert [named(server, name) for name in ("first", None)] == ["first", "first"]
        assert named(server, "two") == "two" and states(server) == {"first": "unloaded", "two": "ready"}
        assert len(server.workers()) == 1
        assert server.lines[-2:] == ["first: unloaded, to make room for two\n", "two: loading\n"]
        for name in ("one", "gpt-4"):
            answer = server.post("/v1/completions", {"prompt": "the", "model": name})
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        assert server.post("/tokenize", {"prompt": "the", "model": "first"}).json()["tokens"]
        assert states(server) == {"first": "ready", "two": "unloaded"}
        answer = server.post("/v1/completions", {"prompt": LONG, "model": "first"}).json()
        assert answer["adaskip"]["prompt_tokens_read"] == 1, "what it had read was written when it was unloaded"
        assert server.stop() == 0


def test_so_many_models_are_kept_and_the_least_recently_used_goes(three: list[str]) -> None:
    with serving(Path(three[0]), *three[1:], "--plan", "none", "--keep", "2") as server:
        for name in ("two", "one", "three"):
            named(server, name)
        assert states(server) == {"one": "ready", "two": "unloaded", "three": "ready"} and len(server.workers()) == 2
        assert server.stop() == 0


def test_a_model_that_nobody_asks_for_is_unloaded(served_model: Path) -> None:
    with serving(served_model, "--plan", "none", "--keep-alive", "0.02") as server:
        expected = text(server)
        until(lambda: states(server) == {"tiny": "unloaded"})
        assert server.workers() == [] and server.get("/health").status_code == 200
        assert server.metric("adaskip_kv_bytes") == 0 == server.metric("adaskip_worker_deaths")
        assert "tiny: unloaded, as there was no request for it\n" in server.lines
        assert text(server) == expected
        with server.stream({**ENDLESS, "max_tokens": 600}) as answer:  # which takes longer than that
            assert list(events(answer))[-1]["choices"][0]["finish_reason"] == "length"
        assert server.stop() == 0


def test_a_model_that_cannot_be_loaded_takes_none_of_the_others_away(three: list[str]) -> None:
    """An error at once where it cannot be opened; three tries where its process dies."""
    with serving(Path(three[0]), *three[1:], "--plan", "none") as server:
        content = Path(three[1]).read_bytes()
        Path(three[1]).write_bytes(content[:1000])
        answer = server.post("/v1/completions", {"prompt": "the", "model": "two"})
        assert answer.status_code == 500 and "the model 'two' cannot be loaded" in answer.json()["error"]["message"]
        until(lambda: "llama.cpp cannot open" in server.lines[-1])
        assert "Traceback" not in "".join(server.lines)
        assert named(server, "one") == "one"
        Path(three[1]).write_bytes(content)
        assert named(server, "two") == "two"
        before = set(server.workers())
        killed = set(before)
        with ThreadPoolExecutor(1) as client:
            dying = client.submit(server.post, "/v1/completions", {"prompt": "the", "model": "three"})
            while not dying.done():
                for each in set(server.workers()) - killed:
                    os.kill(each, signal.SIGKILL)
                    killed.add(each)
                time.sleep(0.01)
        assert dying.result().status_code == 500 and len(killed - before) == 3
        assert server.lines[-1].startswith("3 starts of three failed: its process ended (Killed); see the log, or")
        assert named(server, "one") == "one"
        assert server.stop() == 0


def test_names_that_are_given_twice_are_refused(three: list[str]) -> None:
    for options in ((three[0],), (three[1], "--alias", "two"), ("--alias", "a", "--alias", "b")):
        assert "--alias" in refusal(three[0], *options)
    assert "there is no model file" in refusal(three[0], "none.gguf")


def test_slots_tell_what_is_worked_for_and_no_text(served_model: Path, tmp_path: Path) -> None:
    """In the form of llama.cpp's server."""
    (tmp_path / "keys").write_text("a\nb")
    with serving(served_model, "--plan", "none", "--api-key-file", str(tmp_path / "keys")) as server:

        def slot(key: str = "a") -> dict[str, Any]:
            (only,) = server.get("/slots", headers={"authorization": f"Bearer {key}"}).json()
            return dict(only)

        idle = {"id": 0, "model": "tiny", "n_ctx": 8192, "speculative": False, "is_processing": False}
        assert slot() == idle
        body = {**ENDLESS, "max_tokens": 5000, "stream": True}
        owners = set()
        for key in ("a", "b", "a"):
            asked = {"headers": {"authorization": f"Bearer {key}"}, "json": body, "timeout": 60}
            with httpx.stream("POST", f"{server.url}/v1/completions", **asked) as answer:
                told = events(answer)
                next(told)
                until(lambda: slot()["next_token"][0]["n_decoded"] > 10)
                at = slot("b")
            owners.add(at.pop("owner"))
            ((next_token,), n_cached) = at.pop("next_token"), at.pop("n_prompt_tokens_cache")
            n_decoded = next_token.pop("n_decoded")
            assert next_token == {"has_next_token": True, "n_remain": 5000 - n_decoded}
            n_processed = at.pop("n_prompt_tokens_processed")
            assert at.pop("n_prompt_tokens") == n_cached + n_processed == 8
            assert at == {**idle, "is_processing": True}
            until(lambda: slot() == idle)
        assert len(owners) == 2 and all(len(each) == 8 for each in owners)


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["loading", "restarting", "waiting"])
def test_it_ends_when_it_is_told_to(served_model: Path, how: str) -> None:
    """In whatever state the model is; without an error, and at once where no answer is running."""
    with serving(served_model, "--plan", "none", "--ctx", str(CTX)) as server:
        begin = time.monotonic()
        if how in ("loading", "restarting"):
            os.kill(server.workers()[0], signal.SIGKILL)
            until(lambda: server.get("/health").status_code == 503)
        if how == "loading":
            until(server.workers)
        with ThreadPoolExecutor(1) as client:
            if how == "waiting":
                stopped(server)
                os.kill(server.workers()[0], signal.SIGKILL)
                refused = client.submit(server.post, "/v1/completions", {"prompt": "the"})
                until(lambda: server.metric("adaskip_requests_running"))
            assert server.stop() == 0
            assert time.monotonic() - begin < 25
            if how == "waiting":
                assert refused.result().status_code in (200, 500, 503)


@pytest.mark.parametrize(
    ("is_stopped", "is_answering", "number"),
    [
        (False, False, signal.SIGINT),
        (False, False, signal.SIGTERM),
        (True, False, signal.SIGTERM),
        (False, True, signal.SIGTERM),
        (True, True, signal.SIGINT),
    ],
)
def test_it_ends_in_time_whatever_the_model_does(
    served_model: Path, tmp_path: Path, is_stopped: bool, is_answering: bool, number: signal.Signals
) -> None:
    """An endless answer gets its time. Afterwards the cache is written, but by a process that does nothing."""
    options = "--plan", "none", "--ctx", "65536", "--cache-dir", str(tmp_path / "kept")
    sooner = (
        "from adaskip_cpp.serving import process, server; "
        f"server.STOP, server.GRACE, process.LEAVE = {STOP}, {GRACE}, {LEAVE}; "
    )
    with serving(served_model, *options, before=sooner) as server:
        text(server)
        (worker,), begin = server.workers(), time.monotonic()
        if is_answering:
            with server.stream({**ENDLESS, "prompt": LONG, "max_tokens": 60_000}) as answer:
                told = events(answer)
                next(told)
                if is_stopped:
                    stopped(server)
                begin = time.monotonic()
                server.process.send_signal(number)
                *_, last = told
            assert last["error"]["code"] == "stopping"
        else:
            if is_stopped:
                stopped(server)
            server.process.send_signal(number)
        assert server.process.wait(STOP + 4) == 0 and not is_running(worker)
        assert (time.monotonic() - begin < GRACE - 0.5) == (not is_stopped and not is_answering)
        assert bool(list(tmp_path.rglob("*.adaskip-prefix"))) == (not is_stopped)


@pytest.mark.parametrize("is_busy", [False, True])
def test_it_does_not_outlive_who_asks_it(served_model: Path, is_busy: bool) -> None:
    with serving(served_model, "--plan", "none", "--ctx", str(CTX)) as server:
        (worker,) = server.workers()
        if is_busy:
            with server.stream(ENDLESS) as answer:
                told = events(answer)
                next(told)
                server.process.kill()
        server.process.kill()
        until(lambda: not is_running(worker), 5)
