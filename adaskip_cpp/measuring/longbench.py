"""LongBench's tasks, read from the files that it publishes."""

import os
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeAlias

import msgspec

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..files import read_text
from .corpus import tokens_of
from .tasks import QuestionItem, Wrap

DATASETS = {
    dataset: metric
    for metric, datasets in (
        ("qa_f1", "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa"),
        ("qa_f1_zh", "multifieldqa_zh"),
        ("rouge_l", "gov_report qmsum multi_news samsum"),
        ("rouge_l_zh", "dureader vcsum"),
        ("classification", "trec lsht"),
        ("count", "passage_count"),
        ("retrieval", "passage_retrieval_en passage_retrieval_zh"),
        ("code_similarity", "lcc repobench-p"),
    )
    for dataset in datasets.split()
}
"""Metric by dataset. LongBench-E's names end in ``_e`` and are scored alike."""

_FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
_NO_CHAT = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
"""Few-shot prompts and code, which LongBench has completed as they stand."""

_Path: TypeAlias = "str | os.PathLike[str]"
_Length: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]


def longbench_items(
    llm: AdaSkipLlama,
    files: Iterable[_Path],
    *,
    prompts: _Path,
    lengths: _Path,
    n_ctx: int,
    wrap: Wrap,
    n_each: int | None = None,
) -> list[QuestionItem]:
    """Read LongBench's items as questions to a model, one file after the other. Blank lines are passed over.

    A prompt that does not fit the context is cut in its middle, as LongBench does: the first and the last half of what
    fits are decoded, joined, and tokenised again.

    Args:
        files: JSON Lines, each line an object with ``input``, ``context``, ``answers``, ``all_classes``, ``dataset``,
            and perhaps ``length`` and ``_id``.
        prompts: LongBench's ``dataset2prompt.json``: a template with ``{context}`` and ``{input}`` by dataset.
        lengths: LongBench's ``dataset2maxlen.json``: tokens to generate by dataset.
        n_ctx: tokens of prompt and answer together.
        wrap: not used for few-shot prompts and code, which LongBench gives to chat models as plain text too.
        n_each: take the first so many of each dataset; None for all.
    """
    templates, max_tokens = _table(prompts, str, "a template"), _table(lengths, _Length, "a length")
    raw = partial(tokens_of, llm, bos=True)
    items: list[QuestionItem] = []
    for fields, line, identity, where in _lines(files):
        if sum(item.task == line.dataset for item in items) == n_each:
            continue
        base = line.dataset.removesuffix("_e")
        for path, table in ((prompts, templates), (lengths, max_tokens)):
            if line.dataset not in table:
                raise DataError(
                    f"{os.fspath(path)!r} has no {line.dataset!r}, which {where} needs; add it or leave that file out"
                )
        room = n_ctx - max_tokens[line.dataset]
        try:
            prompt = _filled_in(templates[line.dataset], fields)
        except (LookupError, ValueError) as error:
            raise DataError(
                f"{os.fspath(prompts)!r}: the template of {line.dataset!r} cannot be filled in from {where} "
                f"({type(error).__name__}: {error}); it may name the line's fields, as {{context}} and {{input}}"
            ) from error
        item = QuestionItem(
            id=identity,
            task=line.dataset,
            prompt=tuple(_fit(llm, prompt, room, raw if base in _NO_CHAT else wrap, where)),
            answers=line.answers,
            max_tokens=max_tokens[line.dataset],
            metric=DATASETS[base],
            all_classes=line.all_classes or (),
            length=line.length or 0,
            first_line=base in _FIRST_LINE,
        )
        try:
            item.score("")  # what cannot be scored is told now and not when the model has answered for hours
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        items.append(item)
    return items


@dataclass(frozen=True)
class _Line:
    input: str
    context: str
    dataset: str
    answers: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    all_classes: tuple[str, ...] | None = None
    length: int | None = None
    _id: str | int | None = None


def _lines(files: Iterable[_Path]) -> Iterator[tuple[dict[str, Any], _Line, str, str]]:
    """Every line's fields, the same checked, an id of its own, and where it stands."""
    seen: set[str] = set()
    for file in files:
        stem = os.path.splitext(os.path.basename(file))[0]
        if stem in seen:
            raise DataError(f"{os.fspath(file)!r}: a file of this name was read before; name every file once")
        seen.add(stem)
        for number, text in enumerate(read_text(file).split("\n"), 1):  # not splitlines(): JSON may hold U+2028
            if not text.strip():
                continue
            where = f"{os.fspath(file)!r}, line {number}"
            fields, line = _line(text, where)
            identity = f"longbench/{stem}/{line._id or number}"
            identity += f"/{number}" if identity in seen else ""
            seen.add(identity)
            yield fields, line, identity, where


def _line(text: str, where: str) -> tuple[dict[str, Any], _Line]:
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
        line = msgspec.convert(fields, _Line)
    except msgspec.ValidationError as error:
        raise DataError(
            f"{where} is no item of LongBench ({error}); its lines have input, context, dataset (text), "
            "answers and all_classes (lists of texts)"
        ) from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and nesting without end
        raise DataError(f"{where} is not JSON ({error}); download the file again or mend the line") from error
    base = line.dataset.removesuffix("_e")
    if base not in DATASETS:
        raise DataError(f"{where}: there is no dataset {line.dataset!r}; LongBench has {', '.join(DATASETS)}")
    if DATASETS[base] == "classification" and not line.all_classes:
        raise DataError(f"{where} has no 'all_classes', which {base!r} needs; add the names to choose from")
    return fields, line


def _filled_in(template: str, fields: Mapping[str, Any]) -> str:
    """Fill in names alone: a width, as in ``{context:9999999999}``, would be bytes of memory."""
    parts = []
    for text, name, form, conversion in string.Formatter().parse(template):
        parts.append(text)
        if name is not None:
            value = fields[name]
            if form or conversion or not isinstance(value, str | int | float):
                raise ValueError(f"{name!r} is more than the name of a text")
            parts.append(str(value))
    return "".join(parts)


def _fit(llm: AdaSkipLlama, prompt: str, room: int, wrap: Wrap, where: str) -> Sequence[int]:
    """Wrap a prompt, its middle cut out if the result would be longer than ``room`` tokens."""
    tokens = wrap(prompt)
    if len(tokens) <= room:
        return tokens
    plain = tokens_of(llm, prompt)
    half = (room - len(wrap(""))) // 2
    while half > 0:
        tokens = wrap("".join(llm.detokenize(part).decode("utf-8", "ignore") for part in (plain[:half], plain[-half:])))
        if len(tokens) <= room:
            return tokens
        half -= max((len(tokens) - room + 1) // 2, 1)  # text cut within a word can have more tokens than before
    raise DataError(f"{where}: the context leaves {max(room, 0)} tokens for a prompt; use a larger context (--ctx)")


def _table(path: _Path, kind: Any, what: str) -> dict[str, Any]:
    """By dataset; what is not there for one of LongBench-E is that of LongBench."""
    try:
        table = msgspec.json.decode(read_text(path), type=dict[str, kind])
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{os.fspath(path)!r} does not give {what} by dataset ({error}); use LongBench's own file"
        ) from error
    return {**{f"{name}_e": value for name, value in table.items()}, **table}
