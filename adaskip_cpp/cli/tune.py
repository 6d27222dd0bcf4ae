"""``adaskip-cpp tune``: find the fastest plan that keeps a promise, and write the plan file."""

import io
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from functools import partial

import click

from ..calibration.calibrate import calibrate
from ..engine.llama import AdaSkipLlama
from ..engine.settings import cost_settings
from ..errors import DataError
from ..files import check_output, json_text
from ..measuring import corpus
from ..measuring.running import Running, open_quietly
from ..measuring.synthetic import synthetic_items
from ..measuring.tasks import QuestionItem, python_sources, read_texts
from ..measuring.text_quality import N_BEHIND
from ..measuring.timing import time_request
from ..model.identity import plan_path, profile_path
from ..model.mode import MODES, ModeName
from ..model.plan import SkipPlan
from ..model.plan_file import save_plan
from ..model.promise import Promise, SpeedUp
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.request import PlanRequest
from ..progress import told_progress
from ..tuning import speed
from ..tuning.hold_out import hold_out_kinds
from ..tuning.search import N_PREDICTED
from ..tuning.tuner import Tuner
from .calibrate import calibration_requests
from .planning import load_profile, print_cost_note
from .terminal import CHOOSING, OUTPUT, console, json_option, model_options, option, verb
from .tune_report import minutes, print_found

_SEARCHING = "Searching"
_CTX_TIMED = 8192
"""Context of the model whose sublayers are timed, as in `calibrate`."""
_LONG = 1024
"""Tokens of the prompts that are judged in mode `prompt`, at most."""
_DEPTHS, _FEW_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9), (0.1, 0.5, 0.9)
_ANSWER = 32
"""Room for the answer about a pass key, in tokens."""
_SLOW, _FEW, _FEW_TEXTS = 400, 16, 3
"""Of a model that reads fewer tokens of a prompt per second than the first: calibration requests, and texts. It is
asked for fewer pass keys too, and windows, which nothing here uses, are not measured, so that a 0.5B model takes 10
minutes on 2 cores. SmolLM2 reads about 700, Qwen2.5 0.5B about 200."""
_LOSS = 0.02


@verb(
    "Find the fastest plan that keeps a promise.",
    example="adaskip-cpp tune model.gguf --data notes.txt --text letters.txt",
)
@click.argument("model")
@option(
    "--max-loss",
    type=click.FloatRange(min=0),
    help=f"Promise: nats per token that are lost at most.  [default: {_LOSS}]",
)
@option("--min-agreement", type=click.FloatRange(0, 1),
        help="Promise: share of the tokens that the full model would choose too, such as 0.95.")  # fmt: skip
@option("--speedup", type=click.FloatRange(min=1), help="Promise: times as fast; what loses least is searched.")
@option("--data", "files", multiple=True, metavar="FILE", help="Text to calibrate on; may be repeated.")
@option("--text", "text_files", multiple=True, metavar="FILE",
        help="Other text, to judge by; may be repeated.  [default: pages and sources it leaves out]")  # fmt: skip
@option("--mode", group=CHOOSING, type=click.Choice(MODES), default="prompt",
        help="prompt: only while nobody reads, in the bulk of a prompt. decode: nothing while a prompt is read. "
        "prefill, e2e: in both.")  # fmt: skip
@option("--compensation", group=CHOOSING, type=click.Choice(list(COMPENSATIONS)), default=DEFAULT_COMPENSATION,
        help="What stands in for a skipped sublayer.")  # fmt: skip
@option("--online", group=CHOOSING, is_flag=True,
        help="Let answers add FFNs in decode; the promise covers them with --mode decode only.")  # fmt: skip
@option("--context", group=CHOOSING, type=click.IntRange(min=1), default=2048, help="Prompt length to be fast at.")
@option("--answer", "n_answer", group=CHOOSING, type=click.IntRange(min=1), default=128,
        help="Answer length to be fast at; with --mode prompt the prompt alone counts.")  # fmt: skip
@option("--allow-lost-passkeys", group=CHOOSING, is_flag=True,
        help="Also plans that lose a pass key which the full model finds in a long prompt.")  # fmt: skip
@option("--profile", "existing", group=_SEARCHING, metavar="PROFILE",
        help="A profile of MODEL to begin with; do not calibrate.")  # fmt: skip
@option("--texts", "n_texts", group=_SEARCHING, type=click.IntRange(min=2),
        help="Pieces of text to search by; as many again confirm what was found, and as many report it.  "
        f"[default: 6, of a slow model {_FEW_TEXTS}, in other modes than prompt 16]")  # fmt: skip
