"""Options that choose a plan, for all verbs, and :func:`find_plan_source`, which finds the plan that they choose."""

import os
from dataclasses import dataclass
from typing import Any

import click

from ..engine.llama import AdaSkipLlama
from ..errors import AdaSkipError
from ..measuring.running import Running, open_quietly
from ..model.frontier import DEFAULT_LOSS, Frontier
from ..model.identity import plan_path
from ..model.plan import DEFAULT_HEAD, DEFAULT_TAIL, SkipPlan
from ..model.plan_file import PlanFile, load_plan, plan_beside
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.modes import MODES
from ..planning.request import DEFAULT_N_SKIP, PlanRequest
from ..planning.strategies import STRATEGIES
from .report import skipped_words
from .terminal import Real, made_of, option, options, skip_option, tell

CHOOSERS = [name for name in STRATEGIES if name != "manual"]  # the strategies that choose sublayers themselves


@dataclass(frozen=True)
class PlanSource:
    """The source of the plan: a plan file, or None for the whole model. ``note`` tells the user which was chosen."""

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
            tell(self.note)
        return llm


def find_plan_source(
    model: str, plan_file: str | None = None, max_loss: float | None = None, full: bool = False, opt_out: str = "--full"
) -> PlanSource:
    """Find the given plan file, or the one beside the model, if any. ``opt_out`` is the option for the whole model."""
    if full:
        if plan_file is not None or max_loss is not None:
            raise click.UsageError("--full runs the whole model; leave out --plan and --max-loss, or --full")
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
            note = f"{words} ({name}). {opt_out} runs the whole model."
    if max_loss is not None and (found is None or found.frontier is None):
        why = f"run `adaskip-cpp tune {model}`" if found is None else "this file has one plan, so leave it out"
        raise click.UsageError(f"--max-loss chooses from the plans that `tune` found; {why}")
    return PlanSource(found, max_loss, note)


def _request(**given: Any) -> PlanRequest:
    if given["n_skip"] is not None and given["speedup"] is not None:
        raise click.UsageError("give either --skip or --speedup")
    return PlanRequest(**given)


plan_options = options(
    option("--skip", "n_skip", type=click.IntRange(0), help=f"Sublayers to skip.  [default: {DEFAULT_N_SKIP}]"),
    option("--speedup", type=Real(1), help="Instead of --skip: skip enough for this speed-up of the first "
           "token (with --mode decode of the others), as predicted from the times in the profile. 1.5: 1.5 times as "
           "fast."),
    skip_option("--mode", type=click.Choice(MODES), default="prompt", help="Phases that skip. prompt: the bulk, which "
                "is a prompt without its head and tail. prefill: the whole prompt and decode skip the same sublayers. "
                "decode: only decode. e2e: as prefill. With decode and e2e, an answer skips more FFNs after its "
                "first 20 tokens."),
    skip_option("--head", type=click.IntRange(0), default=DEFAULT_HEAD,
                help="Tokens at a prompt's beginning that skip nothing."),
    skip_option("--tail", type=click.IntRange(1), default=DEFAULT_TAIL,
                help="Tokens at a prompt's end that skip nothing."),
    skip_option("--windowed", type=click.IntRange(0), default=0, help="Give the attentions of so many layers a window "
                "in the bulk, the last layers first. The window is an eighth of the prompt."),
    skip_option("--strategy", type=click.Choice(CHOOSERS), default="adaskip", help="How to choose sublayers. "
                "adaskip: single ones, by rank (see `plan`). The others skip whole layers. early_exit: the last ones. "
                "skip_decode: the first ones. unified_skipping: ones at equal distances."),
    skip_option("--compensation", type=click.Choice(list(COMPENSATIONS)), default=DEFAULT_COMPENSATION, help="What "
                "replaces the output of a skipped sublayer. none: its input. paper: the input times the paper's norm "
                "ratio. median: the input times the median ratio. affine: median plus the mean error. linear: affine "
                "plus a low-rank map of the input."),
    made_of(_request, "request", "n_skip", "speedup", "mode", "head", "tail", "windowed", "strategy", "compensation"),
)  # fmt: skip
"""The options that describe a plan; the command gets them as ``request``."""

plan_file_option = skip_option("--plan", "plan_file", metavar="PLAN", help="Plan file to use, written by `tune` or "
                               "`plan -o`.  [default: X.adaskip-plan.json beside MODEL, X.gguf]")  # fmt: skip

max_loss_option = option("--max-loss", type=Real(min=0), help="The promise: use the fastest plan of `tune` "
                         "that adds at most this loss, in nats per token, on the texts of `tune`. 0.05 is 5% more "
                         f"perplexity.  [default: {DEFAULT_LOSS}]")  # fmt: skip

source_options = options(
    plan_file_option,
    max_loss_option,
    skip_option("--full", is_flag=True, help="Run the whole model, even if a plan file lies beside it."),
    made_of(find_plan_source, "source", "plan_file", "max_loss", "full", kept="model"),
)
"""The options that choose the plan of MODEL; the command gets them as ``source``, a :class:`PlanSource`."""
