"""Options that choose a plan, for all verbs, and :func:`find_plan_source`, which finds the plan that they choose."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ..engine.llama import AdaSkipLlama
from ..errors import AdaSkipError
from ..measuring.running import Running, open_quietly
from ..model.frontier import DEFAULT_LOSS, Frontier
from ..model.identity import plan_path
from ..model.mode import MODES
from ..model.plan import DEFAULT_HEAD, DEFAULT_TAIL, SkipPlan
from ..model.plan_file import PlanFile, load_plan, plan_beside
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.request import DEFAULT_N_SKIP, PlanRequest
from ..planning.strategies import STRATEGIES
from .report import skipped_words
from .terminal import CHOOSING, console, made_of, option, options

_Command = TypeVar("_Command", bound=Callable[..., Any])

CHOOSERS = [name for name in STRATEGIES if name != "manual"]
"""The strategies that choose sublayers themselves."""


@dataclass(frozen=True)
class PlanSource:
    """The source of the plan: a plan file, or None for the whole model.

    ``note``, if there is one, tells the user which source was chosen.
    """

    file: PlanFile | None = None
    max_loss: float | None = None
    note: str = ""

    @property
    def frontier(self) -> Frontier | None:
        return None if self.file is None else self.file.frontier

    @property
    def plan(self) -> SkipPlan | None:
        """The one plan; None for the whole model, or if a frontier chooses for each prompt."""
        plan = None if self.file is None else self.file.plan
        return None if plan is None or plan.is_whole else plan

    def open(self, model: str, n_ctx: int, running: Running, seed: int | None) -> AdaSkipLlama:
        """Open a model with this plan, and print which source was chosen."""
        promise = {} if self.frontier is None else {"max_loss": self.max_loss}
        llm = open_quietly(model, n_ctx, running, plan=self.frontier or self.plan, **promise)
        if seed is not None:
            llm.set_seed(seed)
        if self.note:
            console(stderr=True).print(self.note, style="dim", markup=False)
        return llm


def find_plan_source(
    model: str,
    *,
    plan_file: str | None = None,
    max_loss: float | None = None,
    full: bool = False,
    to_be_whole: str = "--full",
) -> PlanSource:
    """Find the source of the plan: the given plan file, or the one beside the model, or else the whole model.

    ``to_be_whole`` is the option that runs the whole model instead.
    """
    if full and (plan_file is not None or max_loss is not None):
        raise click.UsageError("--full runs the whole model; leave out --plan and --max-loss, or --full")
    if full:
        return PlanSource()
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
    return PlanSource(found, max_loss, note)


def _request(**given: Any) -> PlanRequest:
    chosen = {name: value for name, value in given.items() if value is not None}
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
                          0),
    "strategy": _choosing("--strategy", click.Choice(CHOOSERS), "How to choose sublayers.", "adaskip"),
    "compensation": _choosing("--compensation", click.Choice(list(COMPENSATIONS)), "What replaces the output of a "
                              "skipped sublayer. none: its input. paper: the input times the paper's norm ratio. "
                              "median: the input times the median ratio. affine: median plus the mean error. linear: "
                              "affine plus a low-rank map of the input.",
                              DEFAULT_COMPENSATION),
}  # fmt: skip
"""The options by the field of PlanRequest that each sets, in the order of the help; None if not given."""

plan_options = options(*_OPTIONS.values(), made_of(_request, "request", *_OPTIONS))
"""The options that describe a plan; the command gets them as ``request``."""

plan_file_option = option("--plan", "plan_file", group=CHOOSING, metavar="PLAN", help="Plan file to use, written by "
                          "`tune` or `plan -o`.  [default: X.adaskip-plan.json beside MODEL, X.gguf]")  # fmt: skip

max_loss_option = option("--max-loss", type=click.FloatRange(min=0), help="The promise: use the fastest plan of `tune` "
                         "that adds at most this loss, in nats per token. With 0.05, the perplexity grows by at most "
                         f"5%.  [default: {DEFAULT_LOSS}]")  # fmt: skip

source_options = options(
    plan_file_option,
    max_loss_option,
    option("--full", group=CHOOSING, is_flag=True, help="Run the whole model, even if a plan file lies beside it."),
    made_of(find_plan_source, "source", "plan_file", "max_loss", "full", kept="model"),
)
"""The options that choose the plan of MODEL; the command gets them as ``source``, a :class:`PlanSource`."""
