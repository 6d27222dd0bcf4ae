"""Words for the terminal about one request: the sublayers that it skipped, its speed, its KV memory."""

from collections.abc import Sequence
from itertools import groupby

from ..engine.generation import Timing
from ..engine.llama import AdaSkipLlama
from ..model import frontier
from ..model.plan import Phase, SkipPlan

PHASE_WORDS: dict[Phase, str] = {"bulk": "the bulk of a prompt", "prefill": "prefill", "decode": "decode"}


def kv_line(llm: AdaSkipLlama) -> str:
    without = f", none for {len(llm.elided_kv)} of {llm.n_layer} layers" if llm.elided_kv else ""
    return f"KV:      {megabytes(llm.kv_bytes)}{without}"


def megabytes(n_bytes: float) -> str:
    """Return ``1.5 MB``, where 1 MB is 10^6 bytes; below that kB."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:,.0f} kB"
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes < 1e8 else f"{n_bytes / 1e6:,.0f} MB"


def seconds(value: float) -> str:
    """Return a time with three digits: ``12.3 ms``, ``1.23 s`` or ``123 s``."""
    return f"{value:.3g} s" if value >= 100 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def layer_list(layers: Sequence[int]) -> str:
    """Return ``1, 5-7``, or ``none``."""
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


def first_token_line(llm: AdaSkipLlama, timing: Timing) -> str:
    """Return the time of the first token, and that without the plan if a frontier predicts a speed-up."""
    # The measured time times the predicted speed-up: the machine may be busier than when `tune` measured it.
    line, point = f"first token after {seconds(timing.first_token_s)}", llm.point(timing.n_prompt)
    if point is None or timing.n_evaluated < timing.n_prompt:
        return line
    return f"{line}; predicted without the plan: {seconds(timing.first_token_s * point.speedup(timing.n_prompt))}"


def skipped_words(plan: SkipPlan) -> str:
    phase: Phase = plan.prompt_phase if plan.skipped("bulk").n_skip or plan.narrowed else "decode"
    where = "" if phase == "prefill" else f" in {PHASE_WORDS[phase]}"
    return f"{plan.skipped(phase).n_skip} of {2 * plan.n_layer} sublayers skipped{window_words(plan)}{where}"


def window_words(plan: SkipPlan) -> str:
    """Return the number of attentions with a window, after a comma; "" for none."""
    n, bulk = len(plan.narrowed), plan.bulk
    return f", {n} attention{'s' * (n > 1)} windowed to {bulk.window_size:,} tokens" if bulk and n else ""


def skipped_counts(llm: AdaSkipLlama, n_decoded: int) -> tuple[int, int, int]:
    """Return what the last request skipped: sublayers in the bulk, sublayers in decode, FFNs that it added to these."""
    assert llm.plan is not None
    added = len(llm.online.ffn) if llm.online else 0
    return llm.plan.skipped("bulk").n_skip, llm.plan.decode_after(n_decoded).n_skip, added


def skipped_lines(llm: AdaSkipLlama, timing: Timing) -> list[str]:
    """Return what the request of ``timing`` skipped; if a frontier found no plan for it, why. [] without plans."""
    n_decoded = timing.n_generated
    if (plan := llm.plan) is None:
        if llm.frontier is None or llm.max_loss is None:
            return []
        why = f"no plan keeps the promise of {llm.max_loss:g}"
        if timing.n_prompt < frontier.LEAST_CONTEXT:
            why = f"the prompt has fewer than {frontier.LEAST_CONTEXT} tokens"
        return [f"skipped: nothing, {why}"]
    of, now = f"of {2 * plan.n_layer}", plan.decode_after(n_decoded)
    prompt, decode, added = skipped_counts(llm, n_decoded)
    of_prompt, where = plan.skipped("bulk"), PHASE_WORDS[plan.prompt_phase]
    online = f", {added} FFN added online" if added else ""
    counts = f"{len(of_prompt.attention)} attention, {len(of_prompt.ffn)} FFN"
    lines = [
        f"skipped: {prompt} {of} sublayers in {where} ({counts}){window_words(plan)}",
        f"         {decode + added} {of} in decode ({len(now.attention)} attention, {len(now.ffn)} FFN{online})",
    ]
    if (learned := llm.online) is not None and (stage := plan.online) is not None:
        found = f"no FFN added: {learned.n_tokens} of {stage.window} tokens observed"
        if learned.ffn:
            found = f"FFN of layers {layer_list(learned.ffn)} added"
        elif learned.n_tokens >= stage.window:
            found = f"no FFN added: none as similar as {stage.threshold:.4f}"
        lines.append(f"online:  {found}")
    return lines
