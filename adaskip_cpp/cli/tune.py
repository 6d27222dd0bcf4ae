"""``adaskip-cpp tune``: find the fastest plan that keeps a promise, and write the profile with that plan in it."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click
import numpy as np

from ..engine.auto import check_model, profile_path
from ..errors import BudgetError, DataError
from ..model.plan import MODES, Mode
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..progress import told_progress
from .terminal import check_output, console, json_option, load_model, model_options, read_text
from .tune_report import minutes, print_tuned

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.llama import AdaSkipLlama
    from ..model.tuned import Promise, SpeedUp
    from ..planning.profile import Profile
    from ..tuning.search import Judged
    from ..tuning.tuner import HeldOut, Tuner

__all__ = ["tune"]

_CTX_TIMED = 8192
"""Context of the model whose sublayers are timed, as in `calibrate`."""
_N_ROUNDS = 5
_N_AIMS = 3
"""A speed-up that was predicted but not measured is aimed at anew, higher, so many times at most."""


@click.command(
    short_help="Find the fastest plan that keeps a promise.",
    epilog="\b\nExample:\n  adaskip-cpp tune model.gguf --max-loss 0.05 --data notes.txt --text letters.txt",
)
@click.argument("model")
@click.option("--max-loss", type=click.FloatRange(min=0), help="Promise: nats per token that are lost at most.")
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="Promise: share of the tokens that the full model would choose too, such as 0.95.",
)
@click.option("--speedup", type=click.FloatRange(min=1), help="Promise: times as fast; what loses least is searched.")
@click.option("-o", "--output", metavar="PROFILE", help="Profile to write.  [default: beside MODEL, *.adaskip.json]")
@click.option("--profile", "existing", metavar="PROFILE", help="A profile of MODEL to begin with; do not calibrate.")
@click.option("--data", "files", multiple=True, metavar="FILE", help="Text to calibrate on; may be repeated.")
@click.option(
    "--text",
    "text_files",
    multiple=True,
    metavar="FILE",
    help="Other text, to judge by; may be repeated.  [default: pages that calibration leaves out]",
)
@click.option("--texts", "n_texts", type=click.IntRange(min=2), default=16, show_default=True,
              help="Pieces of it that the search judges by; as many again check the result.")  # fmt: skip
@click.option("--tokens", "n_tokens", type=click.IntRange(min=4), default=512, show_default=True,
              help="Tokens of each piece.")  # fmt: skip
@click.option("--mode", type=click.Choice(MODES), default="e2e", show_default=True,
              help="decode: skip nothing while a prompt is read.")  # fmt: skip
@click.option("--compensation", type=click.Choice(list(COMPENSATIONS)), default=DEFAULT_COMPENSATION, show_default=True,
              help="What stands in for a skipped sublayer.")  # fmt: skip
@click.option("--online", is_flag=True, help="Let answers add FFNs in decode. The promise does not cover them.")
@click.option("--context", type=click.IntRange(min=1), default=2048, show_default=True,
              help="Prompt length to be fast at.")  # fmt: skip
@click.option("--answer", "n_answer", type=click.IntRange(min=1), default=128, show_default=True,
              help="Answer length to be fast at.")  # fmt: skip
@click.option("--exchange", "n_exchange", type=click.IntRange(min=0), default=16, show_default=True,
              help="Evaluations spent on swapping sublayers.")  # fmt: skip
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
    """Find the fastest plan for MODEL, a GGUF file, that keeps one promise, and write a profile with it.

    Calibrates, searches on text that calibration did not see, and checks what it found on yet other text. A promise
    counts as kept by the 95% interval of the mean over the pieces of text; a speed-up by its measured value.
    `generate`, `chat` and AdaSkipLlama(plan="auto") use the plan of a profile that lies beside its model.
    """
    from ..measuring import corpus
    from ..measuring.tasks import read_texts
    from ..tuning.tuner import Tuner, hold_out

    start = time.monotonic()
    promise = _promise(max_loss, min_agreement, speedup)
    if existing is not None and files:
        raise click.UsageError("--data is what to calibrate on; leave out --profile", click.get_current_context())
    target = output or profile_path(model)
    check_output(target)
    _check_apart(files, text_files)
    texts = read_texts(text_files) if text_files else corpus.held_out()
    err = console(stderr=True)
    run = _Run(model, threads, gpu_layers, err)

    profile = run.load(existing) if existing is not None else run.calibrate(files)
    with run.open(n_tokens, logits_all=True) as llm:
        held_out = hold_out(llm, texts, n_texts, n_tokens)
        progress = _Evaluations(err)
        tuner = Tuner(
            llm, profile, promise, held_out,
            mode=mode, compensation=compensation, online=online,
            context=context, n_answer=n_answer, n_exchange=n_exchange, advance=progress.advance,
        )  # fmt: skip
        progress.announce(tuner)
        found, speedups = _reach(tuner, run, progress, texts) if speedup else _keep(tuner, run, progress, texts)
        with progress.shown("Checking", 2):
            tuned = tuner.result(found.skip, speedups, _settings(profile, held_out, n_tokens))
    profile = replace(profile, tuned=tuned)
    profile.save(target)
    if as_json:
        click.echo(json.dumps({"path": target, **tuned.to_dict()}, indent=1))
    else:
        print_tuned(console(), profile, target, beside=target == profile_path(model))
        console().print(f"It took {time.monotonic() - start:.0f} s.", style="dim")


def _promise(max_loss: float | None, min_agreement: float | None, speedup: float | None) -> Promise:
    from ..model.tuned import Promise

    given = {"max_loss": max_loss, "min_agreement": min_agreement, "speedup": speedup}
    promises = [Promise(kind, value) for kind, value in given.items() if value is not None]  # type: ignore[arg-type]
    if len(promises) != 1:
        raise click.UsageError("give one of --max-loss, --min-agreement and --speedup", click.get_current_context())
    return promises[0]


def _keep(
    tuner: Tuner, run: _Run, progress: _Evaluations, texts: Mapping[str, str]
) -> tuple[Judged, tuple[SpeedUp, ...]]:
    """The fastest plan that keeps the quality promised."""
    with progress.shown("Searching", tuner.most_evaluations):
        found = tuner.find()
    if found.n_skip:
        with progress.shown("Checking", 2):
            found = tuner.confirm(found.skip)
    return found, run.speed(tuner, found, texts) if found.n_skip else ()


def _reach(
    tuner: Tuner, run: _Run, progress: _Evaluations, texts: Mapping[str, str]
) -> tuple[Judged, tuple[SpeedUp, ...]]:
    """The plan of the least loss that is as fast as promised, as measured; as near as prediction leads where it is not.

    Raises:
        BudgetError: even the prediction does not reach it.
    """
    found: Judged | None = None
    speedups: tuple[SpeedUp, ...] = ()
    aim = tuner.promise.value
    for _ in range(_N_AIMS):
        try:
            with progress.shown("Searching", tuner.most_evaluations):
                again = tuner.find(aim)
        except BudgetError:
            if found is None:
                raise
            break
        if found is not None and np.array_equal(again.skip, found.skip):
            break
        found, speedups = again, run.speed(tuner, again, texts) if again.n_skip else ()
        if not speedups or speedups[-1].ratio.value >= tuner.promise.value:
            break
        aim *= 1.005 * tuner.promise.value / speedups[-1].ratio.value
    assert found is not None
    return found, speedups


def _settings(profile: Profile, held_out: HeldOut, n_tokens: int) -> dict[str, str | int | float | None]:
    return {
        "calibrated_on": profile.corpus,
        "searched_on": ", ".join(held_out.search_names),
        "checked_on": ", ".join(held_out.check_names),
        "tokens_per_text": n_tokens,
        "cpu": None if profile.cost is None else profile.cost.settings.cpu,
    }


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

    def load(self, path: str) -> Profile:
        from ..planning.profile import Profile

        profile = Profile.load(path)
        check_model(profile, self.model, path)
        return profile

    def calibrate(self, files: Sequence[str]) -> Profile:
        from ..calibration.calibrate import calibrate
        from ..measuring import corpus

        text = "\n\n".join(read_text(file) for file in files) if files else corpus.text()
        description = ", ".join(os.path.basename(file) for file in files) if files else corpus.DESCRIPTION
        with self.open(_CTX_TIMED) as llm:
            requests = corpus.cut(llm, text, corpus.N_REQUESTS, corpus.N_TOKENS)
            self.err.print(f"Calibrating on {len(requests)} requests of {description}.", style="dim")
            return calibrate(llm, requests, description=description)

    def speed(self, tuner: Tuner, found: Judged, texts: Mapping[str, str]) -> tuple[SpeedUp, ...]:
        """Measure a plan in a context of its own."""
        from ..tuning.tuner import measure_speed

        with (
            self.open(tuner.context + tuner.n_answer + 1) as llm,
            told_progress("Measuring the speed") as on_progress,
        ):
            words = llm.tokenize("\n\n".join(texts.values()).encode("utf-8", "replace"))
            prompt = (words * (tuner.context // len(words) + 1))[: tuner.context]
            plan = tuner.plan(found.skip)
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
            f"took {each:.2g} s, so that is up to {minutes(n * each)}; the check takes {minutes(2 * each)} or more. "
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
