"""Reads published long-context tasks, in LongBench's or L-Eval's form, as questions. Start at :func:`task_items`."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import msgspec

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..files import StrPath, read_text
from .corpus import tokens_of
from .longbench import LongBench, LongBenchLine
from .metrics import letters
from .tasks import Asked, QuestionItem, Wrap, fill

_CHOICE_TOKENS, _MOST_TOKENS = 16, 512
_CHOICE = (
    "{document}\n\nRead the text above and answer this question.\n\n{question}\n\n"
    "Answer with the letter of every right choice and nothing else.\nAnswer:"
)
_OPEN = "{document}\n\nRead the text above and do this.\n\n{question}\n\nUse about {n_words} words.\nAnswer:"


@dataclass(frozen=True)
class _LEvalLine:
    """A line of an L-Eval file: a document, questions about it (instructions), and the right answers (outputs)."""

    input: str
    instructions: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    outputs: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    source: str
    evaluation: str


def task_items(
    llm: AdaSkipLlama,
    files: Iterable[StrPath],
    *,
    n_ctx: int,
    wrap: Wrap,
    n_each: int | None = None,
) -> list[QuestionItem]:
    """Read items of LongBench and L-Eval as questions to a model. Blank lines are ignored.

    Questions about one document are adjacent, so that it is read once. If a prompt does not fit the context, its middle
    is left out, as in LongBench: the first and the last half of what fits are decoded, joined, and tokenised again.

    Args:
        files: JSON Lines of :class:`_LEvalLine` or :class:`~adaskip_cpp.measuring.longbench.LongBenchLine`. Beside them
            may lie LongBench's ``dataset2prompt.json``, templates with ``{context}`` and ``{input}`` by dataset, and
            ``dataset2maxlen.json``, tokens to generate. Built in are those of ``multi_news``.
        n_ctx: tokens of prompt and answer together.
        wrap: makes tokens of a prompt; not for few-shot prompts and code, which LongBench never puts into a template.
        n_each: questions of each task, about as many documents as possible; None for all.

    Raises:
        DataError: a file cannot be read, a line is of neither form, or a prompt has no room in the context.
        PackageMissingError: a metric needs a package that is not installed.
    """
    raw = partial(tokens_of, llm, bos=True)
    taken: Counter[str] = Counter()
    items: list[QuestionItem] = []
    asked = list(_questions(files))
    chosen = []
    for i in sorted(range(len(asked)), key=lambda i: asked[i][0]):
        taken[asked[i][1].item.task] += 1
        if n_each is None or taken[asked[i][1].item.task] <= n_each:
            chosen.append(i)
    for _, (item, text, chat), where in (asked[i] for i in sorted(chosen)):
        item = replace(item, prompt=tuple(_fit(llm, text, n_ctx - item.max_tokens, wrap if chat else raw, where)))
        try:
            item.score("")  # an item that cannot be scored fails now, and not after hours of answers
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        items.append(item)
    return items


def _questions(files: Iterable[StrPath]) -> Iterator[tuple[int, Asked, str]]:
    """Yield each question with its number in its line, a unique id, and its place in the files."""
    seen: set[str] = set()
    for file in files:
        stem = os.path.splitext(os.path.basename(file))[0]
        if stem in seen:
            raise DataError(f"{os.fspath(file)!r}: a file of this name was read before; name every file once")
        seen.add(stem)
        longbench = LongBench(os.path.dirname(file))
        for number, text in enumerate(read_text(file).split("\n"), 1):  # not splitlines(): JSON may hold U+2028
            if not text.strip():
                continue
            where = f"{os.fspath(file)!r}, line {number}"
            kind, found = _of_line(text, longbench, where)
            for turn, (item, prompt, chat) in enumerate(found):
                identity = f"{kind}/{stem}/{item.id or number}" + (f"/{turn}" if len(found) > 1 else "")
                identity += f"/{number}" if identity in seen else ""
                seen.add(identity)
                yield turn, Asked(replace(item, id=identity), prompt, chat), where


def _of_line(text: str, longbench: LongBench, where: str) -> tuple[str, list[Asked]]:
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
        kind: Any = _LEvalLine if "instructions" in fields else LongBenchLine
        line = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise DataError(
            f"{where} is no item of LongBench or L-Eval ({error}); LongBench's lines have input, context, dataset "
            "(text), answers and all_classes (lists of texts), L-Eval's have input, source, evaluation (text), "
            "instructions and outputs (lists of texts)"
        ) from error
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits, and for endless nesting
        raise DataError(f"{where} is not JSON ({error}); download the file again or correct the line") from error
    if kind is _LEvalLine:
        return "leval", _leval_questions(line, where)
    return "longbench", longbench.questions(line, fields, where)


def _leval_questions(line: _LEvalLine, where: str) -> list[Asked]:
    """Return the questions of a line of L-Eval (An et al., ACL 2024, arXiv 2307.11088), all about one document.

    Closed questions are scored by the letters chosen, summaries by Rouge-L, other open questions by F1. The prompts are
    our own. As L-Eval recommends, they give the number of words of the right answer, because Rouge-L and F1 depend on
    the length. The task is L-Eval's source without the suffix for its part: ``coursera`` for ``coursera_a``.
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
            if not letters(answer):
                raise DataError(f"{where}: the answer {answer[:40]!r} names no choice (A to F); leave that line out")
            template, metric, max_tokens = _CHOICE, "choice", _CHOICE_TOKENS
        else:
            template, metric = _OPEN, "rouge_l" if task.endswith("_summ") else "qa_f1"
            max_tokens = min(2 * n_words + 16, _MOST_TOKENS)  # English has about 1.4 tokens per word
        text = template.format(document=line.input.strip(), question=question.strip(), n_words=n_words)
        questions.append(Asked(QuestionItem("", task, (), (answer,), max_tokens, metric), text))
    return questions


def _fit(llm: AdaSkipLlama, prompt: str, room: int, wrap: Wrap, where: str) -> Sequence[int]:
    """Wrap a prompt, without its middle if the result would be longer than ``room`` tokens."""
    tokens = wrap(prompt)
    if len(tokens) <= room:
        return tokens
    plain = tokens_of(llm, prompt)

    def write(n: int) -> str:
        ends = plain[: n // 2], plain[len(plain) - n // 2 :]
        return "".join(llm.detokenize(part).decode("utf-8", "ignore") for part in ends)

    fitting = fill(write, room, wrap)
    if fitting is None or len(fitting) <= len(wrap("")):
        room = max(room, 0)
        raise DataError(f"{where}: the context leaves {room} tokens for a prompt; use a larger context (ctx, --ctx)")
    return fitting
