"""adaskip_cpp.tuning: the parts of the held-out text, and the tuner with invented judges and times."""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

import adaskip_cpp.tuning.speed
import adaskip_cpp.tuning.tuner
from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.errors import DataError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring.tasks import TextItem
from adaskip_cpp.measuring.text_quality import TextScores
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.identity import ModelInfo
from adaskip_cpp.model.plan_file import PlanFile
from adaskip_cpp.model.promise import Promise, SpeedUp
from adaskip_cpp.model.statistics import PhaseStatistics
from adaskip_cpp.planning.request import PlanRequest
from adaskip_cpp.tuning.hold_out import HeldOut, hold_out
from adaskip_cpp.tuning.speed import measure_speed
from adaskip_cpp.tuning.tuner import Tuner

# --- the parts of the held-out text -----------------------------------------------------------------------------------


class Bytes:
    """A byte is a token; BOS is 256."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [256] * add_bos + list(text)


def letters(part: Sequence[TextItem]) -> set[str]:
    return {chr(token) for item in part for token in item.tokens[1:]}


def test_of_many_texts_each_goes_to_one_part_whole() -> None:
    held_out = hold_out(Bytes(), {name: name * 300 for name in "abcdefg"}, 4, 50)
    parts = (held_out.search, held_out.confirm, held_out.report)
    assert [len(part) for part in parts] == [4, 4, 4]
    assert all(not letters(a) & letters(b) for a, b in itertools.combinations(parts, 2))
    assert [set(names.split(", ")) for names in held_out.names().values()] == [letters(part) for part in parts]


def test_of_few_texts_each_is_cut_in_three() -> None:
    held_out = hold_out(Bytes(), {"a": "x" * 300 + "y" * 300 + "z" * 300}, 3, 50)
    assert [letters(part) for part in (held_out.search, held_out.confirm, held_out.report)] == [{"x"}, {"y"}, {"z"}]


def test_too_little_text_for_three_parts_is_cut_in_two() -> None:
    held_out = hold_out(Bytes(), {"a": "x" * 150 + "y" * 150}, 3, 50)
    assert (letters(held_out.search), letters(held_out.confirm), held_out.report) == ({"x"}, {"y"}, ())
    assert held_out.names()["reported_on"] == held_out.names()["confirmed_on"] == "a, part 2 of 2"


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(DataError, match=r"half.*gives 2 items of 50 tokens, not the 9"):
        hold_out(Bytes(), {"a": "x" * 200}, 9, 50)


# --- the tuner, with invented judges ----------------------------------------------------------------------------------

N_LAYER = 8
HARM = {"search": 0.01, "confirm": 0.02, "report": 0.03}
"""Nats that a skipped sublayer costs on each part's text."""


class InventedQuality:
    """Stands in for TextQuality: the harm is that of the part which the texts are of. Notes what was judged by what."""

    judged: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, llm: Any, texts: Sequence[Sequence[int]], mode: str, *, advance: Any) -> None:
        self.part = list(HARM)[texts[0][0]]
        self.n_texts, self.n_tokens = len(texts), 100

    def scores(self, plan: SkipPlan) -> TextScores:
        self.judged.append((self.part, plan.decode.n_skip))
        loss = plan.decode.n_skip * HARM[self.part]
        return TextScores(np.full(self.n_texts, loss), np.full(self.n_texts, 1 - loss))


def tune(monkeypatch: pytest.MonkeyPatch, promise: Promise, parts: tuple[str, ...] = tuple(HARM)) -> PlanFile:
    monkeypatch.setattr(adaskip_cpp.tuning.tuner, "TextQuality", InventedQuality)
    InventedQuality.judged.clear()
    similarity = np.linspace(0.99, 0.5, 2 * N_LAYER).reshape(N_LAYER, 2)
    ones = np.ones((N_LAYER, 2))
    statistics = PhaseStatistics(similarity, ones, ones, np.ones(N_LAYER), n_tokens=10)
    profile = Profile(statistics, statistics, 1, 10, ModelInfo("ab" * 32, "llama", N_LAYER), cost=Cost())  # type: ignore[arg-type]
    texts = [tuple(TextItem(f"text/{part}/9/{i}", "text", (n,) * 9) for i in range(4)) for n, part in enumerate(parts)]
    request = PlanRequest(compensation="none", online=False)
    tuner = Tuner(None, profile, promise, HeldOut(*texts), request, n_exchange=0)  # type: ignore[arg-type]

    def measure(plan: SkipPlan) -> tuple[SpeedUp, ...]:
        return (SpeedUp("request", 9, 9, Interval(16 / (16 - plan.decode.n_skip), 1.0, 9.0, 5)),)

    return tuner.tune(measure)


