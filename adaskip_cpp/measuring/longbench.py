"""LongBench's tasks, read from the files that it publishes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import DataError
from .tasks import QuestionItem

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama

__all__ = ["DATASETS", "longbench_items"]

DATASETS = {
    "narrativeqa": "qa_f1",
    "qasper": "qa_f1",
    "multifieldqa_en": "qa_f1",
    "multifieldqa_zh": "qa_f1_zh",
    "hotpotqa": "qa_f1",
    "2wikimqa": "qa_f1",
    "musique": "qa_f1",
    "dureader": "rouge_l_zh",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "vcsum": "rouge_l_zh",
    "trec": "classification",
    "triviaqa": "qa_f1",
    "samsum": "rouge_l",
    "lsht": "classification",
    "passage_count": "count",
    "passage_retrieval_en": "retrieval",
    "passage_retrieval_zh": "retrieval_zh",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}
"""Metric by dataset. LongBench-E's names end in ``_e`` and are scored alike."""

_FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
_NO_CHAT = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
"""Few-shot prompts and code, which LongBench has completed as they stand."""

_Path: TypeAlias = "str | os.PathLike[str]"


def longbench_items(
    llm: AdaSkipLlama,
    files: Iterable[_Path],
    *,
    prompts: _Path,
    lengths: _Path,
    n_ctx: int,
    wrap: Callable[[str], Sequence[int]],
) -> list[QuestionItem]:
    """Read LongBench's items as questions to a model, one file after the other. Blank lines are passed over.

    A prompt that does not fit the context is cut in its middle, as LongBench does: the first and the last half of what
    fits are decoded, joined, and tokenised again.

    Args:
        llm: the model whose tokens are counted.
        files: JSON Lines, each line an object with ``input``, ``context``, ``answers``, ``all_classes``, ``dataset``,
            and perhaps ``length`` and ``_id``.
        prompts: LongBench's ``dataset2prompt.json``: a template with ``{context}`` and ``{input}`` by dataset.
        lengths: LongBench's ``dataset2maxlen.json``: tokens to generate by dataset.
        n_ctx: tokens of prompt and answer together.
        wrap: turns a prompt into tokens, by the model's chat template or raw. Not used for the datasets that LongBench
            gives to chat models as plain text too: those of few-shot prompts and code.

    Raises:
        DataError: a file cannot be read; a line is not such an object, with file and line; a dataset is unknown or has
            no template or length; the context has no room for a prompt.
        PackageMissingError: a dataset's metric needs a package that is not installed.
    """
    templates = _by_dataset(prompts, "a prompt template", str)
    max_tokens = _by_dataset(lengths, "a length", int)
    items = []
    for record, identity, where in _records(files):
        dataset = record["dataset"]
        base = dataset.removesuffix("_e")
        template = _lookup(templates, dataset, prompts, where)
        limit = _lookup(max_tokens, dataset, lengths, where)
        try:
            prompt = template.format(**record)
        except (LookupError, AttributeError, ValueError) as error:
            raise DataError(
                f"{os.fspath(prompts)!r}: the template of {dataset!r} cannot be filled in from {where} "
                f"({type(error).__name__}: {error}); it may name the line's fields, as {{context}} and {{input}}"
            ) from error
        item = QuestionItem(
            id=identity,
            task=dataset,
            prompt=tuple(_fit(llm, prompt, n_ctx - limit, _raw(llm) if base in _NO_CHAT else wrap, where)),
            answers=tuple(record["answers"]),
            max_tokens=limit,
            metric=DATASETS[base],
            all_classes=tuple(record["all_classes"] or ()),
            length=record["length"] or 0,
            first_line=base in _FIRST_LINE,
        )
        try:
            item.score("")  # what cannot be scored is told now and not when the model has answered for hours
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        items.append(item)
    return items