@option("--tokens", "n_tokens", group=_SEARCHING, type=click.IntRange(min=4),
        help=f"Tokens of each piece.  [default: --context, up to {_LONG:,}, and {N_BEHIND} behind it; in other modes "
        "than prompt 512]")  # fmt: skip
@option("--exchange", "n_exchange", group=_SEARCHING, type=click.IntRange(min=0),
        help="Evaluations spent on swapping sublayers.  [default: 0, in other modes than prompt 16]")  # fmt: skip
@model_options
@option("-o", "--output", group=OUTPUT, metavar="PLAN",
        help="Plan file to write.  [default: beside MODEL, *.adaskip-plan.json]")  # fmt: skip
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
    n_texts: int | None,
    n_tokens: int | None,
    mode: ModeName,
    compensation: str,
    online: bool,
    context: int,
    n_answer: int,
    n_exchange: int | None,
    allow_lost_passkeys: bool,
    running: Running,
    as_json: bool,
) -> None:
    """Find the fastest plan for MODEL, a GGUF file, that keeps one promise, and write it to a plan file.

    Without any options it skips where nobody reads, in the bulk of a prompt, what adds at most 0.02 nats per token to
    the loss behind long prompts and loses no pass key hidden in them.

    Calibrates, searches on text that calibration did not see, confirms what it found on other text, and reports
    what it costs on yet other text, which decided nothing. A promise is held on the second text, by the 95%
    interval of the mean over its pieces; a speed-up by its measured value. With --mode prompt a loss is judged by
    the divergence from the full model, which is the loss to be expected and much less a matter of chance, and by
    what the loss is greater than that beyond chance. `generate`, `chat` and AdaSkipLlama(plan="auto") use the plan
    file that lies beside its model.
    """
    start = time.monotonic()
    given = {"max_loss": max_loss, "min_agreement": min_agreement, "speedup": speedup}
    promises = [Promise(kind, value) for kind, value in given.items() if value is not None]  # type: ignore[arg-type]
    if len(promises) > 1:
        raise click.UsageError("give one of --max-loss, --min-agreement and --speedup", click.get_current_context())
    promise = promises[0] if promises else Promise("max_loss", _LOSS)
    in_prompt = mode == "prompt"
    n_tokens = n_tokens or (min(context, _LONG) + N_BEHIND if in_prompt else 512)
    n_exchange = (0 if in_prompt else 16) if n_exchange is None else n_exchange
    n_timed = 0 if in_prompt else n_answer
    if existing is not None and files:
        raise click.UsageError("--data is what to calibrate on; leave out --profile", click.get_current_context())
    target = output or plan_path(model)
    check_output(target)
    if both := {*map(os.path.realpath, files)} & {*map(os.path.realpath, text_files)}:
        raise DataError(f"{min(both)!r} cannot both teach and judge; give different files to --data and --text")
    kinds = [read_texts(text_files)] if text_files else _unseen()
    whole = corpus.SEPARATOR.join(text for kind in kinds for text in kind.values())
    err = console(stderr=True)
    opened = partial(_opened, model, running)

    def texts_for(slow: bool) -> int:
        return n_texts or (16 if not in_prompt else _FEW_TEXTS if slow else 6)

    if existing is not None:
        profile = load_profile(model, existing)
        slow = profile.cost is not None and 512 / profile.cost.seconds(None, 512, "prefill") < _SLOW
        n_texts = texts_for(slow)
    else:
        with opened(_CTX_TIMED) as llm:
            requests, description = calibration_requests(llm, files)
            time_request(llm, requests[0][:32], 0)  # the weights may come from a disk
            per_s = len(requests[0]) / time_request(llm, requests[0], 0).first_token_s
            slow = per_s < _SLOW
            n_texts = texts_for(slow)
            if slow:
                requests, description = calibration_requests(llm, files, _FEW)
            n_bulk = 2 * 240 * sum(row.in_bulk for row in llm.sublayers) + 3 * 6 * len(requests[-1]) * (not slow)
            first = 15 + (1.2 * sum(map(len, requests)) + n_bulk) / per_s
            n_read = n_tokens * n_texts * (6 + N_PREDICTED + n_exchange) + (12 * n_tokens if in_prompt else 0)
            then = (n_read + 8 * context) / per_s
            err.print(
                f"This model reads {per_s:,.0f} tokens per second, so calibration will take about {minutes(first)} and "
                f"what follows about {minutes(then)}. Calibrating on {len(requests)} requests of {description}.",
                style="dim",
            )
            profile = calibrate(llm, requests, windows=not slow, description=description)

    def measure(plan: SkipPlan) -> tuple[SpeedUp, ...]:
        with opened(context + n_timed + 1) as llm, told_progress("Measuring the speed") as on_progress:
            words = corpus.tokens_of(llm, whole[: 20 * context], bos=True)
            prompt = (words * (context // len(words) + 1))[:context]
            rounds = 3 if in_prompt else 5
            return speed.measure_speed(llm, plan, prompt, n_timed, n_rounds=rounds, on_progress=on_progress)

    depths = _FEW_DEPTHS if slow else _DEPTHS
    with opened(n_tokens + (_ANSWER if in_prompt else 0), logits_all=mode in ("prefill", "e2e")) as llm:
        tuner = Tuner(
            llm, profile, promise, hold_out_kinds(llm, kinds, n_texts, n_tokens),
            PlanRequest(mode=mode, compensation=compensation, online=online),
            context=context, n_answer=n_answer, n_exchange=n_exchange,
            passkeys=_passkeys(llm, whole, n_tokens, depths) if in_prompt else (),
            may_lose_passkeys=allow_lost_passkeys,
            stage=told_progress,
        )  # fmt: skip
        known = None if profile.cost is None else profile.cost.settings
        if known is not None:
            here = replace(cost_settings(llm), n_batch=known.n_batch, n_ubatch=known.n_ubatch)  # a text is a batch
            print_cost_note(err, profile, here)
        begun, n = time.monotonic(), tuner.most_evaluations
        tuner.evaluate_full()
        each = time.monotonic() - begun
        n_behind = 2 * tuner.retrieval.n_tokens + (8 * context if in_prompt else 0)
        behind = each * (4 + n_behind / tuner.n_tokens)
        err.print(
            f"The search evaluates at most {n} plans on {tuner.n_tokens:,} tokens of held-out text. One took "
            f"{each:.2g} s, so that is up to {minutes(n * each)}; what follows takes {minutes(behind)} or more. "
            "Ctrl-C leaves all files as they are.",
            style="dim",
        )
        found = tuner.tune(measure, {"calibrated_on": profile.corpus, "cpu": known.cpu if known else None})
    # X.adaskip.json for X.adaskip-plan.json and X.json
    profile_target = profile_path(target.removesuffix(".json").removesuffix(".adaskip-plan"))
    if existing is None:
        profile.save(profile_target)
    save_plan(target, found.plan, found.tuning)
    if as_json:
        click.echo(json_text({"path": target, "plan": found.plan.to_dict(), "tuning": found.tuning}), nl=False)
        return
    out = console()
    print_found(out, found, profile.similarity)
    out.print(f"\nPlan written to {target}.", soft_wrap=True, markup=False)
    if existing is None:
        out.print(f"Profile written to {profile_target}.", soft_wrap=True, markup=False)
    if not found.plan.is_whole:
        beside = target == plan_path(model)
        use = '`generate`, `chat` and AdaSkipLlama(plan="auto") use it.' if beside else f"Use it with --plan {target}."
        out.print(use, soft_wrap=True, markup=False)
    out.print(f"It took {time.monotonic() - start:.0f} s.", style="dim")


def _unseen() -> list[dict[str, str]]:
    """Text of the kinds that calibration leaves out; of a kind that this Python lacks there is none."""
    kinds = [corpus.held_out()]
    with suppress(DataError):
        kinds.append(python_sources())
    return kinds


def _passkeys(llm: AdaSkipLlama, text: str, length: int, depths: Sequence[float]) -> list[QuestionItem]:
    """Pass keys at several depths of prompts as long as the texts; none where these are too short for any."""
    with suppress(DataError):
        return synthetic_items(llm, text[: 20 * length], tasks=("passkey",), lengths=(length,), depths=depths, n_per=1)
    return []


@contextmanager
def _opened(model: str, running: Running, n_ctx: int, *, logits_all: bool = False) -> Iterator[AdaSkipLlama]:
    llm = open_quietly(model, n_ctx, running, logits_all=logits_all)
    try:
        yield llm
    finally:
        # llama.cpp tells an error where a plan made its buffers larger than it had planned; it is none.
        with redirect_stderr(io.StringIO()):
            llm.close()
