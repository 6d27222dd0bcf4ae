"""Reads published long-context tasks, in LongBench's or L-Eval's form, as questions. Start at :func:`task_items`."""

import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..files import StrPath, read_text
from ..model.arrays import Count
from .corpus import tokens_of
from .metrics import letters
from .tasks import QuestionItem, Wrap, fill

_DATASETS = {
    "qa_f1": "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa",
    "rouge_l": "gov_report qmsum multi_news samsum",
    "classification": "trec",
    "count": "passage_count",
    "retrieval": "passage_retrieval_en",
}
DATASETS = {dataset: metric for metric, datasets in _DATASETS.items() for dataset in datasets.split()}
"""Metric by English dataset of LongBench. LongBench-E's names end in ``_e``, with the same metrics."""

_FEW_SHOT = frozenset({"trec", "triviaqa", "samsum"})  # without a chat template; only the first line is the answer

# Our own prompt and length of answers, for a dataset that works without LongBench's JSON files.
_PROMPTS = {
    "multi_news": "Several news articles about one event follow.\n\n{context}\n\n"
    "Write one summary of all these articles, in a few paragraphs.\n\nSummary:"
}
_LENGTHS = {"multi_news": 512}

# Our own prompts for L-Eval.
_CHOICE_TOKENS, _MOST_TOKENS = 16, 512
_CHOICE = (
    "{document}\n\nRead the text above and answer this question.\n\n{question}\n\n"
    "Answer with the letter of every right choice and nothing else.\nAnswer:"
)
_OPEN = "{document}\n\nRead the text above and do this.\n\n{question}\n\nUse about {n_words} words.\nAnswer:"

_Texts: TypeAlias = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class _LongBenchLine:
    """A line of a LongBench file, with the fields that are used here."""

    input: str
    context: str
    dataset: str
    answers: _Texts
    all_classes: tuple[str, ...] | None = None
    _id: str | int | None = None


@dataclass(frozen=True)
class _LEvalLine:
    """A line of an L-Eval file: a document, questions about it (instructions), and the right answers (outputs)."""

    input: str
    instructions: _Texts
    outputs: _Texts
    source: str
    evaluation: str


class _Table:
    """Values by dataset, from a file; DataError if it is invalid. LongBench-E's datasets may use LongBench's values."""

    def __init__(self, path: str, kind: Any, built_in: Mapping[str, Any], what: str) -> None:
        self.name, self._file, self._what, self._values = "the built-in table", os.path.basename(path), what, built_in
        if os.path.exists(path):
            self.name = repr(path)
            try:
                self._values = msgspec.json.decode(read_text(path), type=dict[str, kind])
            except (ValueError, RecursionError) as error:
                why = f"{self.name} does not give the {what} by dataset ({error})"
                raise DataError(f"{why}; use LongBench's own file") from error

    def of(self, dataset: str, where: str) -> Any:
        for name in (dataset, dataset.removesuffix("_e")):
            if name in self._values:
                return self._values[name]
        why = f"{self.name} has no {self._what} for {dataset!r}, which {where} needs"
        raise DataError(f"{why}; put LongBench's own {self._file} beside the data file, or leave that out")


class _Asked(NamedTuple):
    """A question: the item without its prompt, the prompt's text, and whether to use a chat template."""

    item: QuestionItem
    text: str
    chat: bool = True


def task_items(
    llm: AdaSkipLlama, files: Iterable[StrPath], *, n_ctx: int, wrap: Wrap, n_each: int | None = None
) -> list[QuestionItem]:
    """Read JSON Lines of LongBench and L-Eval as questions to a model.

    Beside a file may lie LongBench's ``dataset2prompt.json``, templates with ``{context}`` and ``{input}`` by dataset,
    and ``dataset2maxlen.json``, tokens to generate. Those of ``multi_news`` are built in. ``n_each`` limits the
    questions of each task, which are then about as many documents as possible. Questions about one document are
    adjacent, so that it is read once. ``wrap`` makes tokens of a prompt; not of few-shot prompts and code, which
    LongBench never puts into a template. Prompt and answer have at most ``n_ctx`` tokens. If a prompt does not fit, its
    middle is left out, as in LongBench: the first and the last half of what fits are decoded, joined, and tokenised
    again. Raises DataError if a file cannot be read, a line is of neither form, or a prompt has no room, and
    PackageMissingError if a metric needs a package that is not installed.
    """
    raw = partial(tokens_of, llm, bos=True)
    asked, taken, chosen, items = list(_questions(files)), Counter[str](), set[int](), list[QuestionItem]()
    for i in sorted(range(len(asked)), key=lambda i: asked[i][0]):
        task = asked[i][1].item.task
        taken[task] += 1
        if n_each is None or taken[task] <= n_each:
            chosen.add(i)
    for i, (_, (item, text, chat), where) in enumerate(asked):
        if i not in chosen:
            continue
        item = replace(item, prompt=tuple(_fit(llm, text, n_ctx - item.max_tokens, wrap if chat else raw, where)))
        try:
            item.score("")  # an item that cannot be scored fails now, and not after hours of answers
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        items.append(item)
    return items


