"""Makes questions from L-Eval's lines, for :mod:`adaskip_cpp.measuring.task_files`.

L-Eval (An et al., ACL 2024, arXiv 2307.11088) asks several questions about one document. Closed questions are scored by
the letters chosen, summaries by Rouge-L, other open questions by F1. The prompts are in our own words. As L-Eval
recommends, a prompt says how many words the right answer has, as both scores depend on the length.
"""

import re
from dataclasses import dataclass
from typing import Annotated

import msgspec

from ..errors import DataError
from . import metrics
from .tasks import Asked, QuestionItem

_CHOICE_TOKENS, _MOST_TOKENS = 16, 512
_CHOICE = (
    "{document}\n\nRead the text above and answer this question.\n\n{question}\n\n"
    "Answer with the letter of every right choice and nothing else.\nAnswer:"
)
_OPEN = "{document}\n\nRead the text above and do this.\n\n{question}\n\nUse about {n_words} words.\nAnswer:"


@dataclass(frozen=True)
class LEvalLine:
    """A line of an L-Eval file: a document with its questions and the right answer to each."""

    input: str
    instructions: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    outputs: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    source: str
    evaluation: str


def leval_questions(line: LEvalLine, where: str) -> list[Asked]:
    """Return the questions of a line in their order.

    The task is L-Eval's source without what tells its parts from each other: ``coursera`` for ``coursera_a``.

    Raises:
        DataError: questions and answers differ in number, or the answer to a closed question names no letter.
    """
    if len(line.instructions) != len(line.outputs):
        raise DataError(
            f"{where} has {len(line.instructions)} 'instructions' and {len(line.outputs)} 'outputs'; "
            "give one output for each instruction"
        )
    task = re.sub(r"_(raw|[a-z])$", "", line.source)
    questions = []
    for question, answer in zip(line.instructions, line.outputs, strict=True):
        n_words = len(answer.split())
        if line.evaluation == "exam":
            if not metrics.letters(answer):
                raise DataError(f"{where}: the answer {answer[:40]!r} names no choice (A to F); leave that line out")
            template, metric, max_tokens = _CHOICE, "choice", _CHOICE_TOKENS
        else:
            template, metric = _OPEN, "rouge_l" if task.endswith("_summ") else "qa_f1"
            max_tokens = min(2 * n_words + 16, _MOST_TOKENS)  # English has about 1.4 tokens per word
        text = template.format(document=line.input.strip(), question=question.strip(), n_words=n_words)
        questions.append(Asked(QuestionItem("", task, (), (answer,), max_tokens, metric), text))
    return questions
