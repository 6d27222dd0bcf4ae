"""Checks for gpu.py: a device of ggml must agree with the CPU and, without a plan, bit for bit with stock.

Start at :class:`Checks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import with_tests  # noqa: F401
from oracles.reference import relative_error
from oracles.stock import Job, run_stock

from adaskip_cpp import AdaSkipLlama, Profile, SkipPlan
from adaskip_cpp.calibration.similarity import RequestStatistics
from adaskip_cpp.measuring import corpus
from adaskip_cpp.measuring.judge import Logits
from adaskip_cpp.model.plan import OnlineStage
from adaskip_cpp.model.statistics import PhaseStatistics

__all__ = ["Check", "Checks", "n_skipped"]

PROMPTS, N_ANSWER = (24, 100, 600), 8
"""Tokens of the prompts, and of the answers whose logits are compared. Devices have different kernels for few and for
many tokens; the second prompt has a short bulk, and the third is longer than a ubatch."""
MANY_TIMES, LEAST_ROUNDING = 4, 1e-6
"""A plan may differ between device and CPU by four times the difference of the whole model, which counts as at
least float32's rounding."""
MOST_NATS = 0.03  # from the CPU to a device with no plan: as little as the mildest plans of the README lose
SHARE = 5  # one in so many sublayers is skipped: 12 of SmolLM2's 60

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
    """Compares a model on a device with stock and with the CPU, which computes its side once."""

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
        if n_gpu_layers == 0:  # else llama.cpp computes ubatches of 32 tokens and more on the device nevertheless
            options["op_offload"] = False
        options |= {**self._options, "n_gpu_layers": n_gpu_layers}
        return AdaSkipLlama(self._path, exact_batches=True, verbose=False, **options)

    def run(self, n_gpu_layers: int) -> list[Check]:
        """Return the checks with so many layers on the device."""
        options = {**self._options, "n_gpu_layers": n_gpu_layers}
        stock = run_stock(
            [Job(self._path, [prompt, *([each] for each in answer)], options) for prompt, answer in self._cases]
        )
        with closing(self._open(n_gpu_layers)) as llm:
            whole = under(llm, None, self._cases)
            rounding = max(furthest(under(llm, None, self._others), self._other_whole), LEAST_ROUNDING)
            most = MANY_TIMES * rounding
            nats = np.mean([kl_divergence(*pair) for pair in zip(self._whole, whole, strict=True)])
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
        return checks


def plans_to_check(profile: Profile) -> dict[str, SkipPlan]:
    n = n_skipped(profile)
    # With a threshold of -1 the stage adds every FFN, so rounding cannot decide about any.
    stage = OnlineStage(N_ANSWER // 2, -1.0, "paper")
    staged = replace(profile.plan(n, mode="e2e", compensation="paper"), online=stage)
    return {
        "prompt mode": profile.plan(n),
        "prompt mode, windows": profile.plan(n, windowed=len(profile.windowable), window_size=64),
        "decode": profile.plan(n, mode="decode", online=False),
        "e2e, online stage": staged,
        "schedule": profile.plan(n, mode="e2e", strategy="skip_decode"),
    }


def n_skipped(profile: Profile) -> int:
    return max(int(profile.skippable.sum()) // SHARE, 2)


def without_half_of_kv(profile: Profile) -> SkipPlan:
    return SkipPlan.manual(profile.n_layer, attention=np.flatnonzero(profile.skippable[:, 0])[::2].tolist())


def under(llm: AdaSkipLlama, plan: SkipPlan | None, cases: Sequence[Case]) -> list[Logits]:
    """Return the logits after each case's prompt and after each token of its answer, ``[1 + n, n_vocab]``."""
    import llama_cpp  # ours, as adaskip_cpp is imported

    llm.set_plan(plan)
    found = []
    for prompt, answer in cases:
        llm.begin_request()
        llm.reset()
        llm.eval(prompt)
        row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        rows = [np.ctypeslib.as_array(row, shape=(1, llm.n_vocab())).copy()]
        rows += [llm.logits_after([token]) for token in answer]
        found.append(np.concatenate(rows))
    return found


def kl_divergence(full: Logits, other: Logits) -> float:
    """Return the mean of KL(full || other) over positions, in nats; both are float32 ``[n, n_vocab]``."""
    p, q = (each.astype(np.float64) - each.max(axis=1, keepdims=True) for each in (full, other))
    p, q = (each - np.log(np.exp(each).sum(axis=1, keepdims=True)) for each in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def furthest(found: Sequence[Logits], expected: Sequence[Logits]) -> float:
    return max(relative_error(*pair) for pair in zip(found, expected, strict=True))


def count_splits(llm: AdaSkipLlama, plan: SkipPlan | None, case: Case) -> list[int]:
    """Return the numbers of splits of three graphs: a bulk, the end of a prompt, and a decoded token."""
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
