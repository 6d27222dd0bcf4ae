"""Measures the speed of plans against the ideal, in one process. Start at :func:`make_plans`.

    python benchmarks/ideal.py MODEL.gguf PROFILE [--context 512] [--rounds 12]

The plans skip 12 sublayers: the most similar attentions, FFNs, or 6 of each, with linear maps and without compensation.
The ideal is the whole model's time, divided by that time minus the time of the skipped sublayers alone. Their time is
that of a run with them alone, minus that of a run with nothing that can be skipped. All runs take turns in one context.

`adaskip-cpp bench` starts new processes in each round, because two processes of one program differ by a few percent. In
one process this difference cancels out. Run it on an idle machine; it takes about 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

import numpy as np
from results import layers

from adaskip_cpp import AdaSkipLlama, Profile, SkipPlan
from adaskip_cpp.engine.cores import physical_cores
from adaskip_cpp.intervals import Interval, ratio_interval
from adaskip_cpp.measuring import corpus
from adaskip_cpp.measuring.timing import RequestTime, in_turn, time_request

N_DECODE, N_SKIP = 32, 12
COMPENSATIONS = ("linear", "none")
NO_PLAN, REST = "no plan", "nothing that can be skipped"
TIMED = {"prefill": lambda run: run.first_token_s, "decode": RequestTime.per_token_s}  # by phase, seconds of a run


def make_plans(profile: Profile) -> tuple[dict[str, SkipPlan | None], dict[str, str]]:
    """Return the plans of all runs by name, and for each contender the run of its skipped sublayers alone."""
    every = [np.flatnonzero(profile.skippable[:, kind]).tolist() for kind in (0, 1)]
    kinds = {
        f"{N_SKIP} attention": (layers(profile, 0, N_SKIP), []),
        f"{N_SKIP} FFN": ([], layers(profile, 1, N_SKIP)),
        f"{N_SKIP // 2} of each": (layers(profile, 0, N_SKIP // 2), layers(profile, 1, N_SKIP // 2)),
    }
    plans: dict[str, SkipPlan | None] = {NO_PLAN: None}
    alone: dict[str, str] = {}
    for name, (attention, ffn) in kinds.items():
        for each in COMPENSATIONS:
            plans[f"{name}, {each}"] = profile.plan(
                compensation=each, mode="prefill", strategy="manual", attention=attention, ffn=ffn
            )
            alone[f"{name}, {each}"] = f"only {name}"
        others = [
            [layer for layer in every[kind] if layer not in skipped] for kind, skipped in enumerate((attention, ffn))
        ]
        plans[f"only {name}"] = SkipPlan.manual(profile.n_layer, attention=others[0], ffn=others[1])
    plans[REST] = SkipPlan.manual(profile.n_layer, attention=every[0], ffn=every[1])
    return plans, alone


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("profile")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    n_threads = physical_cores()
    n_ctx = args.context + N_DECODE + 1
    llm = AdaSkipLlama(args.model, n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)
    plans, alone = make_plans(Profile.load(args.profile))
    prompt = corpus.cut(llm, corpus.text(()), 1, args.context)[0]
    names = list(plans)
    times: dict[str, list[RequestTime]] = {name: [] for name in names}
    for n_round in range(-1, args.rounds):
        for index in in_turn(len(names), max(n_round, 0)):
            llm.set_plan(plans[names[index]])
            result = time_request(llm, prompt, N_DECODE)
            if n_round >= 0:  # the first round warms up
                times[names[index]].append(result)

    def figure(interval: Interval, form: str) -> str:
        return f"{interval.value:{form}} ({interval.low:{form}} to {interval.high:{form}})"

    print(llm.model_path)
    print(f"{n_threads} threads, llama-cpp-python {version('llama-cpp-python')}, {args.rounds} rounds in turn\n")
    print("| plan, compensation | phase | speed | ideal | of ideal |\n|---|---|---|---|---|")
    for name, only in alone.items():
        for phase, seconds in TIMED.items():
            whole, rest, skipped, own = (
                np.array([seconds(run) for run in times[each]]) for each in (NO_PLAN, REST, only, name)
            )
            least = whole - (skipped - rest)
            cells = [figure(ratio_interval(whole, own), ".3f")]
            if (least > 0).all():
                cells += [figure(ratio_interval(whole, least), ".3f"), figure(ratio_interval(least, own), ".1%")]
            else:  # noise hides the ideal
                cells += ["-", "-"]
            print(f"| {name} | {phase} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
