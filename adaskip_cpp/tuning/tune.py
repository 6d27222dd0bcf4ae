"""Finds the settings under which a model is fastest here, then its frontier of plans. Start at :func:`tune`.

The stages are settings (``exact``), calibration, edited prompts (``edited``), losses of some sets on one part of the
held-out text (``losses``, ``planned``), the figures of plans on the other part (``figures``), and speed against stock
llama-cpp-python (``speed``). A ``memo`` keeps results as they come, so that a run continues where it was stopped.
"""

import contextlib
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from itertools import product
from typing import Any

from ..calibration.calibrate import calibrate
from ..calibration.cost import measure_cost
from ..engine.cores import busy_warning, load_average
from ..engine.llama import AdaSkipLlama
from ..engine.settings import cost_settings
from ..errors import DataError
from ..measuring import corpus
from ..measuring.judge import Judge
from ..measuring.memo import Memo
from ..measuring.probes import KINDS
from ..model.frontier import DEFAULT_LOSS, GROWTH, EditPoint, Frontier, Point, contexts, growth
from ..model.plan import DEFAULT_REFIT
from ..model.settings import Settings
from ..planning.profile import Profile
from ..progress import Stage, progress_bar
from .edited import edit_points
from .exact import FoundSettings, fastest_settings
from .figures import Judged, judged_plan, quality_of
from .hold_out import HeldOut, hold_out, text_probes, unseen_texts
from .losses import Candidate, Lost, Need, aim, measure
from .planned import Planned
from .speed import measure_speed

MOST_TOKENS = 120_000  # that calibration and tuning together read through a model, whatever its size
LONGEST = 32_768  # tokens of the longest prompts that speeds are predicted for, if the model was trained on them

_N_REQUESTS, _N_DECODE = 14, 4  # requests of 512 tokens; tokens decoded after each, which plans of prompts do not use
_RANK = 256  # of maps that only the bulk of prompts reads, where a whole ubatch shares their cost: docs/dev/method.md
_COST_CONTEXTS, _COST_S = (512, 2048, 8192), 6.0
_JUDGED_AT = 2048  # tokens of the prompts that plans are judged on
_LEAST_CTX = _JUDGED_AT + 512  # tokens of a context in which plans can be judged
_ROOM = 256  # tokens of a context beyond the longest prompt whose sublayers are timed
_LONG = 8192  # tokens of longer prompts, which have plans of their own: they lose more, so they may skip less
_SEARCHED_AT = 576, _JUDGED_AT  # tokens of the prompts of the search, for skipped sublayers and for windows
_N_TEXTS, _N_SEARCHED = 4, 1  # held-out texts to judge plans, and to search sets
_SEARCHED = 80, 64  # tokens of answers in the search, continuing and copying
_ANSWER = 128, 136  # tokens of judged answers, continuing and copying: many, as one may lose as much as fifty others
# A set is judged for the first of these aims that expects one: a promise, whether edits have their part of it, tokens
# of the prompt, and the share of the time of the best plan so far that another one may take.
_AIMS = (
    *product((0.05,), (False,), (_JUDGED_AT, _LONG), (0.92,)),
    *product((0.05, 0.1, 0.02, 0.035, 0.07, 0.2), (False, True), (_JUDGED_AT, _LONG), (0.97,)),
)
_AIMED, _SAFER = 0.9, 0.85  # the share of a promise that is aimed at, and its factor after each failure
_N_ROUNDS = 3  # times that each prompt is timed at the end


