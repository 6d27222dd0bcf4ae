"""The options that choose a plan, the same for every verb, and the plan that they choose."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from rich.console import Console

from ..engine.llama import AdaSkipLlama
from ..engine.settings import cost_settings
from ..errors import AdaSkipError
from ..model.frontier import DEFAULT_LOSS, Frontier
from ..model.identity import check_model, plan_path, profile_path
from ..model.mode import MODES
from ..model.plan import DEFAULT_HEAD, DEFAULT_TAIL, TIMED, SkipPlan
from ..model.plan_file import PlanFile, load_plan, plan_beside
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.profile import Profile
from ..planning.request import DEFAULT_N_SKIP, PlanRequest
from ..planning.strategies import STRATEGIES, make_plan
from .lists import LAYERS
from .report import skipped_words
from .terminal import CHOOSING, made_of, option, options

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class PlanSource:
    """Where the plan comes from: a profile and a request, a plan file, or none of them for the whole model."""

    profile: Profile | None = None
    request: PlanRequest | None = None
    file: PlanFile | None = None
    max_loss: float | None = None
    note: str = ""

    @property
    def frontier(self) -> Frontier | None:
        return None if self.file is None else self.file.frontier

    @property
    def asks_speedup(self) -> bool:
        """Whether a speed-up is asked for, which depends on the prompt and on the times of the profile."""
        return self.request is not None and self.request.speedup is not None

    def plan(self, context: int) -> SkipPlan | None:
        """Return the plan for a prompt of so many tokens; None for the whole model, and where a frontier chooses."""
        if self.profile is not None and self.request is not None:
            return make_plan(self.profile, self.request.at(context))
        plan = None if self.file is None else self.file.plan
        return None if plan is None or plan.is_whole else plan

    def opening(self, context: int) -> dict[str, Any]:
        """Return the arguments that open a model with what is asked for, for prompts of so many tokens."""
        if self.frontier is not None:
            return {"plan": self.frontier, "max_loss": self.max_loss}
        return {"plan": self.plan(context)}

    def tell(self, err: Console, llm: AdaSkipLlama) -> None:
        """Say which plan it is, and where a speed-up is predicted from times of other settings than the model's."""
        if self.note:
            err.print(self.note, style="dim", markup=False)
        cost = None if self.profile is None else self.profile.cost
        if self.asks_speedup and cost is not None and (note := cost.settings.note(cost_settings(llm))):
            err.print(note, style="yellow", markup=False, soft_wrap=True)


def find_plan_source(
    model: str,
    *,
    profile: str | None = None,
    plan_file: str | None = None,
    max_loss: float | None = None,
    full: bool = False,
    request: PlanRequest | None = None,
    to_be_whole: str = "--full",
) -> PlanSource:
    """Find out what plan is asked for.

    That is the plan file named; or what a profile gives, named or beside the model; or else the plan file beside the
    model, or the whole model without one. ``to_be_whole`` is the option by which one gets that all the same.
    """
    profiled = profile is not None or request is not None
    if max_loss is not None and (full or profiled):
        raise click.UsageError("--max-loss chooses from what `tune` found; leave out what else to skip")
    if full + profiled + (plan_file is not None) > 1:
        raise click.UsageError("--full, --plan and all others that say what to skip exclude each other; give one")
    if full:
        return PlanSource()
    if profiled:
        path = profile or profile_path(model)
        if profile is None and not os.path.exists(path):
            raise click.UsageError("what to skip needs --profile; write one with `adaskip-cpp calibrate`")
        note = f"The profile is {path}." if profile is None else ""
        return PlanSource(load_profile(model, path), request or PlanRequest(), note=note)
    found, note = None, ""
    if plan_file is not None:
        found = load_plan(plan_file, model=model)
    elif os.path.exists(plan_path(model)):
        try:
            found = plan_beside(model)
        except AdaSkipError as error:
            return PlanSource(note=f"The whole model runs: {error}")
        name, limit = os.path.basename(plan_path(model)), DEFAULT_LOSS if max_loss is None else max_loss
        if all(plan.is_whole for plan in found.plans):
            note = f"The whole model runs: {name} skips nothing."
        else:
            words = f"Plans lose at most {limit:g} nats per token" if found.plan is None else skipped_words(found.plan)
            note = f"{words}: {name}; {to_be_whole} runs the whole model."
    if max_loss is not None and (found is None or found.frontier is None):
        why = f"; run `adaskip-cpp tune {model}`" if found is None else ", and this plan file has one plan alone"
        raise click.UsageError(f"--max-loss chooses from what `tune` found{why}")
    return PlanSource(file=found, max_loss=max_loss, note=note)


def load_profile(model: str, path: str) -> Profile:
    profile = Profile.load(path)
    check_model(profile.model, model, path)
    return profile


