"""The options that choose a plan, the same for every verb, and the plan that they choose."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..engine.auto import check_model, profile_path
from ..errors import AdaSkipError
from ..model.plan import MODES, PHASES, SkipPlan
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.request import DEFAULT_N_SKIP, PlanRequest
from ..planning.strategies import STRATEGIES, make_plan
from .lists import LAYERS

if TYPE_CHECKING:
    from ..planning.profile import Profile

__all__ = ["Chosen", "choose", "plan_options", "profile_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


def plan_options(command: _Command) -> _Command:
    """Add the options that choose a plan, passed as ``request``; None if none was given."""

    @functools.wraps(command)
    def with_request(*args: Any, **values: Any) -> Any:
        given = {name: values.pop(name) for name in _OPTIONS}
        return command(*args, request=_request(given), **values)

    decorated: Any = with_request
    for option in reversed(_OPTIONS.values()):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def profile_options(command: _Command) -> _Command:
    """Add the options that say where a plan comes from: ``profile_path`` and ``full``, for :func:`choose`."""
    command = click.option("--full", is_flag=True, help="Run the whole model, whatever profile lies beside it.")(
        command
    )
    return click.option(
        "--profile",
        "profile_path",
        metavar="PROFILE",
        help="Profile of this model, written by `calibrate` or `tune`.  [default: the one beside MODEL, X.adaskip.json "
        "for X.gguf, if there is one]",
    )(command)


@dataclass(frozen=True)
class Chosen:
    """Where the plan comes from.

    Attributes:
        profile: the profile, or None without one.
        request: what makes the plan from it; None for the tuned plan of the profile, or the whole model without one.
        note: what to tell the user of a profile that was not asked for; "" for nothing.
    """

    profile: Profile | None
    request: PlanRequest | None
    note: str = ""

    def plan(self, context: int) -> SkipPlan | None:
        """Make the plan; None for the whole model.

        Args:
            context: tokens of the prompt that a speed-up is predicted for.

        Raises:
            AdaSkipError: the profile cannot give such a plan.
        """
        if self.profile is None:
            return None
        if self.request is not None:
            return make_plan(self.profile, self.request.at(context))
        tuned = self.profile.tuned
        return None if tuned is None or tuned.n_skip == 0 else tuned.plan(self.profile)


def choose(model: str, profile_path_: str | None, request: PlanRequest | None, full: bool) -> Chosen:
    """Find the profile to use and what to make of it.

    A profile that is named, or without one the one beside the model, gives the plan that is asked for; if none is, its
    tuned plan, and without that one the default plan of a profile that is named, and none of one that is not.

    Raises:
        ProfileError: the profile cannot be read, or is of another model.
        click.UsageError: the options contradict each other, or there is no profile.
    """
    from ..planning.profile import Profile

    if full:
        if profile_path_ is not None or request is not None:
            raise click.UsageError("--full skips nothing; leave out what to skip", click.get_current_context())
        return Chosen(None, None)
    if profile_path_ is not None:
        profile = Profile.load(profile_path_)
        check_model(profile, model, profile_path_)
        return Chosen(profile, request if request or profile.tuned else PlanRequest())
    beside = profile_path(model)
    if not os.path.exists(beside):
        if request is not None:
            raise click.UsageError(
                "what to skip needs --profile; write one with `adaskip-cpp calibrate`", click.get_current_context()
            )
        return Chosen(None, None)
    try:
        profile = Profile.load(beside)
        check_model(profile, model, beside)
    except AdaSkipError as error:
        if request is not None:
            raise
        return Chosen(None, None, f"The whole model runs: {error}")
    if request is not None:
        return Chosen(profile, request, f"The profile is {beside}.")
    if profile.tuned is None:
        return Chosen(profile, None)
    return Chosen(
        profile,
        None,
        f"{profile.tuned.n_skip} of {2 * profile.n_layer} sublayers are skipped, as tuned for {profile.tuned.promise}: "
        f"{os.path.basename(beside)}; --full runs the whole model."
        if profile.tuned.n_skip
        else f"The whole model runs, as tuned for {profile.tuned.promise}: {os.path.basename(beside)}.",
    )


def _request(given: dict[str, Any]) -> PlanRequest | None:
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
    return PlanRequest(**chosen)


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
        type=click.Choice(PHASES),
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
        "--attention", metavar="LAYERS", type=LAYERS, help="Skip just these attentions, as 1,5-7, and --ffn."
    ),
    "ffn": click.option("--ffn", metavar="LAYERS", type=LAYERS, help="Skip just these FFNs, and --attention."),
    "compensation": click.option(
        "--compensation",
        type=click.Choice(list(COMPENSATIONS)),
        help="What stands in for a skipped sublayer: its input (none), that times the paper's norm ratio or the median "
        "ratio, the latter plus a mean error vector (affine), or plus a linear map of low rank (linear).  "
        f"[default: {DEFAULT_COMPENSATION}]",
    ),
    "online": click.option("--no-online", "online", flag_value=False, default=None, help="Add no FFNs in decode."),
}
"""The options by the parameter that each sets, in the order of the help; all are None where not given."""