class Cost:
    """Every sublayer that runs takes a second of a prompt."""

    n_layer = N_LAYER

    def seconds(self, skip: Any, context: int, phase: str) -> float:
        return 16.0 - (0 if skip is None else skip.sum()) if phase == "prefill" else 0.0


def test_what_is_reported_is_of_text_that_decided_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune(monkeypatch, Promise("max_loss", 0.11))
    # The search's text allows 10 or 11 sublayers, the text that confirms 5, and on the third these cost 0.15.
    assert found.plan.decode.n_skip == 5 and found.tuning is not None
    assert found.tuning.loss.value == pytest.approx(0.15) and found.tuning.agreement.value == pytest.approx(0.85)
    assert found.tuning.unbiased and found.tuning.kept == "no"
    assert (found.tuning.n_texts, found.tuning.n_tokens) == (4, 100)
    assert [judged for judged in InventedQuality.judged if judged[0] == "report"] == [("report", 5)]
    assert found.tuning.settings["reported_on"] == "report" and found.tuning.settings["tokens_per_text"] == 9


def test_without_a_third_part_it_is_told_that_the_text_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune(monkeypatch, Promise("max_loss", 0.11), ("search", "confirm"))
    assert found.plan.decode.n_skip == 5 and found.tuning is not None
    assert found.tuning.loss.value == pytest.approx(0.1)
    assert not found.tuning.unbiased and found.tuning.settings["reported_on"] == "confirm"


def test_a_speed_up_is_searched_by_one_text_and_reported_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune(monkeypatch, Promise("speedup", 1.25), ("search", "confirm"))
    assert found.plan.decode.n_skip == 4 and found.tuning is not None
    assert found.tuning.loss.value == pytest.approx(4 * HARM["confirm"]) and found.tuning.unbiased
    assert {part for part, _ in InventedQuality.judged[:-1]} == {"search"}


def test_where_nothing_keeps_the_promise_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune(monkeypatch, Promise("max_loss", 0.005))
    assert found.plan.decode.n_skip == 0 and found.tuning is not None
    assert found.tuning.n_texts == 0 and found.tuning.speedups == () and found.tuning.kept == "yes"


# --- the speed --------------------------------------------------------------------------------------------------------


def test_speed_is_measured_in_turn_and_without_the_first_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Model:
        plan: Any = None
        order: ClassVar[list[Any]] = []

        def set_plan(self, plan: Any) -> None:
            self.plan = plan

        def reset(self) -> None: ...

    def time_request(llm: Model, prompt: Any, n_decode: int) -> RequestTime:
        llm.order.append(llm.plan)
        first = len(llm.order) <= 2
        speed = 1 if llm.plan is None else 2
        return RequestTime(99.0 if first else 8.0 / speed, (1.0 / speed,) * n_decode)

    monkeypatch.setattr(adaskip_cpp.tuning.speed, "time_request", time_request)
    plan = SkipPlan.manual(3, ffn=[1])
    first, decode, request = measure_speed(Model(), plan, [1] * 7, 4, n_rounds=4)  # type: ignore[arg-type]
    assert Model.order == [None, plan, None, plan, plan, None, None, plan, plan, None]
    assert [each.of for each in (first, decode, request)] == ["first token", "decode", "request"]
    assert all(each.ratio.value == pytest.approx(2.0) and each.ratio.n == 4 for each in (first, decode, request))
    assert (request.context, request.n_decode) == (7, 4)
