"""Measures answers' divergence from skipping one sublayer in the bulk, for ``calibrate``: ``measure_divergence``."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..engine.llama import AdaSkipLlama
from ..measuring.judge import Judge, Scores
from ..measuring.probes import Probe, ProbeKind, probes_of
from ..model.arrays import Floats
from ..model.plan import Bulk, SkipPlan
from ..model.profile import Windows
from ..model.skip_set import KINDS, SkipSet
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from .cost import set_aside

# Pieces of text, and tokens of each piece's prompt and of either answer. With prompts of 512 and answers of 128 tokens
# SmolLM2 skips almost the same sublayers, and loses as much at 1.4 times the speed.
N_PIECES, N_PROMPT, N_ANSWER = 3, 192, 48
N_DEPTHS = 5  # numbers of windowed attentions that are measured; values between them are interpolated
SHORTEST = 256  # tokens of the shortest piece whose bulk holds several windows


def measure_divergence(
    llm: AdaSkipLlama,
    profile: Profile,
    pieces: Sequence[Sequence[int]],
    *,
    layers: Sequence[int] | None = None,
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> tuple[Floats, Floats]:
    """Return the divergence from skipping each sublayer alone in the bulk: in continuations, and in copies.

    Each is float64 ``[n_layer, 2]``, in nats per token; NaN for sublayers that cannot be skipped or are not in
    ``layers`` (None for all). The first piece measures all. The others measure the half that loses less there, because
    plans choose the other half last. The model's plan is put back at the end; its KV cache is dropped.
    """
    may = profile.in_bulk if layers is None else profile.in_bulk & np.isin(np.arange(profile.n_layer), layers)[:, None]
    which, lost = np.argwhere(may), np.full((2, *may.shape), np.nan)
    first, others = pieces[:1], pieces[1:]
    share = 1 / (1 + len(others) / 2)  # of the time, for the first piece

    def measured(of: Sequence[Sequence[int]], begin: float, part: float) -> Floats:
        """Return the mean divergences of ``which``, ``[2, len(which)]``."""
        request, judge, found = PlanRequest(mode="prompt", strategy="manual", tail=1), Judge(llm, _probes(llm, of)), []
        for done, (layer, kind) in enumerate(which):
            scores = judge(profile.plan(request, **{KINDS[kind]: (int(layer),)}))
            found.append([_mean(judge.probes, scores, each) for each in ("continuation", "copying")])
            on_progress(begin + part * (done + 1) / len(which))
        return np.transpose(found)

    with set_aside(llm):
        of_first = measured(first, 0.0, share)
        lost[:, which[:, 0], which[:, 1]] = of_first
        if others:
            cheaper = np.argsort(of_first.max(axis=0), kind="stable")[: -(-len(which) // 2)]
            which, of_first = which[cheaper], of_first[:, cheaper]
            of_others = measured(others, share, 1 - share)
            lost[:, which[:, 0], which[:, 1]] = (of_first + len(others) * of_others) / (1 + len(others))
    return lost[0], lost[1]


def measure_windows(
    llm: AdaSkipLlama,
    pieces: Sequence[Sequence[int]],
    *,
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> Windows | None:
    """Return the divergence if the last attentions look back at an eighth of a prompt, for several numbers of them.

    The share decides, so short prompts suffice (docs/dev/method.md). In pieces below :data:`SHORTEST` tokens a window
    seems to lose nothing. None without longer ones, or if no attention can look back at a window.
    """
    layers = tuple(row.layer for row in llm.sublayers if row.windowable)
    pieces = [piece for piece in pieces if len(piece) >= SHORTEST]
    if not layers or not pieces:
        return None
    numbers = sorted({math.ceil(len(layers) * i / N_DEPTHS) for i in range(N_DEPTHS + 1)})
    size = max(min(map(len, pieces)) // 8, 1)
    none, divergence = SkipSet.none(llm.n_layer), [0.0]
    with set_aside(llm):
        judge = Judge(llm, [each for each in _probes(llm, pieces) if each.kind == "continuation"])
        for n in numbers[1:]:
            bulk = Bulk(none, windowed=layers[len(layers) - n :], window_size=size)
            divergence.append(_mean(judge.probes, judge(SkipPlan(none, none, bulk=bulk)), "continuation"))
            on_progress(n / numbers[-1])
    steady = np.maximum.accumulate(divergence)
    return Windows(layers, tuple(np.interp(range(len(layers) + 1), numbers, steady).tolist()))


def _probes(llm: AdaSkipLlama, pieces: Sequence[Sequence[int]]) -> list[Probe]:
    found = []
    for i, piece in enumerate(pieces):
        n = max(min(N_ANSWER, len(piece) // 4), 2)
        found += probes_of(llm, str(i), piece, (len(piece) - n,), n_continued=n, n_copied=n)
    return found


def _mean(probes: Sequence[Probe], scores: Sequence[Scores], kind: ProbeKind) -> float:
    """Return the mean divergence over tokens of one kind of answer; of all kinds if no piece is long enough for it."""
    of_kind = [each.divergence for probe, each in zip(probes, scores, strict=True) if probe.kind == kind]
    return float(np.concatenate(of_kind or [each.divergence for each in scores]).mean())
