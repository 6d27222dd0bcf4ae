"""What an evaluation has measured so far, on disk, so that a run can go on where it ended.

A file of results is named by the hash of its settings, so that results of other settings are never mixed in. Its first
line says what is measured and how; each of the others is one result.
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


Key: TypeAlias = tuple[str, str, str]  # item, contender and measure: what a result is of

_Line = TypeVar("_Line")


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One result, a line without what is empty.

    Attributes:
        values: figures by name; NaN, on disk null, for what came out as no number.
        text: what the model wrote.
        divergences: KL divergence from the full model of each token that ``values`` are means of, in nats.
    """

    item: str
    contender: str
    measure: str
    values: dict[str, float | None] = {}  # msgspec copies it
    text: str = ""
    divergences: tuple[float | None, ...] = ()

    @property
    def key(self) -> Key:
        return self.item, self.contender, self.measure


class _Header(msgspec.Struct, frozen=True):
    settings: dict[str, Any]
    facts: dict[str, Any]


@dataclass
class Store:
    """The results in a folder, from :func:`open_store`.

    Attributes:
        path, file: the open file of results, without a buffer: what could not be written is not written later.
        records: what is known; read and appended.
        facts: what was kept beside the settings when these results were begun.
    """

    path: Path
    file: FileIO
    records: dict[Key, Record]
    facts: dict[str, Any]

    def append(self, record: Record) -> None:
        """Add a result; when this returns, it is on the disk. After a FileError those before it are there."""
        _write(self.file, self.path, record)
        self.records[record.key] = record

    @property
    def others(self) -> list[Path]:
        """Files of results with other settings."""
        return sorted(path for path in self.path.parent.glob("items-*.jsonl") if path != self.path)


@contextlib.contextmanager
def open_store(folder: StrPath, settings: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> Iterator[Store]:
    """Take up the results in a folder, which is made where it is missing, and keep other runs out of it.

    Results belong together if the settings are equal, which are plain JSON values; the facts are kept beside them for
    the reader, without being compared.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"items-{content_hash(settings)[:12]}.jsonl"
    with _opened(folder / ".lock", "wb") as lock:
        try:
            _lock(lock.fileno())
        except OSError as error:
            raise DataError(
                f"another evaluation is writing into {os.fspath(folder)!r}; wait for it or choose another folder"
            ) from error
        with _opened(path, "a+b") as file:
            file.seek(0)
            content = file.readall()
            end = content.rfind(b"\n") + 1  # what a crash left of the last line does not count
            try:
                file.truncate(end)
            except OSError as error:
                raise write_error(path, error) from error
            lines = content[:end].splitlines()
            if lines:
                header = _parsed(lines[0], _Header, 1, path)
            else:
                header = _Header({**settings}, {**(facts or {})})
                _write(file, path, header)
            records = [_parsed(line, Record, number, path) for number, line in enumerate(lines[1:], 2)]
            yield Store(path, file, {record.key: record for record in records}, header.facts)


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[FileIO]:
    """Open a file without a buffer. What is in it was synced before it is closed, when errors tell nothing any more."""
    file = FileIO(path, mode)
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
        raise DataError(
            f"line {number} of {os.fspath(path)!r} is no result ({error}); remove it, or choose another folder"
        ) from error
