"""adaskip_cpp.tune: on a tiny model of which the upper layers add nothing but for one attention.

Oracles: the figures of a Judge that the test calls itself, and a count of the tokens that are handed to llama.cpp.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from oracles.fixtures import Open
from oracles.served import edited_frontier
from oracles.small_tuning import ANSWER, JUDGED_AT, N_TIMED, TEXTS, make_small, write_idle_model
from oracles.tiny_families import N_CTX_TRAIN

import adaskip_cpp
from adaskip_cpp import AdaSkipLlama, Frontier
from adaskip_cpp.engine.settings import is_here
from adaskip_cpp.errors import DataError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring.judge import Judge
from adaskip_cpp.measuring.memo import Memo
from adaskip_cpp.measuring.probes import KINDS, Probe, probes_of
from adaskip_cpp.model.frontier import DEFAULT_LOSS, SpeedUp
from adaskip_cpp.model.plan import SkipPlan
from adaskip_cpp.model.settings import Settings
from adaskip_cpp.progress import OnProgress
from adaskip_cpp.tuning import figures
from adaskip_cpp.tuning import tune as tuning
from adaskip_cpp.tuning.figures import passkeys_of, quality_of
from adaskip_cpp.tuning.hold_out import hold_out
from adaskip_cpp.tuning.losses import Candidate

AIMS = tuning._AIMS
IDLE_SET, EVERY_SET = Candidate(ffn=(1,)), Candidate((1,), (1,))
DATA = {"manual": " ".join(TEXTS.values())[::-1]}
GIVEN = vars(Settings(n_threads=1, n_threads_batch=1))
"""All settings: which one is faster here, chance would decide."""


@dataclass
class Calls:
    """What a run did: the tokens that it handed to llama.cpp, by stage, and how its speed was measured."""

    tokens: Counter[str] = field(default_factory=Counter)
    stage: str = ""
    told: list[str] = field(default_factory=list)
    timed: list[tuple[Settings, SkipPlan | None, int]] = field(default_factory=list)

    @contextmanager
    def on_stage(self, name: str) -> Iterator[OnProgress]:
        self.stage = name
        self.tokens[name] = 0

        def move(fraction: float, words: str = "") -> None:
            assert 0 <= fraction <= 1

        yield move


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idle_model(tmp_path_factory.mktemp("tune") / "m.gguf")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Makes tuning small, and notes what it does. The speed is invented, as processes of their own would measure it."""
    return noted(monkeypatch)


def noted(monkeypatch: pytest.MonkeyPatch) -> Calls:
    make_small(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)  # as in each test: see conftest.py
    calls = Calls()
    evaluate = AdaSkipLlama._evaluate

    def counted(self: AdaSkipLlama, phase: Any, tokens: list[int], **more: Any) -> None:
        calls.tokens[calls.stage] += len(tokens)
        evaluate(self, phase, tokens, **more)

    def measure_speed(path: str, settings: Settings, plan: SkipPlan | None, prompt: list[int], **_: Any) -> Any:
        calls.timed.append((settings, plan, len(prompt)))
        return (SpeedUp("settings", len(prompt), Interval(1.5, 1.4, 1.6, 2), (3.0, 2.0)),)

    monkeypatch.setattr(AdaSkipLlama, "_evaluate", counted)
    monkeypatch.setattr(tuning, "measure_speed", measure_speed)
    return calls


def tuned(model: Path, calls: Calls, **more: Any) -> Frontier:
    options = {"context": 200, "n_answer": 8, "data": DATA, "texts": TEXTS, "given": GIVEN}
    return adaskip_cpp.tune(str(model), **{**options, "on_stage": calls.on_stage, **more})


Tune = Callable[..., Frontier]
Put = Callable[..., None]
OnePromise = Callable[..., list[float]]


@pytest.fixture
def tune(model: Path, calls: Calls) -> Tune:
    """``tune(path=model, **options)``: a whole run."""
    return lambda path=model, **more: tuned(path, calls, **more)


