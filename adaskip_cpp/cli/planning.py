"""Options that choose a plan, for all verbs, and :func:`find_plan_source`, which finds the plan that they choose."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ..engine.llama import AdaSkipLlama
from ..engine.settings import cost_settings
from ..errors import AdaSkipError
from ..measuring.running import Running, open_quietly
from ..model.frontier import DEFAULT_LOSS, Frontier
from ..model.identity import check_model, plan_path, profile_path
from ..model.mode import MODES
from ..model.plan import DEFAULT_HEAD, DEFAULT_TAIL, SkipPlan
from ..model.plan_file import PlanFile, load_plan, plan_beside
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.profile import Profile
from ..planning.request import DEFAULT_N_SKIP, PlanRequest
from ..planning.strategies import STRATEGIES, make_plan
from .report import skipped_words
from .terminal import CHOOSING, console, made_of, option, options

_Command = TypeVar("_Command", bound=Callable[..., Any])

CHOOSERS = [name for name in STRATEGIES if name != "manual"]
"""The strategies that choose sublayers themselves."""


@dataclass(frozen=True)
class PlanSource:
    """The source of the plan: a profile with a request, or a plan file; neither of them means the whole model.

    ``note``, if there is one, tells the user which source was chosen.
    """

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
        """Whether the request is a speed-up: its plan depends on the length of the prompt."""
        return self.request is not None and self.request.speedup is not None

    def plan(self, context: int) -> SkipPlan | None:
        """Return the plan for a prompt of ``context`` tokens; None for the whole model, or if a frontier chooses."""
        if self.profile is not None and self.request is not None:
            return make_plan(self.profile, self.request.at(context))
        plan = None if self.file is None else self.file.plan
        return None if plan is None or plan.is_whole else plan

    def open(self, model: str, n_ctx: int, running: Running, context: int, seed: int | None) -> AdaSkipLlama:
        """Open a model with this plan, for prompts of ``context`` tokens.

        Print which source was chosen. Warn if its times were measured with settings other than the model's.
        """
        promise = {} if self.frontier is None else {"max_loss": self.max_loss}
        llm = open_quietly(model, n_ctx, running, plan=self.frontier or self.plan(context), **promise)
        if seed is not None:
            llm.set_seed(seed)
        err = console(stderr=True)
        if self.note:
            err.print(self.note, style="dim", markup=False)
        cost = None if self.profile is None else self.profile.cost
        if self.asks_speedup and cost is not None and (note := cost.settings.note(cost_settings(llm))):
            err.print(note, style="yellow", markup=False, soft_wrap=True)
        return llm


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
    """Find the source of the plan: the first of these that there is.

    1. The given plan file. 2. A profile, given or beside the model, if there is a ``profile`` or a ``request``. 3. The
    plan file beside the model. 4. The whole model. ``to_be_whole`` is the option that runs the whole model instead.
    """
    profiled = profile is not None or request is not None
    if max_loss is not None and (full or profiled):
        raise click.UsageError("--max-loss chooses a plan that `tune` found; leave out the other options for plans")
    if full + profiled + (plan_file is not None) > 1:
        raise click.UsageError("--full, --plan and the options that make a plan exclude each other; give one of them")
    if full:
        return PlanSource()
    if profiled:
        found_profile, note = find_profile(model, profile)
        return PlanSource(found_profile, request or PlanRequest(), note=note)
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
            note = f"{words} ({name}). {to_be_whole} runs the whole model."
    if max_loss is not None and (found is None or found.frontier is None):
        why = f"run `adaskip-cpp tune {model}`" if found is None else "this file has one plan, so leave it out"
        raise click.UsageError(f"--max-loss chooses from the plans that `tune` found; {why}")
    return PlanSource(file=found, max_loss=max_loss, note=note)


def find_profile(model: str, path: str | None) -> tuple[Profile, str]:
    """Return the given profile, or the one beside the model with a note that names it."""
    if path is not None:
        return load_profile(model, path), ""
    beside = profile_path(model)
    if not os.path.exists(beside):
        raise click.UsageError("a plan is made from a profile; give --profile, or run `adaskip-cpp calibrate`")
    return load_profile(model, beside), f"The profile is {beside}."


def load_profile(model: str, path: str) -> Profile:
    profile = Profile.load(path)
    check_model(profile.model, model, path)
    return profile


def _request(**given: Any) -> PlanRequest | None:
    chosen = {name: value for name, value in given.items() if value is not None}
    if not chosen:
        return None
    if "n_skip" in chosen and "speedup" in chosen:
        raise click.UsageError("give either --skip or --speedup")
    return PlanRequest(**chosen)


def _choosing(name: str, kind: Any, words: str, default: object = None) -> Callable[[_Command], _Command]:
    """Return an option that is None if it is not given. Its help shows ``default``, which None stands for."""
    told = words if default is None else f"{words}  [default: {default}]"
    return option(name, group=CHOOSING, type=kind, help=told)


_OPTIONS = {
    "n_skip": option("--skip", "n_skip", type=click.IntRange(min=0),
                     help=f"Sublayers to skip.  [default: {DEFAULT_N_SKIP}]"),
    "speedup": option("--speedup", type=click.FloatRange(min=1), help="Instead of --skip: skip enough for this "
                      "speed-up of the first token (with --mode decode of the others), as predicted from the times in "
                      "the profile. 1.5: 1.5 times as fast."),
    "mode": _choosing("--mode", click.Choice(MODES), "Phases that skip. prompt: the bulk, which is a prompt without "
                      "its head and tail. prefill: the whole prompt and decode skip the same sublayers. decode: only "
                      "decode. e2e: as prefill. decode and e2e add FFNs after 20 tokens of each answer.", "prompt"),
    "head": _choosing("--head", click.IntRange(0), "Tokens at a prompt's beginning that skip nothing.", DEFAULT_HEAD),
    "tail": _choosing("--tail", click.IntRange(1), "Tokens at a prompt's end that skip nothing.", DEFAULT_TAIL),
    "windowed": _choosing("--windowed", click.IntRange(0),
                          "Number of attentions with a window in the bulk, an eighth of the prompt; the last layers'.",
                          "the best number for --speedup, else 0"),
    "strategy": _choosing("--strategy", click.Choice(CHOOSERS), "How to choose sublayers.", "adaskip"),
    "compensation": _choosing("--compensation", click.Choice(list(COMPENSATIONS)), "What replaces the output of a "
                              "skipped sublayer. none: its input. paper: the input times the paper's norm ratio. "
                              "median: the input times the median ratio. affine: median plus the mean error. linear: "
                              "affine plus a low-rank map of the input.",
                              f"{DEFAULT_COMPENSATION}; none with --strategy suffix"),
}  # fmt: skip
"""The options by the field of PlanRequest that each sets, in the order of the help; None if not given."""

plan_options = options(*_OPTIONS.values(), made_of(_request, "request", *_OPTIONS))
"""The options that describe a plan; the command gets them as ``request``, or None if none is given."""

plan_file_option = option("--plan", "plan_file", group=CHOOSING, metavar="PLAN", help="Plan file to use, written by "
                          "`tune` or `plan -o`.  [default: X.adaskip-plan.json beside MODEL, X.gguf]")  # fmt: skip

max_loss_option = option("--max-loss", type=click.FloatRange(min=0), help="The promise: use the fastest plan of `tune` "
                         "that adds at most this loss, in nats per token. With 0.05, the perplexity grows by at most "
                         f"5%.  [default: {DEFAULT_LOSS}]")  # fmt: skip

source_options = options(
    option("--profile", metavar="PROFILE", help="Profile of this model, written by `calibrate`, to make a plan from.  "
           "[default for --skip, --speedup and the like: X.adaskip.json beside MODEL, X.gguf]"),
    plan_file_option,
    max_loss_option,
    option("--full", group=CHOOSING, is_flag=True, help="Run the whole model, even if a plan file lies beside it."),
    plan_options,
    made_of(find_plan_source, "source", "profile", "plan_file", "max_loss", "full", "request", kept="model"),
)  # fmt: skip
"""The options that choose the plan of MODEL; the command gets them as ``source``, a :class:`PlanSource`."""
