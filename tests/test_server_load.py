"""The server under load: clients that ask, stream, leave, and send what is no request."""

import json
import random
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from served import Server, serving
from tiny_models import write_model

from adaskip_cpp import AdaSkipLlama

pytestmark = pytest.mark.slow

N_CLIENTS, N_REQUESTS, N_TOKENS = 8, 25, 3
MARGIN = 0.05
"""Logits by which the likeliest token leads in every step: the rounding of another batch cannot turn it."""


def good_prompts(model: Path) -> dict[str, str]:
    """Prompts, and what the library answers to each by itself."""
    rng = random.Random(0)
    llm = AdaSkipLlama(str(model), n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)
    found: dict[str, str] = {}
    while len(found) < 12:
        prompt = " ".join(rng.choices(["the", "a", "of", "to", "in", "re", "er", "on"], k=rng.choice([20, 200, 400])))
        llm.reset()
        margins = []
        for _, _ in zip(llm.generate(llm.tokenize(prompt.encode()), temp=0), range(N_TOKENS), strict=False):
            *_, second, first = np.sort(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),)))
            margins.append(first - second)
        if min(margins) > MARGIN:
            llm.reset()
            answer: Any = llm.create_completion(prompt, max_tokens=N_TOKENS, temperature=0)
            found[prompt] = answer["choices"][0]["text"]
    llm.close()
    return found


def one_client(server: Server, prompts: dict[str, str], seed: int, done: list[str]) -> None:
    """Send requests of all kinds; what is wrong is an AssertionError, which ``done`` then lacks."""
    rng = random.Random(seed)
    for _ in range(N_REQUESTS):
        prompt, answer = rng.choice(list(prompts.items()))
        body = {"prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0, "user": str(seed)}
        kind = rng.choice(["good", "good", "stream", "leave", "broken", "too long", "oversized", "empty"])
        if kind == "good":
            got = server.post("/v1/completions", body)
            assert got.json()["choices"][0]["text"] == answer
        elif kind in ("stream", "leave"):
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=120
            ) as got:
                lines = got.iter_lines()
                if kind == "leave":
                    if rng.random() < 0.5:
                        next(lines)
                else:
                    events = [line[6:] for line in lines if line.startswith("data: ")]
                    assert events[-1] == "[DONE]"
                    assert "".join(json.loads(each)["choices"][0]["text"] for each in events[:-1]) == answer
        else:
            bad: Any = {
                "broken": b'{"prompt": "th',
                "too long": {"prompt": "the " * 3000},
                "oversized": {"prompt": "x" * 2_000_000},
                "empty": {"prompt": []},
            }[kind]
            got = server.post("/v1/completions", bad)
            assert got.status_code == (413 if kind == "oversized" else 400) and got.json()["error"]["message"]
        done.append(kind)


def resident(server: Server) -> int:
    """Kilobytes of memory of the server's process."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(server.process.pid)]))


def load(server: Server, prompts: dict[str, str]) -> None:
    done: list[str] = []
    clients = [
        threading.Thread(target=one_client, args=(server, prompts, seed, done), daemon=True)
        for seed in range(N_CLIENTS)
    ]
    for each in clients:
        each.start()
    for each in clients:
        each.join(300)
    assert len(done) == N_CLIENTS * N_REQUESTS


def test_two_hundred_requests_of_eight_clients(tmp_path: Path) -> None:
    """Against AdaSkipLlama by itself. The second round finds all caches filled, and shall need no more memory."""
    model = write_model(tmp_path / "tiny.gguf")
    prompts = good_prompts(model)
    options = ("--plan", "none", "--ctx", "2048", "--cache-size", "4M", "--cache-dir", str(tmp_path / "kept"))
    with serving(model, *options) as server:
        load(server, prompts)
        before = resident(server)
        load(server, prompts)
        assert resident(server) < 1.05 * before
        assert server.metric("adaskip_queue_waiting") == 0 == server.metric("adaskip_requests_running")
        assert server.metric("adaskip_prefix_cache_bytes") <= 4e6
        assert sum(path.stat().st_size for path in (tmp_path / "kept").iterdir()) <= 4e6
        assert server.stop() == 0