def tune(
    model: str,
    *,
    context: int = 8192,
    n_answer: int = 128,
    data: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    given: Mapping[str, Any] | None = None,
    memo: Memo | None = None,
    on_stage: Stage = progress_bar,
    tell: Callable[[str], object] = lambda line: None,
    **kwargs: Any,
) -> Frontier:
    """Find the fastest settings of the whole model on this machine, then plans of growing speed with their losses.

    At most 120,000 tokens are read, besides those that time sublayers and the result. Let nothing else run meanwhile,
    because times are measured. Only the memo writes files.

    Args:
        model: a GGUF file.
        context: tokens of the prompt for which settings are chosen.
        n_answer: tokens of the answer for which settings are chosen.
        data: texts by name for the calibration; None for text that every installation has.
        texts: other texts by name, by which plans are found and judged; None for descriptions of installed packages,
            a story, sources of Python and a lecture, all left out of the calibration.
        given: settings that are not varied, by the names of ``Settings``.
        memo: keeps findings in a file, so that a later call continues; None for none.
        on_stage: shows progress, as for ``calibrate``.
        tell: called with sentences for the user, such as the expected duration.
        **kwargs: arguments of ``AdaSkipLlama`` such as ``n_gpu_layers``.

    Returns:
        The frontier. ``save_plan`` writes it, and ``AdaSkipLlama(path, plan="auto")`` reads it.

    Raises:
        DataError: there is too little text, or the model has too few positions.
        ModelFileError: the model cannot be opened.

    Examples:
        >>> frontier = tune("model.gguf")
        >>> save_plan("model.adaskip-plan.json", frontier)
        >>> llm = AdaSkipLlama("model.gguf", plan="auto")
    """
    return _Tuning(model, context, n_answer, memo or Memo(), on_stage, tell, given or {}, kwargs).run(data, texts)


