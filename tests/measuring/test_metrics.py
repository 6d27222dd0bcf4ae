"""Metrics: cases counted by hand, and second libraries where there are any."""

import sys
from itertools import product

import numpy as np
import pytest

from adaskip_cpp.errors import DataError, PackageMissingError
from adaskip_cpp.measuring import metrics


def lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by the textbook's table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in product(range(len(a)), range(len(b))):
        table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The answer is: PARIS!", "paris", 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # answer, is, paris
        ("no no yes", "no no no", 2 / 3),  # two in common, each of three
        ("theatre", "atre", 0.0),  # only whole words are articles
        ("the", "a", 0.0),
    ],
)
def test_qa_f1_counts_words_in_common(prediction: str, answer: str, expected: float) -> None:
    assert metrics.qa_f1(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_rouge_l_agrees_with_the_textbook(seed: int) -> None:
    """On sentences without repeated words or punctuation, where the package computes what the textbook says."""
    rng, words = np.random.default_rng(seed), [f"w{i}" for i in range(30)]
    a, b = (list(rng.permutation(words)[: rng.integers(5, 25)]) for _ in range(2))
    expected = 2 * lcs(a, b) / (len(a) + len(b))
    assert metrics.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answer", "classes", "expected"),
    [
        ("Sport or Music", "Sport", ["Sport", "Music"], 1 / 2),
        ("Individual person", "Individual person", ["Individual", "Individual person"], 1.0),
        # A longer name than the right one counts as named.
        ("Individual person", "Individual", ["Individual", "Individual person"], 1 / 2),
        # Behind a removed name, one is passed over: "b" stays, so two are named.
        ("abc", "abc", ["a", "b", "abc"], 1 / 2),
        # A class named twice counts twice.
        ("Sport", "Sport", ["Sport", "Sport"], 1 / 2),
    ],
)
def test_classification_is_shared_among_the_classes_named(
    prediction: str, answer: str, classes: list[str], expected: float
) -> None:
    assert metrics.classification(prediction, answer, classes) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"), [("7", 1.0), ("Paragraph 7, or 8, or 7", 2 / 3), ("17 or 07", 0.0)]
)
def test_retrieval_is_the_share_of_numbers_that_are_right(prediction: str, expected: float) -> None:
    assert metrics.retrieval(prediction, "Paragraph 7") == pytest.approx(expected)
    assert metrics.count(prediction, "7") == pytest.approx(expected)
    with pytest.raises(DataError, match="names no paragraph"):
        metrics.retrieval(prediction, "7")


def test_a_choice_is_right_if_all_its_letters_are() -> None:
    right = {
        "(B) Bea": ["B", "The answer is (B).", " B\n\nQuestion: A", "A good answer is B"],
        "AC": ["A, C", "(C) and (A)"],
        "ACD": ["A, C, and D"],
    }
    for answer, predictions in right.items():
        assert {metrics.choice(each, answer) for each in predictions} == {1.0}
    for prediction in ("A", "A and B", "", "a bad idea, I think"):
        assert metrics.choice(prediction, "(B) Bea") == 0.0


def test_contains_wants_the_whole_word() -> None:
    assert metrics.contains("It is 12345.", "12345") == 1.0
    assert metrics.contains("123456", "12345") == metrics.contains("", "12345") == 0.0
    assert metrics.contains("a (b) c", "(b)") == 1.0


def test_rouge_l_is_0_where_the_package_fails() -> None:
    assert metrics.rouge_l("words", "") == metrics.rouge_l("", "words") == metrics.rouge_l(".", "words") == 0.0


def test_the_best_right_answer_counts_and_an_unknown_metric_is_refused() -> None:
    assert metrics.score("qa_f1", "red cat", ["dog", "a red cat", "cat"]) == 1.0
    assert metrics.score("qa_f1", "red cat", []) == 0.0
    with pytest.raises(DataError, match=r"no metric 'bleu'; use one of qa_f1, "):
        metrics.score("bleu", "a", ["a"])


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_a_right_answer_scores_1_and_nothing_scores_0(metric: str) -> None:
    answer = {"retrieval": "Paragraph 3", "count": "3", "choice": "AC"}.get(metric, "words")
    assert metrics.score(metric, answer, [answer], [answer]) == pytest.approx(1.0, abs=1e-6)
    assert metrics.score(metric, "", [answer], [answer]) == 0.0


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(PackageMissingError, match=r'rouge.*pip install "adaskip-cpp\[evaluate\]"'):
        metrics.rouge_l("a", "a")
