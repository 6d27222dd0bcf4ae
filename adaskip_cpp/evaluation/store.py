"""Keeps the results of an evaluation on disk, so that an interrupted run can continue. Start at :func:`open_store`.

Each file of results is named by the hash of its settings, so results of different settings never mix. Its first line
holds the settings; each other line is one result.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec

from ..errors import DataError
from ..files import StrPath, content_hash, write_error

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


Key: TypeAlias = tuple[str, str, str]  # item, contender and measure of a result

_Line = TypeVar("_Line")


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One result, a line of the file; empty fields are left out."""

    item: str
    contender: str
    measure: str
    values: dict[str, float | None] = {}  # figures by name; NaN is null on disk. msgspec copies the default
    text: str = ""  # the model's answer
    divergences: tuple[float | None, ...] = ()  # KL(whole model || contender) of each judged token, in nats

    @property
    def key(self) -> Key:
        return self.item, self.contender, self.measure


class _Header(msgspec.Struct, frozen=True):
    settings: dict[str, Any]
    facts: dict[str, Any]


@dataclass
class Store:
    """The results in a folder, from :func:`open_store`."""

    path: Path
    file: FileIO  # without a buffer, so that a failed write is not repeated later
    records: dict[Key, Record]  # those read from the file and those appended
    facts: dict[str, Any]  # stored with the settings when these results were begun

    def append(self, record: Record) -> None:
        """Add a result, which is on the disk when this returns. A FileError leaves the earlier results intact."""
        _write(self.file, self.path, record)
        self.records[record.key] = record

    @property
    def others(self) -> list[Path]:
        """Files of results with other settings."""
        return sorted(path for path in self.path.parent.glob("items-*.jsonl") if path != self.path)


@contextlib.contextmanager
def open_store(folder: StrPath, settings: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> Iterator[Store]:
    """Open the results in a folder, which is made if it is missing, and lock it for this run.

    Results with equal settings (plain JSON values) belong together. Facts are stored with them, but not compared.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    path = folder / f"items-{content_hash(settings)[:12]}.jsonl"
    with _opened(folder / ".lock", "wb") as lock:
        try:
            _lock(lock.fileno())
        except OSError as error:
            why = f"another evaluation is writing into {os.fspath(folder)!r}"
            raise DataError(f"{why}; wait for it or choose another folder") from error
        with _opened(path, "a+b") as file:
            file.seek(0)
            content = file.readall()
            end = content.rfind(b"\n") + 1  # a crash may have left a part of the last line
            try:
                file.truncate(end)
            except OSError as error:
                raise write_error(path, error) from error
            lines = content[:end].splitlines()
            header = _parsed(lines[0], _Header, 1, path) if lines else _Header({**settings}, {**(facts or {})})
            if not lines:
                _write(file, path, header)
            records = [_parsed(line, Record, number, path) for number, line in enumerate(lines[1:], 2)]
            yield Store(path, file, {record.key: record for record in records}, header.facts)


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[FileIO]:
    """Open a file without a buffer. Its content is synced by then, so errors while closing it do not matter."""
    try:
        file = FileIO(path, mode)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _write(file: FileIO, path: Path, line: msgspec.Struct) -> None:
    rest = memoryview(msgspec.json.encode(line) + b"\n")
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error


def _parsed(line: bytes, kind: type[_Line], number: int, path: Path) -> _Line:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.DecodeError as error:
        why = f"line {number} of {os.fspath(path)!r} is not a result ({error})"
        raise DataError(f"{why}; remove the line, or choose another folder") from error
