"""Makes the plans and items of an evaluation from its options, and refuses bad options. Start at :func:`prepared`."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Set
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from itertools import cycle, islice

from ..engine.generation import chat_tokens, has_chat_template
from ..engine.llama import AdaSkipLlama
from ..errors import AdaSkipError, DataError
from ..measuring import corpus
from ..measuring.task_files import task_items
from ..measuring.tasks import SYNTHETIC, QuestionItem, TextItem, passkey_items, python_sources, read_texts, text_items
from ..model.identity import plan_path
from ..model.plan import ModeName
from ..model.plan_file import PlanFile, load_plan, plan_beside
from ..planning.compensation import DEFAULT_COMPENSATION
from ..planning.modes import MODES
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from ..planning.strategies import STRATEGIES
from .contenders import COMPENSATED, FULL, contenders
from .evaluate import Work

_SPEED_CONTEXT, _TOKENS, _TASKS_CTX = 1024, 512, 8192  # in tokens
_PROMISES = 0.05, 0.1
_ANSWER = 64  # most tokens of an answer to a synthetic task

_BUILTIN = {  # text by name: a function that returns texts by title, and a description
    "pages": (corpus.held_out, f"{corpus.PAGES}, of those that calibration leaves out"),
    "sources": (python_sources, "sources of Python's standard library"),
}


@dataclass(frozen=True)
class EvaluationOptions:
    """The plans, texts and tasks of ``evaluate``. ``adaskip-cpp evaluate`` has options with the same meaning.

    Attributes:
        strategies: strategies of plans; () for all but ``"manual"``.
        n_skips: numbers of sublayers to skip, a plan for each; None for a tenth, a fifth and a quarter of all.
        modes: modes of plans; () for all.
        compensations: compensations for strategy ``"adaskip"``; None for ``"linear"``.
        plan_file: a plan file to compare too; None for the one beside the model, if it is of one of the modes.
        max_losses: promises for the frontier of that file, in nats per token; None for 0.05 and 0.1. For each prompt,
            the fastest plan that keeps the promise is used.
        text_files: files of UTF-8 text.
        builtin: ``"pages"`` of Python's manual, ``"sources"`` of its library; () for pages if there are no text files.
        n_texts: number of items of each kind of text; 0 for none.
        n_tokens: tokens of an item; None for 512. With promises, None gives prompts as long as the timed one.
        n_continuation: tokens at the end of an item that are judged, and tokens decoded in a timed request.
        tasks: files of LongBench or L-Eval. LongBench's ``dataset2prompt.json`` and ``dataset2maxlen.json`` are read
            from the folder of each file; without them, only ``multi_news`` has a prompt and a length of answers.
        tasks_items: number of questions of each of these tasks; None for all.
        synthetic: names of long-context tasks that are made from the text: ``"passkey"``.
        lengths: tokens of the prompts of these.
        depths: places of the answers in these prompts, 0 to 1.
        n_per: number of questions for each of these tasks, lengths and depths.
        ctx: context in tokens; None for the context that is needed, or with ``tasks`` 8192 or the model's.
        speed_context: tokens of the timed prompt; None for 1024, or fewer if the model allows fewer.
        n_rounds: number of timings of each contender; 0 for none.
    """

    strategies: tuple[str, ...] = ()
    n_skips: tuple[int, ...] | None = None
    modes: tuple[ModeName, ...] = ()
    compensations: tuple[str, ...] | None = None
    plan_file: str | None = None
    max_losses: tuple[float, ...] | None = None
    text_files: tuple[str, ...] = ()
    builtin: tuple[str, ...] = ()
    n_texts: int = 8
    n_tokens: int | None = None
    n_continuation: int = 64
    tasks: tuple[str, ...] = ()
    tasks_items: int | None = None
    synthetic: tuple[str, ...] | None = None
    lengths: tuple[int, ...] = (1000, 2000)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    n_per: int = 4
    ctx: int | None = None
    speed_context: int | None = None
    n_rounds: int = 5

    def requests(self, n_layer: int) -> tuple[PlanRequest, ...]:
        """Return a request for each strategy, compensation, budget and mode, for a model of ``n_layer`` layers."""
        n_skips = self.n_skips or sorted({max(2 * n_layer // parts, 1) for parts in (10, 5, 4)})
        compensations = self.compensations or [DEFAULT_COMPENSATION]
        return tuple(
            PlanRequest(n_skip, strategy=strategy, compensation=compensation, mode=mode)
            for strategy in self.strategies or [name for name in STRATEGIES if name != "manual"]
            for compensation in (compensations if strategy == COMPENSATED else ["none"])
            for n_skip in n_skips
            for mode in self.modes or MODES
        )


@contextmanager
def prepared(
    model: str, profile: Profile | None, options: EvaluationOptions, open_model: Callable[[int], AdaSkipLlama]
) -> Iterator[tuple[AdaSkipLlama, Work, list[str], dict[str, str]]]:
    """Make plans and items, and refuse options that cannot be measured, before anything is measured.

    ``open_model`` opens the model for a context of so many tokens. Yields the model, the work, notes for the user, and
    descriptions of the work by name.
    """
    if unknown := {*options.builtin} - _BUILTIN.keys():
        raise DataError(f"there is no text {min(unknown)!r}; use one of: {', '.join(_BUILTIN)}")
    if not (options.lengths and options.depths and options.n_continuation > 0):
        raise DataError("lengths or depths are empty, or n_continuation is less than 1; give at least one")
    with closing(open_model(256)) as llm:
        if profile is not None:
            profile.model.check(llm.model_info, "the profile", model)
        n_most, n_layer = llm.n_ctx_train, llm.n_layer
    if options.ctx is not None and options.ctx > n_most:
        raise DataError(f"the model is made for contexts of {n_most} tokens, not {options.ctx}; use less (ctx, --ctx)")
    limit, n_decoded = options.ctx or n_most, options.n_continuation + 1
    speed_context = options.speed_context or max(min(_SPEED_CONTEXT, limit - n_decoded), 2)
    asked = options.strategies, options.n_skips, options.modes, options.compensations
    requests = options.requests(n_layer) if profile is not None or any(asked) else ()
    modes: set[str] = {request.mode for request in requests}
    if modes and options.max_losses is not None:
        modes.add("prompt")  # the mode of the plans that `tune` finds: promises ask for them too
    saved, notes = _saved(model, options.plan_file, modes)
    has_promises = saved is not None and saved.frontier is not None
    if options.max_losses is not None and not has_promises:
        way_out = f"run `adaskip-cpp tune {model}`, or name it (plan_file, --plan)"
        raise DataError(f"promises need the plan file of `tune`; {way_out}")
    n_tokens = options.n_tokens or (min(speed_context + n_decoded, limit) if has_promises else _TOKENS)
    if options.n_texts and n_tokens <= n_decoded:
        raise DataError(
            f"an item of {n_tokens} tokens has no prompt before a continuation of {options.n_continuation}; ask for at "
            f"least {n_decoded + 1} tokens (n_tokens, --tokens), or for a shorter continuation (n_continuation, "
            "--continuation)"
        )
    needed = {
        "the items of text (n_tokens, --tokens)": n_tokens if options.n_texts else 0,
        "the measurement of speed (speed_context, --speed-context)": options.n_rounds and speed_context + n_decoded,
        "the synthetic tasks (lengths, --lengths)": max(options.lengths) + _ANSWER if options.synthetic else 0,
    }
    for what, n in needed.items():
        if n > limit:
            raise DataError(f"{what} need a context of {n} tokens, the model has {limit}; ask for less")
    n_ctx = options.ctx or max([*needed.values(), min(_TASKS_CTX, n_most) if options.tasks else 8])
    llm = open_model(n_ctx)
    try:
        work, words = _work(llm, replace(options, n_tokens=n_tokens, speed_context=speed_context), n_ctx)
        max_losses = _PROMISES if options.max_losses is None else options.max_losses
        plans, more = contenders(profile, requests, saved, max_losses, work.prompt_lengths)
        work = replace(work, contenders=plans)
        if not work.results():
            raise DataError("there is nothing to measure; ask for texts, questions or rounds of timing")
        yield llm, work, [*more, *notes], words
    finally:
        with redirect_stderr(StringIO()):  # llama.cpp reports that plans' graphs took other memory than it had planned
            llm.close()


def _saved(model: str, plan_file: str | None, modes: Set[str]) -> tuple[PlanFile | None, list[str]]:
    """Return the plan file of `tune`, if it is named or its mode is one of these, and a note if it cannot be used."""
    if plan_file is not None:
        return load_plan(plan_file, model=model), []
    if not os.path.exists(plan_path(model)):
        return None, []
    try:
        found = plan_beside(model)
    except AdaSkipError as error:
        if not modes:  # nothing else would be left to compare
            raise
        return None, [f"the tuned plan is left out: {error}"]
    mode = "prompt" if found.plan is None else found.plan.mode
    return (found if mode in modes or not modes else None), []


def _work(llm: AdaSkipLlama, options: EvaluationOptions, n_ctx: int) -> tuple[Work, dict[str, str]]:
    """Return the work for the whole model alone, and its description."""
    kinds = {"text": read_texts(options.text_files)} if options.text_files else {}
    for name in dict.fromkeys(options.builtin) or (() if kinds else ("pages",)):
        kinds[name] = _BUILTIN[name][0]()
    named = [_BUILTIN[name][1] if name in _BUILTIN else ", ".join(sources) for name, sources in kinds.items()]
    whole = corpus.SEPARATOR.join(text for sources in kinds.values() for text in sources.values())
    words, texts, questions = dict[str, str](), list[TextItem](), list[QuestionItem]()
    if options.n_texts:
        size = {"n_items": options.n_texts, "n_tokens": options.n_tokens or _TOKENS}
        for name, sources in kinds.items():
            texts += text_items(llm, sources, **size, task=name, drop_short=name != "text")
        words["Text"] = (
            f"{options.n_texts} items of {options.n_tokens} tokens of {' and as many of '.join(named)}; the last "
            f"{options.n_continuation} are judged"
        )
    if options.synthetic:
        if unknown := [task for task in options.synthetic if task not in SYNTHETIC]:
            raise DataError(f"there is no task {unknown[0]!r}; use {', '.join(SYNTHETIC)}")
        lengths, depths = (", ".join(f"{each:g}" for each in all_) for all_ in (options.lengths, options.depths))
        questions += passkey_items(llm, whole, lengths=options.lengths, depths=options.depths, n_per=options.n_per)
        words["Synthetic tasks"] = (
            f"{', '.join(options.synthetic)}: {options.n_per} of each length ({lengths} tokens) and depth ({depths}), "
            "from the same text"
        )
    if options.tasks:
        wrap = partial(_wrap, llm)
        published = task_items(llm, options.tasks, n_ctx=n_ctx - 1, wrap=wrap, n_each=options.tasks_items)
        counts = Counter(item.task for item in published)
        words["Tasks"] = f"{', '.join(f'{n} of {task}' for task, n in counts.items())}, in {n_ctx:,} tokens"
        questions += published
    prompt = tuple[int, ...]()
    if options.n_rounds and (n := options.speed_context):
        tokens = corpus.tokens_of(llm, whole[: corpus.MOST_PER_TOKEN * n], bos=True)
        prompt = tuple(islice(cycle(tokens), n))
        words["Speed"] = (
            f"{options.n_rounds} rounds of a prompt of {n:,} tokens and {options.n_continuation} more, all contenders "
            "in turn, the order reversed every second round"
        )
    return Work((FULL,), texts, questions, options.n_continuation, prompt, options.n_rounds), words


def _wrap(llm: AdaSkipLlama, prompt: str) -> list[int]:
    """Return the tokens of a prompt in the model's chat template, if it has one."""
    return chat_tokens(llm, [("user", prompt)]) if has_chat_template(llm) else corpus.tokens_of(llm, prompt, bos=True)
