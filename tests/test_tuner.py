"""adaskip_cpp.tuning: the parts of the held-out text, and the tuner with invented judges and times."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

import adaskip_cpp.tuning.speed
import adaskip_cpp.tuning.tuner
from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.cli.tune_report import print_tuning
from adaskip_cpp.errors import BudgetError, DataError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring.tasks import QuestionItem, TextItem
from adaskip_cpp.measuring.text_quality import TextScores
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.identity import ModelInfo
from adaskip_cpp.model.plan_file import PlanFile
from adaskip_cpp.model.promise import Passkeys, Promise, SpeedUp
from adaskip_cpp.model.statistics import PhaseStatistics
from adaskip_cpp.planning.request import PlanRequest
from adaskip_cpp.tuning.hold_out import HeldOut, hold_out, hold_out_kinds
from adaskip_cpp.tuning.passkeys import Retrieval
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


def test_each_part_has_as_much_of_every_kind_of_text() -> None:
    kinds = [{"a": "x" * 900}, {"b": "y" * 900}]
    held_out = hold_out_kinds(Bytes(), kinds, 5, 50)
    for part in (held_out.search, held_out.confirm, held_out.report):
        assert [chr(item.tokens[1]) for item in part] == ["x", "x", "x", "y", "y"]
    small = hold_out_kinds(Bytes(), [{"a": "x" * 9}, {"b": "y" * 900}], 5, 50)
    assert letters(small.search) == {"y"} and len(small.report) == 5


# --- the tuner, with invented judges ----------------------------------------------------------------------------------

N_LAYER = 8
HARM = {"search": 0.01, "confirm": 0.02, "report": 0.03}
"""Nats that a skipped sublayer costs on each part's text."""


class InventedQuality:
    """Stands in for TextQuality: the harm is that of the part which the texts are of. Notes what was judged by what."""

    judged: ClassVar[list[tuple[str, int]]] = []
    spread: ClassVar[float] = 0.0  # by how much the loss differs from text to text
    divergence_share: ClassVar[float] = 0.5  # of the mean loss

    def __init__(self, llm: Any, texts: Sequence[Sequence[int]], mode: str, *, advance: Any) -> None:
        self.part = list(HARM)[texts[0][0]]
        self.n_texts, self.n_tokens = len(texts), 100

    def scores(self, plan: SkipPlan, *, divergence: bool = False) -> TextScores:
        n = n_skipped(plan)
        self.judged.append((self.part, n))
        loss = n * HARM[self.part]
        kl = np.full(self.n_texts, loss * self.divergence_share) if divergence else None
        varies = 1 + self.spread * np.resize([1, -1], self.n_texts)
        return TextScores(loss * varies, np.full(self.n_texts, 1 - loss), kl)


def n_skipped(plan: SkipPlan) -> int:
    return plan.skipped("decode").n_skip if plan.bulk is None else plan.bulk.skip.n_skip


def tune(
    monkeypatch: pytest.MonkeyPatch, promise: Promise, parts: tuple[str, ...] = tuple(HARM), **more: Any
) -> PlanFile:
    monkeypatch.setattr(adaskip_cpp.tuning.tuner, "TextQuality", InventedQuality)
    InventedQuality.judged.clear()
    similarity = np.linspace(0.99, 0.5, 2 * N_LAYER).reshape(N_LAYER, 2)
    ones = np.ones((N_LAYER, 2))
    statistics = PhaseStatistics(similarity, ones, ones, np.ones(N_LAYER), n_tokens=10)
    profile = Profile(
        statistics, statistics, 1, 10, ModelInfo("ab" * 32, "llama", N_LAYER), cost=Cost(),  # type: ignore[arg-type]
        divergence=more.pop("divergence", None),
    )  # fmt: skip
    texts = [tuple(TextItem(f"text/{part}/9/{i}", "text", (n,) * 9) for i in range(4)) for n, part in enumerate(parts)]
    request = PlanRequest(mode=more.pop("mode", "e2e"), compensation="none", online=False)
    tuner = Tuner(None, profile, promise, HeldOut(*texts), request, n_exchange=0, **more)  # type: ignore[arg-type]

    def measure(plan: SkipPlan) -> tuple[SpeedUp, ...]:
        return (SpeedUp("request", 9, 9, Interval(16 / (16 - n_skipped(plan)), 1.0, 9.0, 5)),)

    return tuner.tune(measure)


class Cost:
    """Every sublayer that runs takes a second of a prompt."""

    n_layer = N_LAYER

    def seconds(self, skip: Any, context: int, phase: str, around: Any = None) -> float:
        if phase == "decode":
            return 0.0
        last = slice(0, -1 if phase == "bulk" else None)  # the last layer of a bulk does not run anyhow
        return 16.0 - (0 if skip is None else skip[last].sum())


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


# --- in the prompt mode -----------------------------------------------------------------------------------------------

DIVERGENCE = np.full((N_LAYER, 2), 0.01)
"""Of the first of the ranking together it is what the search's text loses."""


def key(n: int) -> QuestionItem:
    return QuestionItem(f"passkey/{n}", "passkey", (n,) * 20, ("12345",), 8, "contains")