def _records(files: Iterable[_Path]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every line's object, an id of its own, and where it stands."""
    seen: set[str] = set()
    stems: set[str] = set()
    for file in files:
        stem = os.path.splitext(os.path.basename(file))[0]
        if stem in stems:
            raise DataError(f"{os.fspath(file)!r}: a file of this name was read before; name every file once")
        stems.add(stem)
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            where = f"{os.fspath(file)!r}, line {number}"
            record = _record(line, where)
            identity = f"longbench/{stem}/{record.get('_id') or number}"
            if identity in seen:
                identity = f"{identity}/{number}"
            seen.add(identity)
            yield record, identity, where


def _raw(llm: AdaSkipLlama) -> Callable[[str], Sequence[int]]:
    return lambda prompt: llm.tokenize(prompt.encode("utf-8", "replace"), add_bos=True, special=False)


def _fit(llm: AdaSkipLlama, prompt: str, room: int, wrap: Callable[[str], Sequence[int]], where: str) -> Sequence[int]:
    """Wrap a prompt, its middle cut out if the result would be longer than ``room`` tokens."""
    tokens = wrap(prompt)
    if len(tokens) <= room:
        return tokens
    plain = llm.tokenize(prompt.encode("utf-8", "replace"), add_bos=False, special=False)
    half = (room - len(wrap(""))) // 2
    while half > 0:
        tokens = wrap("".join(llm.detokenize(part).decode("utf-8", "ignore") for part in (plain[:half], plain[-half:])))
        if len(tokens) <= room:
            return tokens
        half -= max((len(tokens) - room + 1) // 2, 1)  # text cut within a word can have more tokens than before
    raise DataError(f"{where}: the context leaves {max(room, 0)} tokens for a prompt; use a larger context (--ctx)")


def _lines(file: _Path) -> list[str]:
    try:
        with open(file, encoding="utf-8") as stream:
            return stream.read().split("\n")  # not splitlines(): JSON strings may hold U+2028 unescaped
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(file)!r} is not UTF-8 text ({error.reason}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {os.fspath(file)!r} ({error.strerror}); check the path") from error


def _record(line: str, where: str) -> dict[str, Any]:
    """Check one line. The fields that are used have the right types in what is returned."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); download the file again or mend the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object; each line must be one item of LongBench")
    record = {"all_classes": None, "length": None, **record}
    valid = {
        "input": isinstance(record.get("input"), str),
        "context": isinstance(record.get("context"), str),
        "dataset": isinstance(record.get("dataset"), str),
        "answers": _are_strings(record.get("answers")) and len(record["answers"]) > 0,
        "all_classes": record["all_classes"] is None or _are_strings(record["all_classes"]),
        "length": record["length"] is None or isinstance(record["length"], int),
    }
    for field in valid:
        if not valid[field]:
            raise DataError(
                f"{where} has no valid {field!r}; LongBench's lines have input, context, dataset (text), "
                "answers and all_classes (lists of texts)"
            )
    dataset = record["dataset"].removesuffix("_e")
    if dataset not in DATASETS:
        raise DataError(f"{where}: there is no dataset {record['dataset']!r}; LongBench has {', '.join(DATASETS)}")
    if DATASETS[dataset] == "classification" and not record["all_classes"]:
        raise DataError(f"{where} has no 'all_classes', which {dataset!r} needs; add the names to choose from")
    return record


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(element, str) for element in value)


def _by_dataset(path: _Path, what: str, kind: type) -> dict[str, Any]:
    try:
        table = json.loads("\n".join(_lines(path)))
    except ValueError as error:
        raise DataError(f"{os.fspath(path)!r} is not JSON ({error}); use LongBench's own file") from error
    fits = isinstance(table, dict) and all(type(value) is kind for value in table.values())
    if not fits or (kind is int and any(value < 1 for value in table.values())):
        raise DataError(f"{os.fspath(path)!r} does not give {what} by dataset; use LongBench's own file")
    return dict(table)


def _lookup(table: Mapping[str, Any], dataset: str, path: _Path, where: str) -> Any:
    for name in (dataset, dataset.removesuffix("_e")):
        if name in table:
            return table[name]
    raise DataError(f"{os.fspath(path)!r} has no {dataset!r}, which {where} needs; add it or leave that file out")
