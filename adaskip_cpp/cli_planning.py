"""The options that choose a plan, the same for every verb, and the plan that they choose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from .plan import MODES, Mode, SkipPlan
from .strategies import DEFAULT_N_SKIP, STRATEGIES

if TYPE_CHECKING:
    from .profile import Profile
    from .speedup import Phase

__all__ = ["PlanChoice", "plan_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class PlanChoice:
    """What the options of the command line say about the plan; the defaults are those of no option at all.

    Attributes:
        n_skip: sublayers to skip; None for the default, or with a speed-up.
        speedup: predicted speed-up asked for; None for a number of sublayers.
        phase: the phase that the speed-up is asked of; None for the one that the mode speeds up first.
        mode: ``"prefill"``, ``"decode"`` or ``"e2e"``.
        strategy: name of a strategy, ``"manual"`` for the layers below.
        attention: layers whose attention is skipped, of strategy ``"manual"``.
        ffn: layers whose FFN is skipped, likewise.
        compensation: name of a compensation.
        online: whether FFNs are added in decode.
    """

    n_skip: int | None = None
    speedup: float | None = None
    phase: Phase | None = None
    mode: Mode = "e2e"
    strategy: str = "adaskip"
    attention: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()
    compensation: str = DEFAULT_COMPENSATION
    online: bool = True

    def plan(self, profile: Profile, context: int) -> SkipPlan:
        """Make the plan.

        Args:
            profile: of the model.
            context: tokens of the prompt that a speed-up is predicted for.

        Raises:
            AdaSkipError: the profile cannot give such a plan.
        """
        return profile.plan(
            self.n_skip,
            self.compensation,
            mode=self.mode,
            strategy=self.strategy,
            speedup=self.speedup,
            context=None if self.speedup is None else context,
            phase=None if self.speedup is None else self.phase,
            online=self.online,
            attention=self.attention,
            ffn=self.ffn,
        )


def plan_options(command: _Command) -> _Command:
    """Add the options that choose a plan, passed as ``choice``, a :class:`PlanChoice`; None if none was given."""

    @functools.wraps(command)
    def with_choice(*args: Any, **values: Any) -> Any:
        given = {name: values.pop(name) for name in _OPTIONS}
        return command(*args, choice=_choice(given), **values)

    decorated: Any = with_choice
    for option in reversed(_OPTIONS.values()):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def _choice(given: dict[str, Any]) -> PlanChoice | None:
    chosen = {name: value for name, value in given.items() if value is not None}
    if not chosen:
        return None
    context = click.get_current_context()
    by_hand = "attention" in chosen or "ffn" in chosen
    if "n_skip" in chosen and "speedup" in chosen:
        raise click.UsageError("give either --skip or --speedup", context)
    if by_hand and (chosen.get("strategy", "manual") != "manual" or "n_skip" in chosen or "speedup" in chosen):
        raise click.UsageError(
            "--attention and --ffn list what to skip; leave out --skip, --speedup, --strategy", context
        )
    if chosen.get("strategy") == "manual" and not by_hand:
        raise click.UsageError("--strategy manual needs --attention or --ffn", context)
    if by_hand:
        chosen["strategy"] = "manual"
    return PlanChoice(**chosen)


def _layers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(layer) for layer in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of layers such as 1,5,7") from None


_OPTIONS = {
    "n_skip": click.option(
        "--skip", "n_skip", type=click.IntRange(min=0), help=f"Sublayers to skip.  [default: {DEFAULT_N_SKIP}]"
    ),
    "speedup": click.option(
        "--speedup",
        type=click.FloatRange(min=1),
        help="Instead: skip as much as this speed-up takes, as predicted for the machine that calibrated.",
    ),
    "phase": click.option(
        "--phase",
        type=click.Choice(["prefill", "decode"]),
        help="The phase that --speedup is about.  [default: prefill, with --mode decode decode]",
    ),
    "mode": click.option(
        "--mode",
        type=click.Choice(MODES),
        help="prefill: the same sublayers in both phases. decode: none while the prompt is read. e2e: as prefill, and "
        "each answer adds FFNs after its first 20 tokens.  [default: e2e]",
    ),
    "strategy": click.option(
        "--strategy", type=click.Choice(list(STRATEGIES)), help="How to choose sublayers.  [default: adaskip]"
    ),
    "attention": click.option(
        "--attention", metavar="LAYERS", callback=_layers, help="Skip just these attentions, as 1,5,7, and --ffn."
    ),
    "ffn": click.option("--ffn", metavar="LAYERS", callback=_layers, help="Skip just these FFNs, and --attention."),
    "compensation": click.option(
        "--compensation",
        type=click.Choice(list(COMPENSATIONS)),
        help="What stands in for a skipped sublayer: its input (none), that times the paper's norm ratio or the median "
        f"ratio, or the latter plus a mean error vector (affine).  [default: {DEFAULT_COMPENSATION}]",
    ),
    "online": click.option("--no-online", "online", flag_value=False, default=None, help="Add no FFNs in decode."),
}
"""The options by the parameter that each sets, in the order of the help; all are None where not given."""
