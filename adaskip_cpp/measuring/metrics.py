"""Scores answers from 0 to 1: LongBench's metrics, choices by letter, Rouge-L of continuations. Start at :func:`score`.

LongBench (Bai et al., ACL 2024, arXiv 2308.14508) publishes its scoring as code. Metrics here give the same figures,
quirks included, so that scores can be compared with published ones. Each takes a prediction, a right answer and all
classes. It raises PackageMissingError if it needs a package that is not installed.
"""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from ..errors import DataError, PackageMissingError

_ZH_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
"""LongBench strips these from Chinese words, and ASCII punctuation too."""


def score(metric: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] = ()) -> float:
    """Return a prediction's best score over the right answers, by a name in :data:`METRICS`; 0 without answers."""
    if metric not in METRICS:
        raise DataError(f"there is no metric {metric!r}; use one of {', '.join(METRICS)}")
    return max((METRICS[metric](prediction, answer, all_classes) for answer in answers), default=0.0)


def qa_f1(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the F1 of words in common; case, punctuation and articles do not count."""
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the F1 of Chinese words in common, split by jieba; case and punctuation do not count."""
    return _f1(_words_zh(prediction), _words_zh(answer))


def rouge_l(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the F-measure of Rouge-L of the package ``rouge``; 0 if that fails, as for an empty text."""
    rouge = _package("rouge")
    try:
        return float(rouge.Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except Exception:  # LongBench scores whatever the package fails on as 0
        return 0.0


def rouge_l_zh(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return :func:`rouge_l` of Chinese text, split into words by jieba."""
    jieba = _jieba()
    return rouge_l(*(" ".join(jieba.cut(text, cut_all=False)) for text in (prediction, answer)))


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
    """Return the share of numbers in the prediction that are the answer's, such as "Paragraph 7" or "段落7"."""
    match = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    if match is None:
        raise DataError(f"the answer {answer!r} names no paragraph; check that the file is the published one")
    return count(prediction, match[1])


def count(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the share of numbers in the prediction that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str, all_classes: Sequence[str] = ()) -> float:
    """Return the similarity of the prediction's first line of code to the right line, in whole percent.

    A line with a backtick, ``#`` or ``//`` counts as a comment or a fence. The similarity is twice the length of the
    longest common subsequence of characters, over the length of both lines.
    """
    fuzz = _package("rapidfuzz.fuzz")
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return float(round(fuzz.ratio(line, answer)) / 100)


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


def continuation_rouge_l(reference: str, candidate: str) -> float:
    """Return the F-measure of Rouge-L of a continuation against the whole model's, as in the package ``rouge-score``.

    Words are runs of ASCII letters and digits in lower case, unstemmed, as in that package. Each other letter, which
    the package ignores, is a word. Equal texts score 1, also without words.
    """
    subsequence = _package("rapidfuzz.distance.LCSseq")
    first, second = (re.findall(r"[a-z0-9]+|[^\W_]", text.lower()) for text in (reference, candidate))
    if reference == candidate:
        return 1.0
    n_same = subsequence.similarity(first, second)
    return float(2 * n_same / (len(first) + len(second))) if n_same else 0.0


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    each.__name__: each
    for each in (
        *(qa_f1, qa_f1_zh, rouge_l, rouge_l_zh, classification),
        *(retrieval, count, code_similarity, contains, choice),
    )
}


def _plain(text: str, punctuation: str = string.punctuation) -> str:
    return text.lower().translate(str.maketrans("", "", punctuation))


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", _plain(text)).split()


def _words_zh(text: str) -> list[str]:
    words = (_plain(word, string.punctuation + _ZH_PUNCTUATION) for word in _jieba().cut(text, cut_all=False))
    return [plain for word in words if (plain := "".join(word.split()))]


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    n_same = (Counter(prediction) & Counter(answer)).total()
    return 2 * n_same / (len(prediction) + len(answer)) if n_same else 0.0


def _jieba() -> Any:
    jieba = _package("jieba")
    jieba.setLogLevel(30)  # at level debug it writes to stderr that it loads its dictionary
    return jieba


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PackageMissingError(
            f'this metric needs {error.name or name!r}, which is not installed: run pip install "adaskip-cpp[evaluate]"'
        ) from error
