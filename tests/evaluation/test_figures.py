"""Figures of an evaluation from made-up results of single items, computed by hand."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from adaskip_cpp import SkipPlan
from adaskip_cpp.evaluation.contenders import FULL, Contender
from adaskip_cpp.evaluation.evaluate import Record, Work, seconds_of
from adaskip_cpp.evaluation.figures import evaluation_results
from adaskip_cpp.evaluation.results import About, Results
from adaskip_cpp.evaluation.tables import summary, tables
from adaskip_cpp.measuring.tasks import QuestionItem, TextItem
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION

ADASKIP = Contender("adaskip-1-prefill-affine", "adaskip", "1", "prefill", "affine", SkipPlan.manual(3, attention=[1]))
EXIT = Contender("early_exit-2-e2e", "early_exit", "2", "e2e", "none", SkipPlan.manual(3, attention=[2], ffn=[2]))
NAMES = {"full": FULL.name, "adaskip": ADASKIP.name, "early_exit": EXIT.name}
TEXTS = [TextItem(f"t{i}", "text", (1,) * 20) for i in range(3)]
Found = dict[Any, Any]


def question(name: str, task: str = "passkey") -> QuestionItem:
    return QuestionItem(name, task, (1, 2), ("a",), 4, "contains")


def records(measure: str, item: str = "t", **by_contender: list[Any]) -> Found:
    """One record per item: ``full=[...]``, ``adaskip=[...]``, ``early_exit=[...]``."""
    found = {}
    for name, each in by_contender.items():
        for i, values in enumerate(each):
            found[f"{item}{i}", NAMES[name], measure] = Record(values)
    return found


def losses(*values: float, **more: list[float]) -> list[dict[str, float]]:
    return [{"loss": value, **{name: each[i] for name, each in more.items()}} for i, value in enumerate(values)]


def results(found: Found, questions: Sequence[QuestionItem] = (), texts: Sequence[TextItem] = TEXTS) -> Results:
    work = Work((FULL, ADASKIP, EXIT), texts, questions, 10, (1, 2), n_rounds=2)
    return evaluation_results(work, found, About("T", "A", {}, "c", {}))


def row(found: Results, strategy: str) -> dict[str, Any]:
    """A contender as it stands in results.json."""
    return next(each for each in json.loads(found.to_json())["contenders"] if each["strategy"] == strategy)


def cells(found: Results, title: str, index: int) -> dict[str, str]:
    """A row of the table of this title, by heading."""
    table = next(each for each in tables(found) if each.title == title)
    return dict(zip(table.header, table.rows[index], strict=True))


def test_losses_are_means_over_items_and_added_losses_are_paired_over_those_that_both_have() -> None:
    found = results(records("continuation", full=losses(1.0, 2.0), adaskip=losses(2.0, 4.0, 100.0)))
    of_full = row(found, "full")["text"]["all"]
    assert of_full["loss"] == {"mean": 1.5, "error": 0.5, "n": 2}
    # The differences are 1 and 2, so the error is 0.5. That of unpaired items is more than twice as large.
    assert row(found, "adaskip")["text"]["all"]["added_loss"] == {"mean": 1.5, "error": 0.5, "n": 2}
    # The derivative of the exponential is itself.
    perplexity = {"mean": pytest.approx(math.exp(1.5)), "error": pytest.approx(math.exp(1.5) * 0.5), "n": 2}
    assert of_full["perplexity"] == perplexity


def test_what_is_no_number_leaves_no_mean_instead_of_a_better_one_and_no_tails() -> None:
    bad = [{"loss": None, "kl": None, "agreement": 0.0}]
    found = records("continuation", full=losses(1.0, 1.0), adaskip=losses(2.0, kl=[1.0]) + bad)
    key = "t1", ADASKIP.name, "continuation"
    found[key] = msgspec.structs.replace(found[key], divergences=(0.1, None))
    figures = row(results(found), "adaskip")["text"]["all"]
    assert not figures.keys() & {"loss", "added_loss", "kl", "kl_99"}
    assert figures["agreement"]["mean"] == 0.0


def test_kinds_of_text_are_told_apart_where_there_are_several() -> None:
    texts = [TextItem("t0", "pages", (1,) * 20), TextItem("t1", "sources", (1,) * 20)]
    found = results(records("continuation", full=losses(1.0, 3.0), adaskip=losses(2.0, 5.0)), texts=texts)
    added = {kind: each["added_loss"]["mean"] for kind, each in row(found, "adaskip")["text"].items()}
    assert added == {"all": 1.5, "pages": 1.0, "sources": 2.0}
    shown = {"contender": "AdaSkip affine, 1", "mode": "prefill", "pages": "+1.000", "sources": "+2.000"}
    assert cells(found, "By kind of text", 0) == shown


def test_tails_are_quantiles_over_the_tokens_of_all_items() -> None:
    # Numbered from 0 to 1000, the quantile of 99% is the number 990, that of 99.9% the number 999.
    tokens = [i / 1000 for i in range(1001)]
    found = records("continuation", full=losses(1.0, 1.0), early_exit=losses(1.0, 1.0))
    for i in range(2):
        key = f"t{i}", EXIT.name, "continuation"
        found[key] = msgspec.structs.replace(found[key], divergences=tuple(tokens[i::2]))
    figures = row(results(found), "early_exit")["text"]["all"]
    assert figures["kl_99"] == {"mean": pytest.approx(0.99), "error": None, "n": 1001}
    assert figures["kl_99.9"]["mean"] == pytest.approx(0.999)
    shown = cells(results(found), "Mode e2e", 1)
    assert (shown["KL 99%, nats"], shown["KL 99.9%, nats"]) == ("0.99", "1.00")


def seconds(first: float, *rest: float) -> Any:
    return seconds_of(RequestTime(first, rest))


def test_speed_ups_are_ratios_within_a_round() -> None:
    full = [seconds(2, 9, 9, 0.2, 0.4), seconds(4, 18, 18, 0.4, 0.8)]
    found = records("speed", "round/", full=full, adaskip=[seconds(1, 5, 5, 0.1, 0.1), seconds(2, 10, 10, 0.2, 0.2)])
    speed = row(results(found), "adaskip")["speed"]
    assert speed["first_token"]["speedup"]["value"] == pytest.approx(2.0) and speed["first_token"]["speedup"]["n"] == 2
    assert speed["first_token"]["seconds"]["mean"] == pytest.approx(1.5)
    # the mean of the tokens after the first two, which build the graph
    assert speed["per_token"]["speedup"]["value"] == pytest.approx(0.3 / 0.1)
    assert speed["request"]["speedup"]["value"] == pytest.approx(20.6 / 11.2)


def test_scores_are_by_task_and_answers_that_stay_the_same_are_counted_by_text_and_by_score() -> None:
    answers = {
        FULL.name: [("Ada", 1.0), ("Bea", 0.0), ("Cleo", 0.5), ("Dora", 1.0)],
        ADASKIP.name: [(" Ada\n", 1.0), ("bea", 0.0), ("Dora", 0.5)],  # the last question is not answered yet
    }
    found: Found = {
        (f"t{i}", name, "answer"): Record({"score": score}, text)
        for name, each in answers.items()
        for i, (text, score) in enumerate(each)
    }
    shown = results(found, [*(question(f"t{i}") for i in range(3)), question("t3", "copy")], texts=[])
    assert [*row(shown, "full")["questions"]] == ["passkey", "copy"]
    scores = row(shown, "adaskip")["questions"]
    assert [*scores] == ["passkey"] and scores["passkey"]["score"]["mean"] == pytest.approx(0.5)
    assert scores["passkey"]["same_score"]["mean"] == 1.0 and scores["passkey"]["same_answer"]["n"] == 3
    assert cells(shown, "Answers that stay the same", 0)["passkey"] == "33.3 / 100.0"


@pytest.fixture
def some() -> Results:
    found = records(
        "continuation",
        full=losses(1.0, 2.0, 3.0, kl=[0.0] * 3, agreement=[1.0] * 3),
        adaskip=losses(1.5, 2.4, 3.6, kl=[0.1, 0.2, 0.3], agreement=[0.9, 0.8, 0.7]),
        early_exit=losses(9.0, 9.0, 9.0, kl=[6.0] * 3, agreement=[0.0] * 3),
    )
    times = {name: [seconds(1.0 + i, *[0.1] * 4)] * 2 for i, name in enumerate(NAMES)}
    return results(found | records("speed", "round/", **times))


def test_a_modes_table_begins_with_the_full_model_and_modes_without_a_contender_have_none(some: Results) -> None:
    for each in (tables(some), summary(some)):
        assert [table.title for table in each] == ["Mode prefill", "Mode e2e"]
    table = tables(some)[0]
    assert "in the prompt and in the answer" in table.text and "3 items" in table.text
    assert table.rows[0][0] == "whole model"
    expected = {
        "skipped": "1",
        "first token, times as fast": "0.50 (0.50–0.50)",
        "loss, nats": "2.500 ± 0.608",
        "added loss": "+0.500 ± 0.058",
        "agreement, %": "80.0 ± 5.8",
    }
    assert cells(some, "Mode prefill", 1).items() >= expected.items()


def test_a_summary_has_speed_loss_and_agreement_and_of_questions_the_scores(some: Results) -> None:
    table = summary(some)[0]
    assert table.header == ("contender", "first token, times as fast", "added loss", "agreement, %")
    assert table.rows[0] == ("whole model", "1", "", "")
    assert table.rows[1][1:] == ("0.50 (0.50–0.50)", "+0.500 ± 0.058", "80.0 ± 5.8")
    scores = records("answer", full=[{"score": 1.0}] * 2, adaskip=[{"score": 1.0}, {"score": 0.0}])
    [table] = summary(results(scores, [question("t0"), question("t1")], texts=[]))
    assert (table.title, table.header[3:]) == ("Questions", ("passkey (2)",))
    assert [row[3] for row in table.rows[:2]] == ["100.0 ± 0.0", "50.0 ± 50.0"]


def test_results_count_what_is_there_and_without_timing_there_is_no_speed(some: Results) -> None:
    assert some.n_done == some.n_results == 3 * 3 + 2 * 3 and msgspec.json.decode(some.to_json(), type=Results) == some
    assert results({}).n_done == 0 and row(results({}), "adaskip")["speed"] == {}


def test_compensations_look_different() -> None:
    looks = {name: replace(ADASKIP, compensation=name).look for name in COMPENSATIONS}
    assert looks[DEFAULT_COMPENSATION] == "adaskip" and EXIT.look == "early_exit"
    assert len({*looks.values()}) == len(looks)
