"""Figures of an evaluation from made-up results of single items, computed by hand."""

import json
import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from adaskip_cpp import SkipPlan
from adaskip_cpp.evaluation.contenders import FULL, Contender
from adaskip_cpp.evaluation.evaluate import Work, seconds_of
from adaskip_cpp.evaluation.figures import evaluation_results
from adaskip_cpp.evaluation.results import About, Figure, Results, Row, TaskScores
from adaskip_cpp.evaluation.store import Record
from adaskip_cpp.evaluation.tables import summary, tables
from adaskip_cpp.measuring.tasks import QuestionItem, TextItem
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION

PLAN = SkipPlan.manual(3, attention=[1])
ADASKIP = Contender("adaskip-1-prefill-affine", "adaskip", "1", "prefill", "affine", PLAN)
EXIT = Contender("early_exit-2-e2e", "early_exit", "2", "e2e", "none", SkipPlan.manual(3, attention=[2], ffn=[2]))
NAMES = (FULL.name, ADASKIP.name, EXIT.name)
TEXTS = [TextItem(f"t{i}", "text", (1,) * 20) for i in range(3)]
ABOUT = About("T", "A", {}, "c", {})


def question(name: str, task: str = "passkey") -> QuestionItem:
    return QuestionItem(name, task, (1, 2), ("a",), 4, "contains")


def records(measure: str, **by_contender: list[dict[str, Any]]) -> dict[Any, Any]:
    """One record per item: ``full=[...]``, ``adaskip=[...]``, ``early_exit=[...]``."""
    names = {name.split("-")[0]: name for name in NAMES}
    return {
        (f"t{i}", names[name], measure): Record(f"t{i}", names[name], measure, values)
        for name, each in by_contender.items()
        for i, values in enumerate(each)
    }


def losses(*values: float, **more: list[float]) -> list[dict[str, float]]:
    return [{"loss": value, **{name: each[i] for name, each in more.items()}} for i, value in enumerate(values)]


def results(
    found: dict[Any, Any], questions: list[QuestionItem] | None = None, texts: list[TextItem] = TEXTS, n_rounds: int = 2
) -> Results:
    work = Work((FULL, ADASKIP, EXIT), texts, questions or [], 10, (1, 2), n_rounds)
    return evaluation_results(work, found, ABOUT)


def row(found: Results, strategy: str) -> dict[str, Any]:
    """A contender as it stands in results.json."""
    return next(each for each in json.loads(found.to_json())["contenders"] if each["strategy"] == strategy)


# --- text -------------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_items_with_its_standard_error() -> None:
    found = results(records("continuation", full=losses(1.0, 2.0, 6.0)))
    # deviations -2, -1, 3: variance 14 / 2, error sqrt(7 / 3)
    expected = {"mean": 3.0, "error": pytest.approx(math.sqrt(7 / 3)), "n": 3}
    assert row(found, "full")["text"]["all"]["loss"] == expected


def test_added_loss_is_paired_over_the_items_that_both_have() -> None:
    found = results(records("continuation", full=losses(1.0, 2.0), adaskip=losses(2.0, 4.0, 100.0)))
    # The differences are 1 and 2, so the error is 0.5. That of unpaired items is more than twice as large.
    assert row(found, "adaskip")["text"]["all"]["added_loss"] == {"mean": 1.5, "error": 0.5, "n": 2}


def test_perplexity_is_the_exponential_of_the_mean_loss_and_its_error_follows() -> None:
    found = results(records("continuation", full=losses(2.0, 2.5, 3.0)))
    perplexity = row(found, "full")["text"]["all"]["perplexity"]
    error = 0.5 / math.sqrt(3)
    assert perplexity["mean"] == pytest.approx(math.exp(2.5))
    assert perplexity["error"] == pytest.approx((math.exp(2.5 + 1e-6 * error) - math.exp(2.5)) / 1e-6, rel=1e-4)


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
    figures = row(found, "adaskip")["text"]
    added = {kind: each["added_loss"]["mean"] for kind, each in figures.items()}
    assert added == {"all": 1.5, "pages": 1.0, "sources": 2.0}
    table = next(each for each in tables(found) if each.title == "By kind of text")
    assert table.header == ("contender", "mode", "pages", "sources")
    assert table.rows[0] == ("AdaSkip affine, 1", "prefill", "+1.000", "+2.000")


