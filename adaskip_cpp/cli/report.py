"""What a request skipped, how fast it was and what memory it saved, in words."""

from collections.abc import Sequence
from itertools import groupby

from ..engine.generation import Timing
from ..engine.llama import AdaSkipLlama
from ..model.cost_model import CostModel
from ..model.frontier import Point
from ..model.plan import Phase, SkipPlan

PHASE_WORDS: dict[Phase, str] = {"bulk": "the bulk of a prompt", "prefill": "prefill", "decode": "decode"}


def kv_line(llm: AdaSkipLlama) -> str:
    """How much KV memory a model has, and how many layers have none."""
    without = f", none for {len(llm.elided_kv)} of {llm.n_layer} layers" if llm.elided_kv else ""
    return f"KV:      {megabytes(llm.kv_bytes)}{without}"


def megabytes(n_bytes: float) -> str:
    """``1.5 MB``, decimal; kB below one."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:,.0f} kB"
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e8 else f"{n_bytes / 1e6:,.0f} MB"


def layer_list(layers: Sequence[int]) -> str:
    """``1, 5-7``, or ``none``."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs) or "none"


def speed_lines(timing: Timing) -> list[str]:
    cached = timing.n_prompt - timing.n_evaluated
    speed = f"{timing.first_token_s:.2f} s, {timing.prompt_tokens_per_s:,.0f} tokens/s"
    lines = [f"prompt:  {timing.n_evaluated:,} tokens in {speed}" + (f" ({cached:,} cached)" if cached else "")]
    if timing.token_s is not None:
        decode = f"{timing.n_generated - 1:,} tokens in {timing.decode_s:.2f} s, {1 / timing.token_s:,.1f} tokens/s"
        lines.append(f"decode:  {decode}")
    return lines


def first_token_line(
    timing: Timing, plan: SkipPlan | None, cost: CostModel | None = None, point: Point | None = None
) -> str:
    """How long the first token took, and what the plan brought, as a cost model or the point of a frontier predicts.

    The prediction's ratio counts, not its seconds: the machine may be busier, or another one, than the one measured.
    """
    line = f"first token after {_seconds(timing.first_token_s)}"
    if plan is None or not (plan.skipped("bulk").n_skip or plan.narrowed):
        return line
    if cost is not None:
        times = cost.speedup(plan, timing.n_prompt, "prefill", cached=timing.n_prompt - timing.n_evaluated)
    elif point is not None and timing.n_evaluated == timing.n_prompt:
        times = point.speedup(timing.n_prompt)
    else:
        return line
    return f"{line}; {_seconds(timing.first_token_s * times)} without skipping, as predicted"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def skipped_words(plan: SkipPlan) -> str:
    """Say in a few words what a plan leaves out."""
    phase: Phase = plan.prompt_phase if plan.skipped("bulk").n_skip or plan.narrowed else "decode"
    where = "" if phase == "prefill" else f" in {PHASE_WORDS[phase]}"
    return f"{plan.skipped(phase).n_skip} of {2 * plan.n_layer} sublayers skipped{window_words(plan)}{where}"


def window_words(plan: SkipPlan) -> str:
    """Say how many attentions look back at a window, with a comma before; "" for none."""
    n, bulk = len(plan.narrowed), plan.bulk
    return f", {n} attention{'s' * (n > 1)} windowed to {bulk.window_size:,} tokens" if bulk and n else ""


def skipped_counts(llm: AdaSkipLlama, n_decoded: int) -> tuple[int, int, int]:
    """Sublayers skipped in the last request: in a prompt, or its bulk, in decode by the plan, and FFNs added."""
    assert llm.plan is not None
    added = len(llm.online.ffn) if llm.online else 0
    return llm.plan.skipped("bulk").n_skip, llm.plan.decode_after(n_decoded).n_skip, added


def skipped_lines(llm: AdaSkipLlama, n_decoded: int) -> list[str]:
    plan = llm.plan
    if plan is None:
        return []
    of, now = f"of {2 * plan.n_layer}", plan.decode_after(n_decoded)
    prompt, decode, added = skipped_counts(llm, n_decoded)
    of_prompt, where = plan.skipped("bulk"), PHASE_WORDS[plan.prompt_phase]
    online = f", {added} FFN added online" if added else ""
    counts = f"{len(of_prompt.attention)} attention, {len(of_prompt.ffn)} FFN"
    lines = [
        f"skipped: {prompt} {of} sublayers in {where} ({counts}){window_words(plan)}",
        f"         {decode + added} {of} in decode ({len(now.attention)} attention, {len(now.ffn)} FFN{online})",
    ]
    learned = llm.online
    if learned is None:
        return lines
    if learned.ffn:
        found = f"FFN of layers {layer_list(learned.ffn)} added"
    elif learned.n_tokens >= learned.window:
        found = f"no FFN added: none as similar as {learned.threshold:.4f}"
    else:
        found = f"no FFN added: {learned.n_tokens} of {learned.window} tokens observed"
    return [*lines, f"online:  {found}"]