@dataclass
class _Tuning:
    path: str
    context: int
    n_answer: int
    memo: Memo
    on_stage: Stage
    tell: Callable[[str], object]
    given: Mapping[str, Any]
    kwargs: Mapping[str, Any]
    n_read: int = 0
    n_before: int = 0  # tokens that the current model had evaluated before, or that do not count

    def run(self, data: Mapping[str, str] | None, texts: Mapping[str, str] | None) -> Frontier:
        if warning := busy_warning(load_average()):
            self.tell(warning)
        kinds = unseen_texts() if texts is None else [texts]
        with self._model(Settings(**self.given)) as llm:  # before the minutes of trying settings: is there enough text?
            may_skip = any(row.in_bulk for row in llm.sublayers)
            if may_skip and llm.context_size < _LEAST_CTX:
                raise DataError(
                    f"the model's context has {llm.context_size} tokens, and plans are judged in {_LEAST_CTX}; "
                    "take a model with more positions"
                )
            held = hold_out(llm, kinds, (_N_SEARCHED, _N_TEXTS), _JUDGED_AT + _ANSWER[0]) if may_skip else None
            prompt = self._prompt(llm, kinds)
        found = self._find_settings()
        self.n_read, settings = found.n_tokens, found.settings
        points, edits = list[Point](), list[EditPoint]()
        about: dict[str, str | int | float | None] = {"package_version": metadata.version("adaskip-cpp")}
        with self._model(settings) as llm:
            machine, model = cost_settings(llm), llm.model_info
            if held is not None:
                profile = self._calibrate(llm, data)
                about |= {**held.names(), "calibrated_on": profile.corpus}
                cuts = _JUDGED_AT * 7 // 8, _JUDGED_AT  # more answers of a text, for few more tokens
                judge = Judge(llm, text_probes(llm, held.judge, cuts, _ANSWER), refit=DEFAULT_REFIT)
                with self.on_stage("Editing prompts") as on_progress:
                    edits = edit_points(llm, judge, self.memo, on_progress)
                points = self._points(llm, profile, held, judge, edits)
        self.n_read += self.memo.n_read
        frontier = Frontier(tuple(points), settings, machine, found.tried, about=about, edits=tuple(edits), model=model)
        plan = frontier.choose(_JUDGED_AT, DEFAULT_LOSS)
        with self.on_stage("Measuring the speed") as on_progress:
            speeds = measure_speed(
                self.path, settings, plan, prompt, n_rounds=_N_ROUNDS, kwargs=self.kwargs, on_progress=on_progress
            )
        return replace(frontier, speeds=speeds, n_read=self.n_read)

    def _prompt(self, llm: AdaSkipLlama, kinds: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the prompt to time: text of the kinds that plans are judged on."""
        text = corpus.SEPARATOR.join(text for kind in kinds for text in kind.values())
        tokens = corpus.tokens_of(llm, text[: 20 * _JUDGED_AT], bos=True)
        return (tokens * (_JUDGED_AT // len(tokens) + 1))[:_JUDGED_AT]

    def _find_settings(self) -> FoundSettings:
        """Find the fastest settings, and tell the user how long the rest will take."""
        options: dict[str, Any] = {"context": self.context, "n_answer": self.n_answer, "given": self.given}
        with self.on_stage("Trying settings") as on_progress:
            find = partial(fastest_settings, self._open, on_progress=on_progress, **options)
            found = self.memo.get("settings", FoundSettings, find)
        best = [each for each in found.tried if each.chosen][-1]
        if best.prompt_short_s > 0:
            share = min(_JUDGED_AT / 2 / self.context, 1.0)  # the other stages read shorter prompts
            rate = 1 / (best.prompt_short_s + share * (best.prompt_long_s - best.prompt_short_s))
            n_left = MOST_TOKENS - found.n_tokens + 3 * _N_ROUNDS * _JUDGED_AT  # three processes time the result
            took = max(round(n_left / rate / 60), 1)
            self.tell(f"This model reads {rate:,.0f} tokens per second. The other stages take about {took} min.")
        return found

    def _calibrate(self, llm: AdaSkipLlama, data: Mapping[str, str] | None) -> Profile:
        """Calibrate the model and time its sublayers, or return the profile of a run that was stopped."""
        known = self.memo.profile(llm.model_info)
        if known is not None:
            return known
        joined = corpus.SEPARATOR.join(data.values()) if data else ""
        profile = calibrate(
            llm,
            corpus.cut(llm, joined, _N_REQUESTS, corpus.N_TOKENS) if data else None,
            n_requests=_N_REQUESTS,
            n_decode=_N_DECODE,
            rank=_RANK,
            cost=False,
            description=", ".join(data) if data else None,
            on_stage=self.on_stage,
        )
        n_evaluated = llm.n_evaluated
        with self.on_stage("Timing sublayers") as on_progress:
            cost = measure_cost(llm, contexts=_COST_CONTEXTS, seconds=_COST_S, rank=_RANK, on_progress=on_progress)
        self.n_before += llm.n_evaluated - n_evaluated  # it is bounded by seconds, and skips most of the model
        profile = replace(profile, cost=cost)
        self.memo.keep_profile(profile)
        return profile

    def _points(
        self, llm: AdaSkipLlama, profile: Profile, held: HeldOut, judge: Judge, edits: Sequence[EditPoint]
    ) -> list[Point]:
        """Measure the losses of parts. While tokens last, judge the plans that are expected to keep :data:`_AIMS`."""
        planned = Planned(profile, _JUDGED_AT, _LONG)
        with self.on_stage("Searching") as on_progress:
            searches = [Judge(llm, text_probes(llm, held.search, (length,), _SEARCHED)) for length in _SEARCHED_AT]

            def lost(candidate: Candidate) -> Lost:
                search = searches[bool(candidate.windowed)]

                def judge() -> list[float]:
                    scores = search(planned.plan(candidate))
                    return [quality_of(search.probes, scores, kind).harm for kind in KINDS]

                return tuple(self.memo.get(f"search {candidate}", list[float], judge))

            seconds = {length: cache(partial(planned.seconds, context=length)) for _, _, length, _ in _AIMS}
            losses = measure(planned.layers, lost, on_progress)
            doubled = replace(losses, grown=_growth_of(llm))
            grown = {n: replace(losses, grown=growth(n / _JUDGED_AT, doubled.grown)) for n in seconds}
        n_left, longest = 0, max(_JUDGED_AT, min(LONGEST, llm.n_ctx_train or LONGEST))
        found, judged = dict[Candidate, Point](), dict[Candidate, Need]()

        def count() -> int:
            judge.read_whole()  # its tokens count, also in a run that was stopped after the edits
            return self.n_read + self.memo.n_read + llm.n_evaluated - self.n_before

        def add(candidate: Candidate) -> None:
            nonlocal n_left
            plan = planned.plan(candidate)
            judge_it = partial(judged_plan, judge, plan)
            one, n_tokens = self.memo.get(f"judged {candidate}", tuple[Judged | str, int], judge_it)
            n_left -= n_tokens
            if isinstance(one, str):
                judged[candidate] = Need((math.nan, math.nan, math.inf), math.inf)  # of keys alone
                judge.put_first(one)  # other plans often lose the same key, so they are found out sooner
                return
            speedups = tuple((length, planned.speedup(candidate, length)) for length in contexts(longest))
            point = Point(_JUDGED_AT, *one.kinds, one.passkeys, speedups, plan, doubled.growth(candidate))
            needs = Need(point.needs_by_divergence, point.needs(_JUDGED_AT))
            found[candidate], judged[candidate] = point, needs

        def needs_at(length: int) -> dict[Candidate, Need]:
            factors = {each: growth(length / _JUDGED_AT, doubled.growth(each)) for each in judged}
            return {each: need.times(factors[each]) for each, need in judged.items()}

        def sought() -> tuple[Candidate, int, float] | None:
            """Return the set to judge next, and for which length and promise; None if no aim expects one."""
            for promise, edited, length, share in _AIMS:
                wanted, needs, takes = left(length, promise, edited=edited), needs_at(length), seconds[length]
                best = min((each for each, need in needs.items() if need.most <= wanted), key=takes, default=None)
                safer = _SAFER ** (n_failed[length, wanted] + (n_left < 2 * each_costs))
                candidate = aim(grown[length], takes, needs, _AIMED * safer * wanted)
                if candidate is not None and (best is None or takes(candidate) <= share * takes(best)):
                    return candidate, length, wanted
            return None

        with self.on_stage("Judging") as on_progress:
            n_left = MOST_TOKENS - self.memo.get("read before judging", int, count)  # kept for a run that goes on
            each_costs = self.memo.get("read for each plan", int, lambda: judge.n_each + 1)  # building its graph counts
            n_begin, left, n_failed = max(n_left, 1), Frontier((), edits=tuple(edits)).left, Counter[Any]()
            while (not judged or n_left >= each_costs) and (one := sought()):
                candidate, length, wanted = one
                add(candidate)
                on_progress(1 - max(n_left, 0) / n_begin)
                n_failed[length, wanted] += needs_at(length)[candidate].most > wanted
        useful = (each for each in found.values() if not any(other.beats(each) for other in found.values()))
        return sorted(useful, key=lambda each: each.speedup(_LONG))

    @contextmanager
    def _model(self, settings: Settings) -> Iterator[AdaSkipLlama]:
        """Yield the model, opened with these settings; count the tokens that it reads."""
        llm = self._open(settings, max(_LEAST_CTX, min(self.context, _COST_CONTEXTS[-1]) + _ROOM))
        self.n_before = llm.n_evaluated
        try:
            yield llm
        finally:
            self.memo.count(llm.n_evaluated - self.n_before)
            # llama.cpp reports an error if a plan made its buffers larger than planned. It is harmless.
            with contextlib.redirect_stderr(io.StringIO()):
                llm.close()

    def _open(self, settings: Settings, n_ctx: int) -> AdaSkipLlama:
        with contextlib.redirect_stderr(io.StringIO()):
            return AdaSkipLlama(self.path, n_ctx=n_ctx, verbose=False, **{**self.kwargs, **settings.to_kwargs()})


def _growth_of(llm: AdaSkipLlama) -> float:
    """Return the assumed factor of the loss of skipped sublayers if a prompt is twice as long.

    Attentions that see only the last tokens do not see more of a longer prompt. So only the others count.
    """
    attentions = [row for row in llm.sublayers if row.kind == "attention"]
    n_all = sum(not 0 < row.window <= _JUDGED_AT for row in attentions)
    return 1.0 + (GROWTH - 1.0) * n_all / max(len(attentions), 1)