def test_tails_are_quantiles_over_the_tokens_of_all_items() -> None:
    # Numbered from 0 to 1000, the quantile of 99% is the number 990, that of 99.9% the number 999.
    tokens = [i / 1000 for i in range(1001)]
    pieces = [tokens[::2], tokens[1::2], []]
    found = results(
        {
            (f"t{i}", name, "continuation"): Record(f"t{i}", name, "continuation", {"loss": 1.0}, "", tuple(piece))
            for name in NAMES
            for i, piece in enumerate(pieces)
        }
    )
    figures = row(found, "early_exit")["text"]["all"]
    assert figures["kl_99"] == {"mean": pytest.approx(0.99), "error": None, "n": 1001}
    assert figures["kl_99.9"]["mean"] == pytest.approx(0.999)
    table = next(each for each in tables(found) if each.title == "Mode e2e")
    cells = dict(zip(table.header, table.rows[1], strict=True))
    assert (cells["KL 99%, nats"], cells["KL 99.9%, nats"]) == ("0.99", "1.00")


# --- speed ------------------------------------------------------------------------------------------------------------


def rounds(*times: dict[str, tuple[float, list[float]]]) -> dict[Any, Any]:
    names = {name.split("-")[0]: name for name in NAMES}
    return {
        (f"round/{i}", names[name], "speed"): Record(
            f"round/{i}", names[name], "speed", seconds_of(RequestTime(first, tuple(rest)))
        )
        for i, each in enumerate(times)
        for name, (first, rest) in each.items()
    }


def test_speed_ups_are_ratios_within_a_round() -> None:
    slow = {"full": (2.0, [9.0, 9.0, 0.2, 0.4]), "adaskip": (1.0, [5.0, 5.0, 0.1, 0.1])}
    twice = {name: (2 * first, [2 * each for each in rest]) for name, (first, rest) in slow.items()}
    speed = row(results(rounds(slow, twice)), "adaskip")["speed"]
    assert speed["first_token"]["speedup"]["value"] == pytest.approx(2.0) and speed["first_token"]["speedup"]["n"] == 2
    assert speed["first_token"]["seconds"]["mean"] == pytest.approx(1.5)
    # the mean of the tokens after the first two, which build the graph
    assert speed["per_token"]["speedup"]["value"] == pytest.approx(0.3 / 0.1)
    assert speed["request"]["speedup"]["value"] == pytest.approx(20.6 / 11.2)


# --- questions --------------------------------------------------------------------------------------------------------


def test_scores_are_by_task() -> None:
    items = [question("t0"), question("t1"), question("t2", "copy")]
    found = records(
        "answer", full=[{"score": 1.0}, {"score": 0.5}, {"score": 0.2}], adaskip=[{"score": 0.5}, {"score": 0.5}]
    )
    scores = row(results(found, items, texts=[]), "adaskip")["questions"]
    assert list(scores) == ["passkey"]
    assert scores["passkey"]["score"] == {"mean": 0.5, "error": 0.0, "n": 2}


