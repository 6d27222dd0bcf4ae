"""What ``adaskip-cpp tune`` says at the end: what was promised, what was measured, and on how much text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .report import layer_list

if TYPE_CHECKING:
    from rich.console import Console

    from ..intervals import Interval
    from ..model.tuned import TunedPlan
    from ..planning.profile import Profile

__all__ = ["minutes", "print_promise", "print_tuned"]


def print_tuned(out: Console, profile: Profile, path: str, *, beside: bool) -> None:
    """Print a tuned plan.

    Args:
        out: where to print.
        profile: a profile that holds one.
        path: its file.
        beside: whether that is where generation looks for it.
    """
    from ..pictures.heatmap import print_heatmap

    tuned = profile.tuned
    assert tuned is not None
    out.print(f"Promised: {tuned.promise}.")
    if tuned.n_skip == 0:
        out.print("[bold]No skipping keeps this promise, so the model is left whole.[/]")
    else:
        out.print(f"[bold]{tuned.n_skip} of {2 * profile.n_layer} sublayers are skipped[/], mode {tuned.mode}:\n")
        plan = profile.tuned_plan()
        print_heatmap(out, profile.similarity, plan.decode.skip)
        out.print(f"\nattention skipped in layers: {layer_list(tuned.attention)}")
        out.print(f"FFN skipped in layers: {layer_list(tuned.ffn)}\n")
        _print_measured(out, tuned)
    out.print(f"\nProfile written to {path}.", soft_wrap=True)
    if tuned.n_skip:
        use = '`generate`, `chat` and AdaSkipLlama(plan="auto") use it.' if beside else f"Use it with --profile {path}."
        out.print(use, soft_wrap=True, markup=False)


def print_promise(out: Console, tuned: TunedPlan) -> None:
    """Print in a line or two what a tuned plan promised and what was measured."""
    out.print(f"Tuned for {tuned.promise}.")
    if tuned.n_skip:
        speed = (
            f"; {tuned.speedups[-1].of} {_figure(tuned.speedups[-1].ratio, '.2f')} x as fast" if tuned.speedups else ""
        )
        out.print(
            f"Measured: added loss {_figure(tuned.loss, '.3f')}, agreement {_figure(tuned.agreement, '.3f')}{speed}.\n"
        )


def _print_measured(out: Console, tuned: TunedPlan) -> None:
    settings = tuned.settings
    out.print(
        f"Measured on {tuned.n_texts} texts of {settings.get('tokens_per_text')} tokens that neither calibration nor "
        f"the search saw ({settings.get('checked_on')}), mean and 95% interval:"
    )
    out.print(f"  added loss   {_figure(tuned.loss, '.3f')} nats per token")
    out.print(f"  agreement    {_figure(tuned.agreement, '.3f')} of the full model's choices")
    out.print(f"The search judged by other text: {settings.get('searched_on')}.")
    if tuned.online:
        out.print("FFNs that answers add online are not covered by these figures.")
    if tuned.speedups:
        at = tuned.speedups[0]
        out.print(
            f"Speed with a prompt of {at.context:,} tokens and {at.n_decode:,} tokens behind it, "
            f"{at.ratio.n} requests of either model in turn:"
        )
        for each in tuned.speedups:
            real = "" if each.ratio.excludes(1.0) else "; no difference that is sure"
            out.print(f"  {each.of:12} {_figure(each.ratio, '.2f')} times as fast{real}")
        if tuned.promise.kind == "speedup" and at.ratio.n and tuned.speedups[-1].ratio.value < tuned.promise.value:
            out.print("The promised speed-up was predicted but not measured; is the machine busy?")


def _figure(interval: Interval, form: str) -> str:
    return f"{interval.value:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def minutes(seconds: float) -> str:
    """Say a time in words: ``40 s``, ``12 min``."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