def _request(**given: Any) -> PlanRequest | None:
    chosen = {name: value for name, value in given.items() if value is not None}
    if not chosen:
        return None
    by_hand = not chosen.keys().isdisjoint(("attention", "ffn"))
    if by_hand + ("n_skip" in chosen) + ("speedup" in chosen) > 1:
        raise click.UsageError("give either --skip or --speedup, or list what to skip with --attention and --ffn")
    if by_hand and chosen.get("strategy", "manual") != "manual":
        raise click.UsageError("--attention and --ffn list what to skip; leave out --strategy")
    if chosen.get("strategy") == "manual" and not by_hand:
        raise click.UsageError("--strategy manual needs --attention or --ffn")
    if "online" in chosen and MODES[chosen.get("mode", "prompt")].in_bulk and not chosen.get("decode"):
        raise click.UsageError("--no-online is about decode, which runs whole; give --decode or --mode too")
    return PlanRequest(**{**chosen, "strategy": "manual"} if by_hand else chosen)


def _choosing(name: str, kind: Any, words: str, default: object = None) -> Callable[[_Command], _Command]:
    """Return an option that is None where it is not given; its help says what ``default`` that stands for."""
    told = words if default is None else f"{words}  [default: {default}]"
    return option(name, group=CHOOSING, type=kind, help=told)


_OPTIONS = {
    "n_skip": option(
        "--skip", "n_skip", type=click.IntRange(min=0), help=f"Sublayers to skip.  [default: {DEFAULT_N_SKIP}]"
    ),
    "speedup": option(
        "--speedup",
        type=click.FloatRange(min=1),
        help="Instead: skip as much as this speed-up takes, as predicted for the machine that calibrated.",
    ),
    "phase": _choosing(
        "--phase", click.Choice(TIMED), "The phase that --speedup is about.", "prefill, with --mode decode decode"
    ),
    "mode": _choosing(
        "--mode",
        click.Choice(MODES),
        "prompt: just while nobody reads, in the bulk of a prompt. prefill: the same sublayers in both phases. decode: "
        "none while the prompt is read. e2e: as prefill, and each answer adds FFNs after its first 20 tokens.",
        "prompt",
    ),
    "decode": _choosing("--decode", click.IntRange(0), "With --mode prompt: sublayers to skip in decode.", 0),
    "head": _choosing("--head", click.IntRange(0), "Tokens that begin a prompt and are no bulk.", DEFAULT_HEAD),
    "tail": _choosing("--tail", click.IntRange(1), "Tokens that end a prompt and are no bulk.", DEFAULT_TAIL),
    "windowed": _choosing(
        "--windowed",
        click.IntRange(0),
        "Attentions, the model's last, that look back at a window in the bulk.",
        "what --speedup is best reached with, else 0",
    ),
    "window_size": _choosing("--window-size", click.IntRange(1), "Tokens of that window.", "an eighth of the prompt"),
    "strategy": _choosing("--strategy", click.Choice(list(STRATEGIES)), "How to choose sublayers.", "adaskip"),
    "attention": _choosing("--attention", LAYERS, "Skip just these attentions, as 1,5-7, and --ffn."),
    "ffn": _choosing("--ffn", LAYERS, "Skip just these FFNs, and --attention."),
    "compensation": _choosing(
        "--compensation",
        click.Choice(list(COMPENSATIONS)),
        "What stands in for a skipped sublayer: its input (none), that times the paper's norm ratio or the median "
        "ratio, the latter plus a mean error vector (affine), or plus a linear map of low rank (linear).",
        f"{DEFAULT_COMPENSATION}, with --strategy suffix none",
    ),
    "online": option(
        "--no-online", "online", group=CHOOSING, flag_value=False, default=None, help="Add no FFNs in decode."
    ),
}
"""The options by the parameter that each sets, in the order of the help; all are None where not given."""

plan_options = options(*_OPTIONS.values(), made_of(_request, "request", *_OPTIONS))
"""The options that say what to skip; the command gets them as ``request``, None without any."""

plan_file_option = option(
    "--plan",
    "plan_file",
    group=CHOOSING,
    metavar="PLAN",
    help="A plan file to use, written by `tune` or `plan -o`.  [default: the one beside MODEL, "
    "X.adaskip-plan.json for X.gguf, if there is one]",
)

max_loss_option = option(
    "--max-loss",
    type=click.FloatRange(min=0),
    help="Take the fastest plan that `tune` found to lose at most so much, in nats per token; 0.05 lets the "
    f"perplexity grow by 5%.  [default: {DEFAULT_LOSS}]",
)

source_options = options(
    option(
        "--profile",
        metavar="PROFILE",
        help="Profile of this model, written by `calibrate`, to make a plan from.  [default where the options say what "
        "to skip: the one beside MODEL, X.adaskip.json for X.gguf]",
    ),
    plan_file_option,
    max_loss_option,
    option("--full", group=CHOOSING, is_flag=True, help="Run the whole model, whatever plan lies beside it."),
    plan_options,
    made_of(find_plan_source, "source", "profile", "plan_file", "max_loss", "full", "request", kept="model"),
)
"""The options that say where the plan of MODEL comes from; the command gets them as ``source``."""