def _questions(files: Iterable[StrPath]) -> Iterator[tuple[int, _Asked, str]]:
    """Yield each question with its number in its line, a unique id, and its place in the files."""
    seen: set[str] = set()
    for file in files:
        folder, name = os.path.split(file)
        stem = os.path.splitext(name)[0]
        if stem in seen:
            raise DataError(f"{os.fspath(file)!r}: a file of this name was read before; name every file once")
        seen.add(stem)
        prompts = _Table(os.path.join(folder, "dataset2prompt.json"), str, _PROMPTS, "prompt")
        lengths = _Table(os.path.join(folder, "dataset2maxlen.json"), Count, _LENGTHS, "answer length")
        for number, text in enumerate(read_text(file).split("\n"), 1):  # not splitlines(): JSON may hold U+2028
            if not text.strip():
                continue
            where = f"{os.fspath(file)!r}, line {number}"
            kind, found = _of_line(text, prompts, lengths, where)
            for turn, (item, prompt, chat) in enumerate(found):
                identity = f"{kind}/{stem}/{item.id or number}" + (f"/{turn}" if len(found) > 1 else "")
                identity += f"/{number}" if identity in seen else ""
                seen.add(identity)
                yield turn, _Asked(replace(item, id=identity), prompt, chat), where


def _of_line(text: str, prompts: _Table, lengths: _Table, where: str) -> tuple[str, list[_Asked]]:
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
        kind: Any = _LEvalLine if "instructions" in fields else _LongBenchLine
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
    return "longbench", [_longbench_question(line, fields, prompts, lengths, where)]


def _longbench_question(
    line: _LongBenchLine, fields: Mapping[str, Any], prompts: _Table, lengths: _Table, where: str
) -> _Asked:
    """Return the question of a line of LongBench; ``fields`` are all its fields, which a template may name."""
    base = line.dataset.removesuffix("_e")
    if base not in DATASETS:
        raise DataError(f"{where}: there is no dataset {line.dataset!r}; use one of {', '.join(DATASETS)}")
    if DATASETS[base] == "classification" and not line.all_classes:
        raise DataError(f"{where} has no 'all_classes', which {base!r} needs; add the names to choose from")
    template, max_tokens = prompts.of(line.dataset, where), lengths.of(line.dataset, where)
    try:
        text = _filled_in(template, fields)
    except (LookupError, ValueError) as error:
        way_out = "use only names of the line's fields, as {context} and {input}"
        why = f"the template of {line.dataset!r} cannot be filled in from {where} ({type(error).__name__}: {error})"
        raise DataError(f"{prompts.name}: {why}; {way_out}") from error
    name, classes, few_shot = str(line._id or ""), line.all_classes or (), base in _FEW_SHOT
    item = QuestionItem(name, line.dataset, (), line.answers, max_tokens, DATASETS[base], classes, few_shot)
    return _Asked(item, text, chat=not few_shot)


def _filled_in(template: str, fields: Mapping[str, Any]) -> str:
    """Fill in names alone: a width, as in ``{context:9999999999}``, would take so many bytes of memory."""
    parts = []
    for text, name, form, conversion in string.Formatter().parse(template):
        parts.append(text)
        if name is not None:
            value = fields[name]
            if form or conversion or not isinstance(value, str | int | float):
                raise ValueError(f"{name!r} is not just the name of a text")
            parts.append(str(value))
    return "".join(parts)


def _leval_questions(line: _LEvalLine, where: str) -> list[_Asked]:
    """Return the questions of a line of L-Eval (An et al., ACL 2024, arXiv 2307.11088), all about one document.

    Closed questions are scored by the letters chosen, summaries by Rouge-L, other open questions by F1. The prompts are
    our own. As L-Eval recommends, they give the number of words of the right answer, because Rouge-L and F1 depend on
    the length. The task is L-Eval's source without the suffix for its part: ``coursera`` for ``coursera_a``.
    """
    if len(line.instructions) != len(line.outputs):
        numbers = f"{len(line.instructions)} 'instructions' and {len(line.outputs)} 'outputs'"
        raise DataError(f"{where} has {numbers}; give one output for each instruction")
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
        questions.append(_Asked(QuestionItem("", task, (), (answer,), max_tokens, metric), text))
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
        why = f"{where}: the context leaves {max(room, 0)} tokens for a prompt"
        raise DataError(f"{why}; use a larger context (ctx, --ctx)")
    return fitting