def test_answers_that_stay_the_same_are_counted_by_text_and_by_score() -> None:
    answers = {
        FULL.name: [("Ada", 1.0), ("Bea", 0.0), ("Cleo", 0.5), ("Dora", 1.0)],
        ADASKIP.name: [(" Ada\n", 1.0), ("bea", 0.0), ("Dora", 1.0)],  # the last question is not answered yet
    }
    found = {
        (f"t{i}", name, "answer"): Record(f"t{i}", name, "answer", {"score": score}, text)
        for name, each in answers.items()
        for i, (text, score) in enumerate(each)
    }
    shown = results(found, [question(f"t{i}") for i in range(4)], texts=[])
    scores = row(shown, "adaskip")["questions"]["passkey"]
    assert (scores["same_answer"]["mean"], scores["same_answer"]["n"]) == (pytest.approx(1 / 3), 3)
    assert (scores["same_score"]["mean"], scores["same_score"]["n"]) == (pytest.approx(2 / 3), 3)
    table = next(each for each in tables(shown) if each.title == "Answers that stay the same")
    assert table.rows[0] == ("AdaSkip affine, 1", "prefill", "33.3 / 66.7")


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def some() -> Results:
    return results(
        {
            **records(
                "continuation",
                full=losses(1.0, 2.0, 3.0, kl=[0.0] * 3, agreement=[1.0] * 3),
                adaskip=losses(1.5, 2.4, 3.6, kl=[0.1, 0.2, 0.3], agreement=[0.9, 0.8, 0.7]),
                early_exit=losses(9.0, 9.0, 9.0, kl=[6.0] * 3, agreement=[0.0] * 3),
            ),
            **rounds(*[{name.split("-")[0]: (1.0 + i, [0.1] * 4) for i, name in enumerate(NAMES)}] * 2),
        }
    )


def test_a_modes_table_begins_with_the_full_model_and_modes_without_a_contender_have_none(some: Results) -> None:
    for each in (tables(some), summary(some)):
        assert [table.title for table in each] == ["Mode prefill", "Mode e2e"]
    table = tables(some)[0]
    assert "in the prompt and in the answer" in table.text and "3 items" in table.text
    assert table.rows[0][0] == "whole model"
    line = dict(zip(table.header, table.rows[1], strict=True))
    assert line["contender"] == "AdaSkip affine, 1"
    assert line["skipped"] == "1"
    assert line["first token, times as fast"] == "0.50 (0.50–0.50)"
    assert line["loss, nats"] == "2.500 ± 0.608"
    assert line["added loss"] == "+0.500 ± 0.058"
    assert line["agreement, %"] == "80.0 ± 5.8"


def questions(*tasks: str) -> Results:
    """Results of questions alone, untimed: the whole model answers all, the others half of them."""
    found = results({})
    rows = tuple(
        replace(row, questions={task: TaskScores(Figure(0.5 if row.mode else 1.0, 0.1, 4)) for task in tasks})
        for row in found.contenders
    )
    return replace(found, contenders=rows)


def test_a_summary_has_speed_loss_and_agreement_and_of_questions_the_scores(some: Results) -> None:
    table = summary(some)[0]
    assert table.header == ("contender", "first token, times as fast", "added loss", "agreement, %")
    assert table.rows[0] == ("whole model", "1", "", "")
    assert table.rows[1][1:] == ("0.50 (0.50–0.50)", "+0.500 ± 0.058", "80.0 ± 5.8")
    [table] = summary(questions("passkey", "copy"))
    assert (table.title, table.header[3:]) == ("Questions", ("passkey (4)", "copy (4)"))
    assert [row[3] for row in table.rows[:2]] == ["100.0 ± 10.0", "50.0 ± 10.0"]


def test_unfinished_results_count_what_is_there_and_without_timing_there_is_no_speed(some: Results) -> None:
    # of texts 3 x 3 continuations, of rounds 2 x 3
    assert (some.n_done, some.n_results) == (15, 15)
    assert results({}).n_done == 0 and row(results({}), "adaskip")["speed"] == {}
    assert msgspec.json.decode(some.to_json(), type=Results) == some


def named(strategy: str, budget: str, compensation: str) -> Row:
    return Row("name", strategy, budget, "prefill", compensation)


def test_a_contender_is_named_by_strategy_budget_and_compensation_and_compensations_look_different() -> None:
    assert named("adaskip", "6", "paper").label == "AdaSkip paper, 6"
    assert named("early_exit", "6", "none").label == "Early Exit, 6"
    looks = [named("adaskip", "6", name).look for name in (DEFAULT_COMPENSATION, "paper")]
    assert looks == ["adaskip", "paper"]
    names = [name for name in COMPENSATIONS if name not in (DEFAULT_COMPENSATION, "paper")]
    assert named("adaskip", "6", names[-1]).look not in looks
    assert named("early_exit", "6", "none").look == "early_exit"
