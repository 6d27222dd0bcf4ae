"""``adaskip-cpp tune``: find the fastest plan that keeps a promise, and write the plan file."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from ..errors import DataError
from ..files import json_text
from ..model.beside import plan_path, profile_path
from ..model.plan import MODES, Mode
from ..model.plan_file import save_plan
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.request import PlanRequest
from ..progress import told_progress
from .planning import load_profile
from .terminal import (
    CHOOSING,
    OUTPUT,
    check_output,
    console,
    json_option,
    load_model,
    model_options,
    option,
    read_text,
    verb,
)
from .tune_report import minutes, print_found

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.llama import AdaSkipLlama
    from ..model.plan import SkipPlan
    from ..model.promise import Promise, SpeedUp
    from ..planning.profile import Profile
    from ..tuning.tuner import Tuner

__all__ = ["tune"]

_SEARCHING = "Searching"

_CTX_TIMED = 8192
"""Context of the model whose sublayers are timed, as in `calibrate`."""
_N_ROUNDS = 5


@verb(
    "Find the fastest plan that keeps a promise.",
    example="adaskip-cpp tune model.gguf --max-loss 0.05 --data notes.txt --text letters.txt",
)
@click.argument("model")
@option("--max-loss", type=click.FloatRange(min=0), help="Promise: nats per token that are lost at most.")
@option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="Promise: share of the tokens that the full model would choose too, such as 0.95.",
)
@option("--speedup", type=click.FloatRange(min=1), help="Promise: times as fast; what loses least is searched.")
@option("--data", "files", multiple=True, metavar="FILE", help="Text to calibrate on; may be repeated.")
@option(
    "--text",
    "text_files",
    multiple=True,
    metavar="FILE",
    help="Other text, to judge by; may be repeated.  [default: pages that calibration leaves out]",
)
@option("--mode", group=CHOOSING, type=click.Choice(MODES), default="e2e",
        help="decode: skip nothing while a prompt is read.")  # fmt: skip
@option("--compensation", group=CHOOSING, type=click.Choice(list(COMPENSATIONS)), default=DEFAULT_COMPENSATION,
        help="What stands in for a skipped sublayer.")  # fmt: skip
@option("--online", group=CHOOSING, is_flag=True,
        help="Let answers add FFNs in decode; the promise covers them with --mode decode only.")  # fmt: skip
@option("--context", group=CHOOSING, type=click.IntRange(min=1), default=2048, help="Prompt length to be fast at.")
@option("--answer", "n_answer", group=CHOOSING, type=click.IntRange(min=1), default=128,
        help="Answer length to be fast at.")  # fmt: skip
@option("--profile", "existing", group=_SEARCHING, metavar="PROFILE",
        help="A profile of MODEL to begin with; do not calibrate.")  # fmt: skip
@option("--texts", "n_texts", group=_SEARCHING, type=click.IntRange(min=2), default=16,
        help="Pieces of text to search by; as many again confirm what was found, and as many report it.")  # fmt: skip
@option("--tokens", "n_tokens", group=_SEARCHING, type=click.IntRange(min=4), default=512, help="Tokens of each piece.")
@option("--exchange", "n_exchange", group=_SEARCHING, type=click.IntRange(min=0), default=16,
        help="Evaluations spent on swapping sublayers.")  # fmt: skip
@option("-o", "--output", group=OUTPUT, metavar="PLAN",
        help="Plan file to write.  [default: beside MODEL, *.adaskip-plan.json]")  # fmt: skip
@model_options
@json_option
def tune(
    model: str,
    max_loss: float | None,
    min_agreement: float | None,
    speedup: float | None,
    output: str | None,
    existing: str | None,
    files: tuple[str, ...],
    text_files: tuple[str, ...],
    n_texts: int,
    n_tokens: int,
    mode: Mode,
    compensation: str,
    online: bool,
    context: int,
    n_answer: int,
    n_exchange: int,
    threads: int | None,
    gpu_layers: int,
    as_json: bool,
) -> None:
    """Find the fastest plan for MODEL, a GGUF file, that keeps one promise, and write it to a plan file.

    Calibrates, searches on text that calibration did not see, confirms what it found on other text, and reports what
    it costs on yet other text, which decided nothing. A promise is held on the second text, by the 95% interval of the
    mean over its pieces; a speed-up by its measured value. `generate`, `chat` and AdaSkipLlama(plan="auto") use the
    plan file that lies beside its model.
    """
    from ..measuring import corpus
    from ..measuring.tasks import read_texts
    from ..tuning.hold_out import hold_out
    from ..tuning.tuner import Tuner

    start = time.monotonic()
    promise = _promise(max_loss, min_agreement, speedup)
    if existing is not None and files:
        raise click.UsageError("--data is what to calibrate on; leave out --profile", click.get_current_context())
    target = output or plan_path(model)
    check_output(target)
    _check_apart(files, text_files)
    texts = read_texts(text_files) if text_files else corpus.held_out()
    err = console(stderr=True)
    run = _Run(model, threads, gpu_layers, err)

    profile = load_profile(model, existing) if existing is not None else run.calibrate(files)
    with run.open(n_tokens, logits_all=True) as llm:
        held_out = hold_out(llm, texts, n_texts, n_tokens)
        progress = _Evaluations(err)
        request = PlanRequest(mode=mode, compensation=compensation, online=online)
        tuner = Tuner(
            llm, profile, promise, held_out, request,
            context=context, n_answer=n_answer, n_exchange=n_exchange, advance=progress.advance,
        )  # fmt: skip
        progress.announce(tuner)
        settings = {"calibrated_on": profile.corpus, "cpu": None if profile.cost is None else profile.cost.settings.cpu}
        found = tuner.tune(lambda plan: run.speed(tuner, plan, texts), stage=progress.shown, settings=settings)
    if existing is None:
        profile.save(_profile_beside(target))
    save_plan(target, found.plan, found.tuning)
    if as_json:
        click.echo(json_text({"path": target, "plan": found.plan.to_dict(), "tuning": found.tuning}), nl=False)
        return
    out = console()
    print_found(out, found, profile.similarity)
    out.print(f"\nPlan written to {target}.", soft_wrap=True, markup=False)
    if existing is None:
        out.print(f"Profile written to {_profile_beside(target)}.", soft_wrap=True, markup=False)
    if found.plan.skipped("decode").n_skip:
        beside = target == plan_path(model)
        use = '`generate`, `chat` and AdaSkipLlama(plan="auto") use it.' if beside else f"Use it with --plan {target}."
        out.print(use, soft_wrap=True, markup=False)
    out.print(f"It took {time.monotonic() - start:.0f} s.", style="dim")


def _promise(max_loss: float | None, min_agreement: float | None, speedup: float | None) -> Promise:
    from ..model.promise import Promise

    given = {"max_loss": max_loss, "min_agreement": min_agreement, "speedup": speedup}
    promises = [Promise(kind, value) for kind, value in given.items() if value is not None]  # type: ignore[arg-type]
    if len(promises) != 1:
        raise click.UsageError("give one of --max-loss, --min-agreement and --speedup", click.get_current_context())
    return promises[0]


def _profile_beside(target: str) -> str:
    """Where the profile of a calibration goes: ``X.adaskip.json`` for ``X.adaskip-plan.json`` and ``X.json``."""
    return profile_path(target.removesuffix(".json").removesuffix(".adaskip-plan"))


@dataclass(frozen=True)
class _Run:
    """The model's file and how to open it."""

    model: str
    threads: int | None
    gpu_layers: int
    err: Console

    @contextmanager
    def open(self, n_ctx: int, *, logits_all: bool = False) -> Iterator[AdaSkipLlama]:
        """Load the model, and free it when done."""
        llm = load_model(
            self.model, n_ctx=n_ctx, threads=self.threads, gpu_layers=self.gpu_layers, logits_all=logits_all
        )
        try:
            yield llm
        finally:
            # llama.cpp tells an error where a plan made its buffers larger than it had planned; it is none.
            with redirect_stderr(io.StringIO()):
                llm.close()

    def calibrate(self, files: Sequence[str]) -> Profile:
        from ..calibration.calibrate import calibrate
        from ..measuring import corpus

        text = "\n\n".join(read_text(file) for file in files) if files else corpus.text()
        description = ", ".join(os.path.basename(file) for file in files) if files else corpus.DESCRIPTION
        with self.open(_CTX_TIMED) as llm:
            requests = corpus.cut(llm, text, corpus.N_REQUESTS, corpus.N_TOKENS)
            self.err.print(f"Calibrating on {len(requests)} requests of {description}.", style="dim")
            return calibrate(llm, requests, description=description)

    def speed(self, tuner: Tuner, plan: SkipPlan, texts: Mapping[str, str]) -> tuple[SpeedUp, ...]:
        """Measure a plan in a context of its own."""
        from ..tuning.speed import measure_speed

        with (
            self.open(tuner.context + tuner.n_answer + 1) as llm,
            told_progress("Measuring the speed") as on_progress,
        ):
            words = llm.tokenize("\n\n".join(texts.values()).encode("utf-8", "replace"))
            prompt = (words * (tuner.context // len(words) + 1))[: tuner.context]
            return measure_speed(llm, plan, prompt, tuner.n_answer, n_rounds=_N_ROUNDS, on_progress=on_progress)


class _Evaluations:
    """Says what evaluations will cost, and shows how far they are."""

    def __init__(self, err: Console) -> None:
        self._err = err
        self._tokens = self._per_evaluation = 0
        self._on_progress: Callable[[float], None] | None = None
        self._total = 1

    def advance(self, n_tokens: int) -> None:
        self._tokens += n_tokens
        if self._on_progress is not None:
            self._on_progress(min(self._tokens / self._total, 1.0))

    def announce(self, tuner: Tuner) -> None:
        """Evaluate the full model, and tell from that what the search costs."""
        start = time.monotonic()
        with self.shown("Evaluating the full model", 1, tuner.n_tokens):
            tuner.evaluate_full()
        each = time.monotonic() - start
        self._per_evaluation = tuner.n_tokens
        n = tuner.most_evaluations
        self._err.print(
            f"The search evaluates at most {n} plans on {tuner.n_tokens:,} tokens of held-out text. One "
            f"took {each:.2g} s, so that is up to {minutes(n * each)}; what follows takes {minutes(4 * each)} or more. "
            "Ctrl-C leaves all files as they are.",
            style="dim",
        )

    @contextmanager
    def shown(self, label: str, n_evaluations: int, n_tokens: int | None = None) -> Iterator[None]:
        """Show a bar for so many evaluations."""
        self._tokens, self._total = 0, n_evaluations * (n_tokens or self._per_evaluation)
        with told_progress(label) as self._on_progress:
            yield
        self._on_progress = None


def _check_apart(files: Sequence[str], text_files: Sequence[str]) -> None:
    both = {os.path.realpath(file) for file in files} & {os.path.realpath(file) for file in text_files}
    if both:
        raise DataError(f"{min(both)!r} cannot both teach and judge; give different files to --data and --text")
