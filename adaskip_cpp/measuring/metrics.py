"""Scores answers from 0 to 1: LongBench's metrics, and choices by letter. Start at :func:`score`.

LongBench (Bai et al., ACL 2024, arXiv 2308.14508) publishes its scoring as code. Metrics here give the same figures,
quirks included, so that scores can be compared. Each takes a prediction, a right answer and all classes.
"""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ..errors import DataError, PackageMissingError


def score(metric: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] = ()) -> float:
    """Return a prediction's best score over the right answers, by a name in :data:`METRICS`; 0 without answers."""
    if metric not in METRICS:
        raise DataError(f"there is no metric {metric!r}; use one of {', '.join(METRICS)}")
    return max((METRICS[metric](prediction, answer, all_classes) for answer in answers), default=0.0)


def qa_f1(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the F1 of words in common; case, punctuation and articles do not count."""
    words, right = _words(prediction), _words(answer)
    n_same = (Counter(words) & Counter(right)).total()
    return 2 * n_same / (len(words) + len(right)) if n_same else 0.0


def rouge_l(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return Rouge-L's F-measure by the package ``rouge``, PackageMissingError without it; 0 if it fails."""
    try:
        rouge = importlib.import_module("rouge")
    except ImportError as error:
        why = f"this metric needs {error.name or 'rouge'!r}, which is not installed"
        raise PackageMissingError(f'{why}: run pip install "adaskip-cpp[evaluate]"') from error
    try:
        return float(rouge.Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except Exception:  # LongBench scores whatever the package fails on as 0
        return 0.0


def classification(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return 1 / (number of classes in the prediction) if the right one is among them, else 0.

    A class whose name is a part of the right one's does not count.
    """
    named = [name for name in all_classes if name in prediction]
    # Like LongBench, this removes from the list that it iterates over, and so skips the class after a removed one.
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the share of numbers in the prediction that are the answer's, such as "Paragraph 7"."""
    match = re.search(r"Paragraph (\d+)", answer)
    if match is None:
        raise DataError(f"the answer {answer!r} names no paragraph; check that the file is the published one")
    return count(prediction, match[1])


def count(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the share of numbers in the prediction that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def contains(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return 1 if the prediction contains the answer as a separate word, else 0."""
    return float(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", prediction) is not None)


_LETTERS = r"\(?\b(?!A (?!and\b)[a-z])[A-F]+\b\)?"  # letters of a choice; "A" before another word is an article
_CHOICE = re.compile(rf"{_LETTERS}(?:(?:\s*[,;&/]\s*(?:and\s+)?|\s+and\s+){_LETTERS})*")


def letters(text: str) -> frozenset[str]:
    """Return the letters, A to F, of the first choice that a text names, as "AC", "(B) text" or "A, C and D"."""
    match = _CHOICE.search(text)
    return frozenset("" if match is None else match[0]) & frozenset("ABCDEF")


def choice(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return 1 if the prediction chooses exactly the letters of the answer, else 0."""
    return float(letters(prediction) == letters(answer))


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    each.__name__: each for each in (qa_f1, rouge_l, classification, retrieval, count, contains, choice)
}


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
