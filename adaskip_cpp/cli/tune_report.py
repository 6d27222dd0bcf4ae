"""What is said of a tuned plan: what was promised, what was measured, on how much text, and whether that keeps it."""

import numpy as np
import numpy.typing as npt
from rich.console import Console

from ..intervals import Interval
from ..model.plan_file import PlanFile
from ..model.promise import Tuning
from ..pictures.heatmap import print_heatmap
from .report import layer_list


def print_found(out: Console, found: PlanFile, similarity: npt.NDArray[np.float64]) -> None:
    in_prompt, tuning = found.plan.mode == "prompt", found.tuning
    skipped = found.plan.skipped("bulk" if in_prompt else "decode")
    assert tuning is not None
    if skipped.n_skip:
        count = f"{skipped.n_skip} of {2 * skipped.n_layer} sublayers"
        where = " in the bulk of prompts" if in_prompt else ""
        out.print(f"[bold]{count} are skipped{where}[/], mode {found.plan.mode}:\n")
        print_heatmap(out, similarity, skipped.skip)
        out.print(f"\nattention skipped in layers: {layer_list(skipped.attention)}")
        out.print(f"FFN skipped in layers: {layer_list(skipped.ffn)}\n")
    print_tuning(out, tuning)
    if found.plan.online is not None and found.plan.mode not in ("prompt", "decode"):
        out.print("FFNs that answers add online are not covered by these figures.")


def print_tuning(out: Console, tuning: Tuning) -> None:
    out.print(f"Promised: {tuning.promise}.")
    if tuning.n_texts == 0:
        if tuning.passkeys is None:
            out.print("[bold]No skipping keeps this promise, so the model is left whole.[/]")
            return
        # Something kept it until pass keys were asked for.
        out.print("[bold]What keeps this promise loses a pass key that the full model finds, so that is left whole.[/]")
        out.print("It may be one that the full model just finds: --allow-lost-passkeys takes the plan all the same.")
        return
    settings, is_speed = tuning.settings, tuning.promise.kind == "speedup"
    decided = "that decided nothing" if tuning.unbiased else "that calibration and the search did not see"
    out.print(
        f"Measured on {tuning.n_texts} texts of {settings.get('tokens_per_text')} tokens {decided} "
        f"({settings.get('reported_on')}), mean and 95% interval:"
    )
    out.print(f"  added loss   {_figure(tuning.loss, '.3f')} nats per token")
    out.print(f"  agreement    {_figure(tuning.agreement, '.3f')} of the full model's choices")
    if tuning.divergence is not None:
        out.print(f"  divergence   {_figure(tuning.divergence, '.3f')} nats per token from the full model")
    if (keys := tuning.passkeys) is not None:
        lost = f", [bold]{keys.full - keys.plan} lost[/]" if keys.plan < keys.full else ""
        out.print(f"Pass keys: the full model finds {keys.full} of {keys.n} in prompts as long, the plan "
                  f"{keys.plan} of these{lost}.")  # fmt: skip
    confirmed = "" if is_speed else f"; the promise was held on: {settings.get('confirmed_on')}"
    out.print(f"The search judged by other text: {settings.get('searched_on')}{confirmed}.")
    if not tuning.unbiased:
        out.print(
            "[bold]There was too little text for a part that decides nothing[/]: sublayers were put back until these "
            "very texts kept the promise, so expect worse on others. Give more text (--text), or ask for fewer or "
            "shorter pieces (--texts, --tokens)."
        )
    elif not is_speed and tuning.kept == "no":
        out.print(
            "[bold]The promise is not kept on this text[/], though it was on the text before; promise less, or tune "
            "with more text (--texts)."
        )
    elif not is_speed and tuning.kept == "on average":
        out.print("On this text the promise is kept on average; its interval reaches beyond it.")
    for first in tuning.speedups[:1]:
        behind = f" and {first.n_decode:,} tokens behind it" if first.n_decode else ""
        out.print(
            f"Speed with a prompt of {first.context:,} tokens{behind}, "
            f"{first.ratio.n} requests of either model in turn:"
        )
    for each in tuning.speedups:
        real = "" if each.ratio.excludes(1.0) else "; no difference that is sure"
        times = "" if each.seconds is None else f", {each.seconds[1]:.3g} s instead of {each.seconds[0]:.3g} s"
        out.print(f"  {each.of:12} {_figure(each.ratio, '.2f')} times as fast{times}{real}")
    if is_speed and tuning.kept == "no":
        out.print("The promised speed-up was predicted but not measured; is the machine busy?")


def _figure(interval: Interval, form: str) -> str:
    return f"{interval.value:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