def asked(monkeypatch: pytest.MonkeyPatch, most: dict[int, int]) -> list[tuple[int, int]]:
    """Let key n be found by whatever skips at most ``most[n]`` sublayers; returns what was asked, by what."""
    asked = []

    def finds(self: Retrieval, plan: SkipPlan | None, item: QuestionItem) -> bool:
        n_skip = 0 if plan is None else n_skipped(plan)
        asked.append((item.prompt[0], n_skip))
        return n_skip <= most[item.prompt[0]]

    monkeypatch.setattr(Retrieval, "_finds", finds)
    return asked


def test_in_prompt_mode_the_bulk_skips_by_divergence_times_the_layers_above(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune(monkeypatch, Promise("max_loss", 0.115), mode="prompt", divergence=DIVERGENCE)
    # 11 are predicted and found for the search's text. The text that confirms allows 5. Of the last layer nothing is
    # saved, and those below it have the fewest layers above them.
    assert found.plan.bulk is not None and found.plan.decode.n_skip == found.plan.prefill.n_skip == 0
    assert (found.plan.bulk.skip.attention, found.plan.bulk.skip.ffn) == ((4, 5, 6), (5, 6))
    numbers = {part: [n for name, n in InventedQuality.judged if name == part] for part in HARM}
    assert numbers == {"search": [11, 12], "confirm": [11, 5, 6], "report": [5]}
    assert found.tuning is not None and found.tuning.divergence is not None and found.tuning.passkeys is None
    assert found.tuning.divergence.value == pytest.approx(found.tuning.loss.value / 2)


@pytest.mark.parametrize(
    ("share", "spread", "n"), [(1.0, 20.0, 5), (2.0, 20.0, 2), (0.5, 20.0, 11), (0.5, 0.0, 5), (0.5, 0.1, 7)]
)
def test_in_prompt_mode_a_loss_is_judged_by_the_divergence_and_by_what_is_more_beyond_chance(
    monkeypatch: pytest.MonkeyPatch, share: float, spread: float, n: int
) -> None:
    # Of the confirming text a sublayer costs 0.02 nats on average, and 0.42 or -0.38 on one: its interval allows none.
    monkeypatch.setattr(InventedQuality, "spread", spread)
    monkeypatch.setattr(InventedQuality, "divergence_share", share)
    found = tune(monkeypatch, Promise("max_loss", 0.115), mode="prompt", divergence=DIVERGENCE)
    assert n_skipped(found.plan) == n
    monkeypatch.setattr(InventedQuality, "spread", 20.0)
    whole = tune(monkeypatch, Promise("max_loss", 0.115), mode="e2e")
    assert n_skipped(whole.plan) == 0


def test_without_divergence_the_papers_ranking_and_bisection_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune(monkeypatch, Promise("max_loss", 0.115), mode="prompt")
    assert found.plan.bulk is not None and (found.plan.bulk.skip.attention, found.plan.bulk.skip.ffn) == (
        (0, 1, 2),
        (0, 1),
    )


def test_a_plan_that_loses_a_pass_key_is_backed_off_until_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    log = asked(monkeypatch, {0: 16, 1: 2, 2: -1})
    found = tune(
        monkeypatch,
        Promise("max_loss", 0.115),
        mode="prompt",
        divergence=DIVERGENCE,
        passkeys=[key(n) for n in range(3)],
    )
    assert found.plan.bulk is not None and found.plan.bulk.skip.n_skip == 2
    assert found.tuning is not None and found.tuning.passkeys == Passkeys(3, 2, 2)
    # The full model does not find the third, which nobody asks for then; what was lost is asked for first.
    assert log == [(0, 0), (1, 0), (2, 0), (0, 5), (1, 5), (1, 4), (1, 2), (0, 2)]


def test_where_pass_keys_leave_nothing_to_skip_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, {0: 0})
    found = tune(
        monkeypatch, Promise("max_loss", 0.115), mode="prompt", divergence=DIVERGENCE, passkeys=[key(0)],
    )  # fmt: skip
    assert found.plan.is_whole and found.tuning is not None and found.tuning.passkeys == Passkeys(1, 1, 1)
    told = []
    for tuning in (found.tuning, replace(found.tuning, passkeys=None)):
        out = Console(file=io.StringIO(), width=200)
        print_tuning(out, tuning)
        told.append(out.file.getvalue())  # type: ignore[attr-defined]
    assert "loses a pass key that the full model finds" in told[0] and "--allow-lost-passkeys" in told[0]
    assert "No skipping keeps this promise" in told[1] and "pass key" not in told[1]


def test_lost_pass_keys_may_be_allowed_and_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, {0: 16, 1: 2})
    found = tune(
        monkeypatch, Promise("max_loss", 0.115), mode="prompt", divergence=DIVERGENCE, passkeys=[key(0), key(1)],
        may_lose_passkeys=True,
    )  # fmt: skip
    assert found.plan.bulk is not None and found.plan.bulk.skip.n_skip == 5
    assert found.tuning is not None and found.tuning.passkeys == Passkeys(2, 2, 1)


def test_a_speed_up_that_loses_a_pass_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, {0: 2})
    with pytest.raises(BudgetError, match="allow-lost-passkeys"):
        tune(monkeypatch, Promise("speedup", 1.3), mode="prompt", divergence=DIVERGENCE, passkeys=[key(0)])


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
