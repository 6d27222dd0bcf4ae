"""Makes questions from LongBench's lines, for :mod:`adaskip_cpp.measuring.task_files`. Start at :class:`LongBench`."""

import os
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import msgspec

from ..errors import DataError
from ..files import StrPath, read_text
from .tasks import Asked, QuestionItem

DATASETS = {
    dataset: metric
    for metric, datasets in (
        ("qa_f1", "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa"),
        ("rouge_l", "gov_report qmsum multi_news samsum"),
        ("classification", "trec"),
        ("count", "passage_count"),
        ("retrieval", "passage_retrieval_en"),
    )
    for dataset in datasets.split()
}
"""Metric by English dataset. LongBench-E's names end in ``_e``, with the same metrics."""

_FEW_SHOT = frozenset({"trec", "triviaqa", "samsum"})  # without a chat template; only the first line is the answer

_PROMPTS = {
    "multi_news": "Several news articles about one event follow.\n\n{context}\n\n"
    "Write one summary of all these articles, in a few paragraphs.\n\nSummary:"
}
_LENGTHS = {"multi_news": 512}  # with our own prompts, for datasets that work without LongBench's JSON files

_Length: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True)
class LongBenchLine:
    """A line of a LongBench file, with the fields that are used here."""

    input: str
    context: str
    dataset: str
    answers: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    all_classes: tuple[str, ...] | None = None
    _id: str | int | None = None


class LongBench:
    """LongBench's prompts and lengths by dataset, from its files in a folder, or the built-in ones without these."""

    def __init__(self, folder: StrPath) -> None:
        self._prompts = _Table(os.path.join(folder, "dataset2prompt.json"), str, _PROMPTS, "prompt")
        self._lengths = _Table(os.path.join(folder, "dataset2maxlen.json"), _Length, _LENGTHS, "answer length")

    def questions(self, line: LongBenchLine, fields: Mapping[str, Any], where: str) -> list[Asked]:
        """Return the line's only question; ``fields`` are all its fields, which a template may name."""
        base = line.dataset.removesuffix("_e")
        if base not in DATASETS:
            raise DataError(f"{where}: there is no dataset {line.dataset!r}; use one of {', '.join(DATASETS)}")
        if DATASETS[base] == "classification" and not line.all_classes:
            raise DataError(f"{where} has no 'all_classes', which {base!r} needs; add the names to choose from")
        template, max_tokens = self._prompts.of(line.dataset, where), self._lengths.of(line.dataset, where)
        try:
            text = _filled_in(template, fields)
        except (LookupError, ValueError) as error:
            raise DataError(
                f"{self._prompts.name}: the template of {line.dataset!r} cannot be filled in from {where} "
                f"({type(error).__name__}: {error}); use only names of the line's fields, as {{context}} and {{input}}"
            ) from error
        item = QuestionItem(
            id=str(line._id or ""),
            task=line.dataset,
            prompt=(),
            answers=line.answers,
            max_tokens=max_tokens,
            metric=DATASETS[base],
            all_classes=line.all_classes or (),
            first_line=base in _FEW_SHOT,
        )
        return [Asked(item, text, chat=base not in _FEW_SHOT)]


class _Table:
    """Values by dataset, from a file; DataError if it is invalid. LongBench-E's datasets may use LongBench's values."""

    def __init__(self, path: str, kind: Any, built_in: Mapping[str, Any], what: str) -> None:
        self.name, self._file, self._what, self._values = "the built-in table", os.path.basename(path), what, built_in
        if os.path.exists(path):
            self.name = repr(path)
            try:
                self._values = msgspec.json.decode(read_text(path), type=dict[str, kind])
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{self.name} does not give the {what} by dataset ({error}); use LongBench's own file"
                ) from error

    def of(self, dataset: str, where: str) -> Any:
        for name in (dataset, dataset.removesuffix("_e")):
            if name in self._values:
                return self._values[name]
        raise DataError(
            f"{self.name} has no {self._what} for {dataset!r}, which {where} needs; "
            f"put LongBench's own {self._file} beside the data file, or leave that out"
        )


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