@pytest.fixture
def put(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Put:
    """``put(name=value, ...)``: from now on, tuning has these constants and functions."""

    def put_(**values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(tuning, name, value)

    return put_


@pytest.fixture(scope="module")
def done(model: Path) -> tuple[Frontier, Calls]:
    """A whole run, and what it did."""
    with pytest.MonkeyPatch.context() as patch:
        calls = noted(patch)
        return tuned(model, calls, tell=calls.told.append), calls


@pytest.fixture
def whole(done: tuple[Frontier, Calls], calls: Calls) -> Frontier:
    """What a whole run finds. Plans are chosen for short prompts, too."""
    return done[0]


def test_it_finds_plans_that_skip_what_adds_nothing(whole: Frontier) -> None:
    first, last = whole.points
    assert first.harm(JUDGED_AT) < 1e-6 < 1e-3 < last.continuation.harm
    skipped, more = first.plan.skipped("bulk"), last.plan.skipped("bulk")
    assert 1 in skipped.ffn and 1 not in skipped.attention and 1 in more.attention
    assert whole.choose(JUDGED_AT, 1e-3) == first.plan and whole.choose(JUDGED_AT, 30.0) == last.plan
    assert 1 < first.speedup(JUDGED_AT) < last.speedup(JUDGED_AT)
    assert max(n for n, _ in last.speedups) == N_CTX_TRAIN, "longer prompts are not for this model"


def test_speeds_are_predicted_up_to_the_judged_length_at_least(one_promise: OnePromise, tune: Tune, put: Put) -> None:
    """A model may be judged in more tokens than its file says that it was trained on."""
    one_promise(9.0)
    put(LONGEST=1)
    assert {max(n for n, _ in each.speedups) for each in tune().points} == {JUDGED_AT}


def test_the_figures_are_those_of_a_judge_on_the_text_that_is_left_for_it(model: Path, whole: Frontier) -> None:
    llm = AdaSkipLlama(str(model), n_ctx=JUDGED_AT + 512, verbose=False, **whole.settings.to_kwargs())
    (n_continued, n_copied), cuts, probes = ANSWER, (JUDGED_AT * 7 // 8, JUDGED_AT), list[Probe]()
    for i, item in enumerate(hold_out(llm, [TEXTS], (1, 4), JUDGED_AT + n_continued).judge):
        key = i, (i + 0.5) / 4
        probes += probes_of(llm, item.id, item.tokens, cuts, n_continued=n_continued, n_copied=n_copied, key=key)
    judge = Judge(llm, probes)
    assert whole.points
    for each in whole.points:
        scores = judge(each.plan)
        for kind in KINDS:
            assert getattr(each, kind) == quality_of(probes, scores, kind)
        assert each.passkeys == passkeys_of(probes, scores) and each.passkeys.n == 24
        assert each.judged_at == JUDGED_AT and each.continuation.n_texts == 4
    llm.close()


def test_it_tells_its_texts_speed_tokens_and_duration(done: tuple[Frontier, Calls], whole: Frontier) -> None:
    found, calls = done
    assert len(calls.told) == 1 and "tokens per second. The other stages take about" in calls.told[0]
    assert is_here(found.machine) and found.tried[0].chosen
    searched, judged = (found.about[name].split(", ") for name in ("searched_on", "judged_on"))  # type: ignore[union-attr]
    assert len(searched) == 1 and len(judged) == 2 and {*searched, *judged} < {*TEXTS}, "either part is half of them"
    assert found.about["calibrated_on"] == "manual"
    n_here = sum(calls.tokens.values()) - N_TIMED
    assert found.n_read == pytest.approx(n_here, abs=4)  # llama.cpp counts none as 1
    assert found.n_read < tuning.MOST_TOKENS
    assert calls.timed == [(found.settings, found.choose(JUDGED_AT), JUDGED_AT)] and found.speeds[0].of == "settings"


def test_a_slower_plan_that_loses_more_is_no_point(
    whole: Frontier, monkeypatch: pytest.MonkeyPatch, tune: Tune
) -> None:
    """Here what loses more is slower, by invented speeds."""
    predicted = tuning.Planned.speedup
    monkeypatch.setattr(tuning.Planned, "speedup", lambda *args: 1 / predicted(*args))
    assert len(whole.points) == 2 and [each.plan for each in tune().points] == [whole.points[0].plan]


def test_where_nothing_can_be_skipped_there_are_settings_alone(tiny: Any, calls: Calls, tune: Tune) -> None:
    """The model keeps a state, which cannot be rewound."""
    found = tune(tiny("mamba"), context=1100)
    assert found.points == () and found.choose(5000) is None and calls.timed[0][1] is None
    assert found.n_read == pytest.approx(sum(calls.tokens.values()), abs=4)


def test_each_judged_plan_leaves_fewer_tokens_and_one_is_judged_anyway(
    whole: Frontier, one_promise: OnePromise, tune: Tune, put: Put
) -> None:
    enough = tuning.MOST_TOKENS
    put(MOST_TOKENS=0)
    assert len(whole.points) == 2 and [each.plan for each in tune().points] == [whole.points[0].plan]
    aimed = one_promise(0.05)
    tune()
    assert aimed[0] == pytest.approx(0.9 * 0.85 * 0.05), "with a margin, as it is the last"
    one_promise(9.0)
    put(MOST_TOKENS=enough)
    n_read = tune().n_read
    put(MOST_TOKENS=n_read - 500)
    found = tune()
    assert len(found.points) == 1 and found.n_read < n_read - 500


def test_plans_are_sought_for_what_edits_leave(tune: Tune, put: Put) -> None:
    edits = edited_frontier(0.01).edits
    lengths, aimed, grown = list[int](), list[float](), dict[int, float]()

    def aim(losses: Any, seconds: Any, needs: Any, promise: float) -> None:
        lengths.append(seconds.__wrapped__.keywords["context"])
        aimed.append(promise)
        grown[lengths[-1]] = losses.grown

    put(edit_points=lambda *_: [*edits], _AIMS=AIMS, aim=aim)
    tune()
    assert lengths == [n for _, _, n, _ in AIMS] and {*lengths} == {2048, 8192}
    # In prompts twice as long skipped sublayers are expected to lose 1.3 times as much. Here they are measured after
    # 192 tokens. Nine tenths of the promise are aimed at.
    left = Frontier((), edits=edits).left
    assert grown == pytest.approx({n: 1.3 ** math.log2(n / JUDGED_AT) for n in (2048, 8192)})
    assert aimed == pytest.approx([0.9 * left(n, promise, edited=edited) for promise, edited, n, _ in AIMS])
    assert aimed[0] == aimed[1] == pytest.approx(0.9 * 0.05) and AIMS[0][2] < AIMS[1][2], "the short ones first"
    assert aimed[4] < aimed[0] and AIMS[4][1], "what edits leave"


def test_the_reading_of_the_whole_model_counts_if_edits_were_measured_before(
    tmp_path: Path, tune: Tune, put: Put
) -> None:
    """As in a run that goes on after its edits. Without edits, too, nothing has read the judge's text before."""
    counted = []
    for name, edits in (("none", ()), ("some", edited_frontier(0.01).edits)):
        memo = Memo(str(tmp_path / f"{name}.json"), "key")
        put(edit_points=lambda *_, found=edits: [*found])
        found = tune(memo=memo)
        counted.append(memo.get("read before judging", int, int))
        assert counted[-1] < found.n_read
    assert counted[1] == pytest.approx(counted[0], abs=4) and counted[0] > 4 * JUDGED_AT


def test_plans_need_more_after_long_prompts(one_promise: OnePromise, tune: Tune, put: Put) -> None:
    one_promise(9.0)
    promise = 1.5 * max(each.needs(JUDGED_AT) for each in tune().points)
    for doubled, after_failure in ((1.0, 1.0), (2.0, 0.85)):
        aimed = one_promise(promise, EVERY_SET, IDLE_SET)
        put(_AIMS=[(promise, False, 2 * JUDGED_AT, 0.97)], _growth_of=lambda llm, doubled=doubled: doubled)
        assert {each.growth for each in tune().points} == {doubled}
        assert aimed[1] == pytest.approx(after_failure * aimed[0])


@pytest.mark.parametrize(("architecture", "expected"), [("llama", 1.3), ("gemma3", 1 + 0.3 / 3)])
def test_sliding_windows_make_losses_grow_less(architecture: str, expected: float, open_tiny: Open) -> None:
    """Two of the three attentions of this gemma3 see 8 tokens."""
    assert tuning._growth_of(open_tiny(architecture)) == pytest.approx(expected)


@pytest.fixture
def one_promise(put: Put) -> OnePromise:
    """``one_promise(x, *sets)``: from now on, these are judged in turn for this promise; returns what is aimed at."""

    def one(promise: float, *judged: Candidate) -> list[float]:
        aimed = list[float]()

        def aim(losses: Any, seconds: Any, needs: Any, wanted: float) -> Any:
            aimed.append(wanted)
            return next((each for each in judged or (IDLE_SET, EVERY_SET) if each not in needs), None)

        put(edit_points=lambda *_: [], aim=aim, _AIMS=[(promise, False, JUDGED_AT, 0.97)])
        return aimed

    return one


def test_a_plan_that_is_hardly_faster_is_not_judged(one_promise: OnePromise, tune: Tune, put: Put) -> None:
    """Here the fast plan is judged first."""
    for share, n_judged in ((0.0, 1), (9.0, 2)):
        one_promise(9.0, EVERY_SET, IDLE_SET)
        put(_AIMS=[(9.0, False, JUDGED_AT, share)])
        points = tune().points
        assert len(points) == n_judged
    slow, fast = points
    assert slow.plan.bulk and slow.plan.bulk.skip.attention == () and slow.speedup(JUDGED_AT) < fast.speedup(JUDGED_AT)


def test_a_plan_that_loses_a_key_is_no_point(one_promise: OnePromise, tmp_path: Path, tune: Tune, put: Put) -> None:
    """The text of the lost key comes first then, so that other plans which lose it are found out sooner."""
    judged, memo, judge_plan = list[SkipPlan](), str(tmp_path / "memo.json"), figures.judged_plan
    texts = list[str]()

    def losing(judge: Judge, plan: SkipPlan) -> Any:
        judged.append(plan)
        texts.append(judge.probes[0].text)
        return (judge.probes[-1].text, 0) if plan.skipped("bulk").attention else judge_plan(judge, plan)

    put(judged_plan=losing)
    aimed = one_promise(9.0, EVERY_SET, IDLE_SET)
    found = tune(memo=Memo(memo, "key"))
    assert [each.plan for each in found.points] == judged[1:] and len(judged) == 2
    assert aimed[1] == pytest.approx(0.85 * aimed[0]), "it counts as a failure"
    assert texts[0] != texts[1]
    assert tune(memo=Memo(memo, "key")).points == found.points and len(judged) == 2


def test_sets_are_judged_while_aims_expect_some_and_failures_make_the_margin_larger(
    one_promise: OnePromise, tune: Tune
) -> None:
    aimed = one_promise(9.0)
    every = tune().points
    assert len(aimed) == len(every) + 1  # in vain at the end
    aimed = one_promise(max(each.needs(JUDGED_AT) for each in every) / 0.95)
    assert tune().points == every and len(aimed) == len(every) + 1, "what nearly needs the promise is not enough"
    aimed = one_promise(1e-9, EVERY_SET, Candidate((1,)))
    tune()
    assert aimed == pytest.approx([0.9e-9, 0.9e-9 * 0.85, 0.9e-9 * 0.85**2])


def test_after_each_set_the_first_aims_come_first_again(tune: Tune, put: Put) -> None:
    """A set that was judged for a later aim may show that another one keeps the first promise."""
    asked = list[float]()

    def aim(losses: Any, seconds: Any, needs: Any, wanted: float) -> Any:
        asked.append(wanted)
        is_first = wanted > 1
        return EVERY_SET if is_first and IDLE_SET in needs else None if is_first or needs else IDLE_SET

    aims = [(9.0, False, JUDGED_AT, 9.0), (0.5, False, JUDGED_AT, 9.0)]
    put(edit_points=lambda *_: [], aim=aim, _AIMS=aims)
    assert len(tune().points) == 2
    assert [wanted > 1 for wanted in asked[:3]] == [True, False, True]


def test_the_default_promise_comes_first_and_asks_for_more_speed_there_than_later() -> None:
    """So any plan that keeps it is enough at first, and it is sought again for smaller gains."""
    first = [aim for aim in AIMS if aim[3] == min(share for *_, share in AIMS)]
    assert [*AIMS[: len(first)]] == first and {aim[2] for aim in first} == {aim[2] for aim in AIMS}
    assert all((promise, edited) == (DEFAULT_LOSS, False) for promise, edited, *_ in first)
    assert {aim[:3] for aim in first} <= {aim[:3] for aim in AIMS[len(first) :]}


STAGES = "Trying settings", "Calibrating", "Timing sublayers", "Searching", "Judging"


@pytest.mark.parametrize(("stopped_in", "kept"), [("Searching", 3), ("Judging", 4), ("Measuring the speed", 5)])
def test_a_run_that_was_stopped_goes_on(
    stopped_in: str, kept: int, calls: Calls, whole: Frontier, tmp_path: Path, tune: Tune
) -> None:
    memo, on_stage = str(tmp_path / "memo.json"), calls.on_stage

    @contextmanager
    def stopping(name: str) -> Iterator[OnProgress]:
        if name == stopped_in:
            raise KeyboardInterrupt
        with on_stage(name) as move:
            yield move

    with pytest.raises(KeyboardInterrupt):
        tune(memo=Memo(memo, "key"), on_stage=stopping)
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {"memo", "memo-profile"}
    calls.tokens.clear()
    found = tune(memo=Memo(memo, "key"))
    assert all(calls.tokens.get(stage, 0) == 0 for stage in STAGES[:kept])
    assert all(calls.tokens[stage] > 0 for stage in STAGES[max(kept, 3) :])
    assert replace(found, n_read=0, tried=()) == replace(whole, n_read=0, tried=())
    assert found.n_read == pytest.approx(whole.n_read, abs=8)  # of each opened model llama.cpp counts up to 2 too many


def test_a_stopped_run_judges_the_same_sets(one_promise: OnePromise, tmp_path: Path, tune: Tune, put: Put) -> None:
    """Tokens suffice for two sets. What was read again after the stop does not count, nor does what the memo has."""
    aimed, judged, judge_plan = one_promise(9.0), list[SkipPlan](), figures.judged_plan
    memo = partial(Memo, str(tmp_path / "memo.json"), "key")
    whole = tune()
    put(MOST_TOKENS=whole.n_read + 500)
    assert tune().points == whole.points and len(whole.points) == 2
    of_whole = aimed[-2:]

    def stopping(judge: Judge, plan: SkipPlan) -> Any:
        judged.append(plan)
        if len(judged) == 2:
            raise KeyboardInterrupt
        return judge_plan(judge, plan)

    put(judged_plan=stopping)
    with pytest.raises(KeyboardInterrupt):
        tune(memo=memo())
    assert tune(memo=memo()).points == whole.points and aimed[-2:] == of_whole
    assert len(judged) == 3, "the first once, the second twice"


def test_too_little_text_and_too_few_positions_are_refused(tiny: Any, calls: Calls, tune: Tune) -> None:
    with pytest.raises(DataError, match=r"too little text .* give at least [\d,]+ tokens in all, in texts of 256"):
        tune(texts={"short": "the of to " * 50})
    with pytest.raises(DataError, match=rf"context has {N_CTX_TRAIN} tokens.*take a model with more positions"):
        tune(tiny("gpt2"))
    assert calls.tokens == {}, "before settings are tried, which takes minutes"
