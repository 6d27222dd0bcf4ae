"""What an evaluation has measured so far, on disk, so that a run can go on where it ended.

``settings.json`` says what is measured and how, with a hash of that; ``items.jsonl`` holds a line of JSON per result.
Results of other settings are never mixed in: they are put aside under names with their hash, and taken up again if
those settings come back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeAlias

import msgspec
import numpy as np

from ..errors import DataError
from ..files import write_atomically
from ..measuring.timing import RequestTime

__all__ = ["Key", "Record", "Store", "content_hash"]

Key: TypeAlias = tuple[str, str, str]
"""Item, contender and measure: what a result is of."""

_FILES = _ITEMS, _SETTINGS = "items.jsonl", "settings.json"
_N_HASH = 12
"""Digits of a hash in a file's name."""


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One result, a line of ``items.jsonl`` without what is empty.

    Attributes:
        item, contender, measure: what it is of.
        values: figures by name; NaN, on disk null, for what came out as no number.
        text: what the model wrote.
        times: of a round of timing, by contender.
    """

    item: str
    contender: str
    measure: str
    values: dict[str, float | None] = {}  # msgspec copies it
    text: str = ""
    times: dict[str, RequestTime] = {}

    @property
    def key(self) -> Key:
        """What it is of."""
        return self.item, self.contender, self.measure


@dataclass(frozen=True)
class _Header:
    """The content of ``settings.json``."""

    hash: str
    facts: dict[str, Any]
    settings: dict[str, Any]


def content_hash(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of all that something holds, arrays included, whatever the order of its keys.

    Args:
        value: dataclasses, arrays, tuples, lists, dictionaries and plain values, nested as they like.
    """

    def encode(other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return [str(other.dtype), other.shape, hashlib.sha256(other.tobytes()).hexdigest()]
        return dict(other)  # a read-only view of a dictionary

    return hashlib.sha256(msgspec.json.encode(value, enc_hook=encode, order="sorted")).hexdigest()


class Store:
    """The results in a folder; a context manager that keeps other runs out of it.

    Attributes:
        folder: where they are.
        records: what is known, by item, contender and measure; read and appended.
        facts: what was kept beside the settings when these results were begun.
        set_aside: the file into which results of other settings were moved, or None.

    Args:
        folder: made where it is missing.
        settings: what is measured, and how: results belong together if these are equal. Plain JSON values.
        facts: kept beside the settings for the reader, without being compared.

    Raises:
        DataError: another run is using the folder, or a line of its results is malformed.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, Any], facts: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.records: dict[Key, Record] = {}
        self.facts = dict(facts or {})
        self.set_aside: Path | None = None
        self._settings = dict(settings)
        self._open = contextlib.ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Store:
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            _lock(opened.enter_context(open(self.folder / ".lock", "w", encoding="utf-8")))
            self._take_up()
            self._file = opened.enter_context(open(self.folder / _ITEMS, "a+b"))
            self._file.seek(0)
            content = self._file.read()
            end = content.rfind(b"\n") + 1  # what a crash left of the last line does not count
            self._file.truncate(end)
            self.records = {record.key: record for record in _parse(content[:end], self.folder / _ITEMS)}
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file = None
        self._open.close()

    def append(self, record: Record) -> None:
        """Add a result; when this returns, it is on the disk.

        Raises:
            OSError: it cannot be written.
        """
        if self._file is None:
            raise ValueError("the store is closed; use it in a with statement")
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record.key] = record

    def _take_up(self) -> None:
        """Put results of other settings aside, and take up those of these settings, or write the settings."""
        mine = _Header(content_hash(self._settings), self.facts, self._settings)
        found = self._read_header(_SETTINGS)
        if found is None or found.hash != mine.hash:
            aside = [_aside(name, found.hash if found else "unknown") for name in _FILES]
            if (self.folder / _ITEMS).exists():
                self.set_aside = self.folder / aside[0]
            self._move(_FILES, aside)
            earlier = [_aside(name, mine.hash) for name in _FILES]
            found = self._read_header(earlier[1])
            if found is not None and found.hash == mine.hash:
                self._move(earlier, _FILES)
            else:
                found = mine
                write_atomically(self.folder / _SETTINGS, msgspec.json.format(msgspec.json.encode(mine), indent=1))
        self.facts = found.facts

    def _move(self, names: Sequence[str], targets: Sequence[str]) -> None:
        for name, target in zip(names, targets, strict=True):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.folder / name, self.folder / target)

    def _read_header(self, name: str) -> _Header | None:
        """None if there is no such file, or if it is damaged."""
        try:
            return msgspec.json.decode((self.folder / name).read_bytes(), type=_Header)
        except (FileNotFoundError, msgspec.DecodeError):
            return None


def _aside(name: str, digest: str) -> str:
    stem, ending = name.rsplit(".", 1)
    return f"{stem}-{digest[:_N_HASH]}.{ending}"


def _lock(file: IO[str]) -> None:
    """Refuse a file that another process has locked this way."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        folder = os.path.dirname(file.name)
        raise DataError(
            f"another evaluation is writing into {folder!r}; wait for it or choose another folder"
        ) from error


def _parse(content: bytes, path: Path) -> Iterator[Record]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            yield msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError as error:
            raise DataError(
                f"line {number} of {os.fspath(path)!r} is no result ({error}); remove it, or choose another folder"
            ) from error
