"""The server under load: clients that ask, stream, leave, and send what is no request, while models' processes die."""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from oracles.served import Server, serving
from oracles.tiny_models import write_model

from adaskip_cpp import AdaSkipLlama

pytestmark = pytest.mark.slow

N_TOKENS = 3
MARGIN = 0.05  # logits by which the likeliest token leads in every step: another batch's rounding cannot turn it


def good_prompts(model: Path, n: int = 8) -> dict[str, str]:
    """Prompts, and what the library answers to each by itself."""
    rng = random.Random(0)
    llm = AdaSkipLlama(str(model), n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)
    found: dict[str, str] = {}
    while len(found) < n:
        prompt = " ".join(rng.choices(["the", "a", "of", "to", "in", "re", "er", "on"], k=rng.choice([20, 200, 400])))
        llm.reset()
        margins = []
        for _, _ in zip(llm.generate(llm.tokenize(prompt.encode()), temp=0), range(N_TOKENS), strict=False):
            *_, second, first = np.sort(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),)))
            margins.append(first - second)
        if min(margins) > MARGIN:
            llm.reset()
            answer: Any = llm.create_completion(prompt, max_tokens=N_TOKENS, temperature=0)
            # A stream loses what is cut in the middle of a character, and the library goes on longer there.
            if answer["choices"][0]["text"].isascii() and answer["usage"]["completion_tokens"] <= N_TOKENS:
                found[prompt] = answer["choices"][0]["text"]
    llm.close()
    return found


def one_client(
    server: Server, prompts: dict[str, dict[str, str]], n_requests: int, may_die: bool, seed: int
) -> Counter[str]:
    """Send requests of all kinds, most of them to the first model; return how many of which kind."""
    done: Counter[str] = Counter()
    rng, names = random.Random(seed), list(prompts)

    def is_told(error: dict[str, Any]) -> bool:
        return may_die and error["code"] == "worker_died"

    for _ in range(n_requests):
        name = rng.choices(names, [10, 2, 1][: len(names)])[0]
        prompt, answer = rng.choice(list(prompts[name].items()))
        body = {"prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0, "user": str(seed), "model": name}
        bad: dict[str, Any] = {"too long": {**body, "prompt": "the " * 3000}, "oversized": {"prompt": "x" * 2_000_000}}
        kind = rng.choice(["good", "good", "stream", "leave", *bad])
        if kind == "good":
            got = server.post("/v1/completions", body)
            if got.status_code == 200:
                assert got.json()["choices"][0]["text"] == answer and got.json()["model"] == name
            else:
                assert got.status_code == 500 and is_told(got.json()["error"])
                kind = "told"
        elif kind in bad:
            got = server.post("/v1/completions", bad[kind])
            error = got.json()["error"]
            status = 413 if kind == "oversized" else 400
            assert error["message"] and (got.status_code == status or (kind == "too long" and is_told(error)))
        else:
            with server.stream(body) as got:
                lines = got.iter_lines()
                if kind == "leave":
                    if rng.random() < 0.5:
                        next(lines)
                else:
                    *events, last = [line.removeprefix("data: ") for line in lines if line and line[0] != ":"]
                    if last == "[DONE]":
                        assert "".join(json.loads(each)["choices"][0]["text"] for each in events) == answer
                    else:
                        assert is_told(json.loads(last)["error"])
                        kind = "told"
        done[kind] += 1
    return done


def load(
    server: Server, prompts: dict[str, dict[str, str]], n_clients: int, n_requests: int, *, may_die: bool = False
) -> Counter[str]:
    """Send so many requests of so many clients each at a time; return how many of which kind."""
    one = partial(one_client, server, prompts, n_requests, may_die)
    with ThreadPoolExecutor(n_clients) as clients:
        return sum(clients.map(one, range(n_clients)), Counter())


def resident(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted in /proc")
@pytest.mark.parametrize("n_models, n_requests", [(1, 24), (3, 8)])
def test_many_clients_and_deaths(tmp_path: Path, n_models: int, n_requests: int, pytestconfig: pytest.Config) -> None:
    """Against AdaSkipLlama by itself. A second round of requests finds all caches filled, and needs no more memory.

    Every good request is answered right, or told that the process died of it; and nothing is left behind.
    """
    names = ["tiny", "small", "wee"][:n_models]
    models = [write_model(tmp_path / f"{name}.gguf", seed=seed) for seed, name in enumerate(names)]
    prompts = {name: good_prompts(model) for name, model in zip(names, models, strict=True)}
    options = ["--plan", "none", "--ctx", "2048", "--keep", "2", "--stuck-timeout", "3"]
    options += ["--cache-size", "4M", "--cache-dir", str(tmp_path / "kept")]
    period, is_over, n_deaths = pytestconfig.option.deaths_seconds, threading.Event(), 0

    def kill() -> None:
        nonlocal n_deaths
        rng, deaths = random.Random(0), (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGSTOP)
        while not is_over.wait(period):
            found = server.workers()
            for each in rng.sample(found, min(len(found), 1)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, rng.choice(deaths))
                    n_deaths += 1

    def held() -> tuple[int, int, int]:
        """What the server's first process holds when it is idle: memory, descriptors, threads."""
        deadline = time.monotonic() + 90  # for the longest pause before a start, and a process stopped in its start
        while server.metric("adaskip_requests_running") or (health := server.get("/health")).status_code != 200:
            assert time.monotonic() < deadline, health.text
            time.sleep(0.1)
        assert len(server.workers()) == min(n_models, 2)
        about = Path("/proc", str(server.process.pid))
        return (
            resident(server.process.pid),
            len(list((about / "fd").iterdir())),
            len(list((about / "task").iterdir())),
        )

    with serving(models[0], *map(str, models[1:]), *options) as server:
        load(server, prompts, 8, 25)
        before, workers = held(), {each: resident(each) for each in server.workers()}
        if n_models == 1:
            load(server, prompts, 8, 25)
            assert held()[0] < 1.05 * before[0] and set(server.workers()) == set(workers)
            assert all(resident(each) < 1.05 * earlier for each, earlier in workers.items())
            assert server.metric("adaskip_queue_waiting") == 0 < server.metric("adaskip_prefix_cache_bytes") <= 4e6
            assert sum(path.stat().st_size for path in (tmp_path / "kept").iterdir()) <= 4e6
        killing = threading.Thread(target=kill, daemon=True)
        killing.start()
        done = load(server, prompts, 16, n_requests, may_die=True)
        is_over.set()
        killing.join()
        after = held()
        print(f"{done}, {n_deaths} deaths; bytes, descriptors and threads {before}, then {after}")
        assert done["told"] <= server.metric("adaskip_worker_deaths") <= n_deaths
        assert after[0] < 1.1 * before[0] and after[1:] <= (before[1] + 2, before[2] + 8)
        assert server.stop() == 0
