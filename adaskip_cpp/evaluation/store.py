"""What an evaluation has measured so far, on disk, so that a run can go on where it ended.

``settings.json`` says what is measured and how, with a hash of that; ``items.jsonl`` holds a line of JSON per result.
Results of other settings are never mixed in: they are put aside under names with their hash, and taken up again if
those settings come back. Results go before their settings, and come back behind them, so that a process that is killed
in between leaves settings without results here, whose results are then found under their hash.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from ..errors import DataError
from ..files import content_hash, json_text, replace, write_atomically, write_error
from ..measuring.timing import RequestTime

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


Key: TypeAlias = tuple[str, str, str]
"""Item, contender and measure: what a result is of."""

_ITEMS, _SETTINGS = "items.jsonl", "settings.json"


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One result, a line of ``items.jsonl`` without what is empty.

    Attributes:
        item, contender, measure: what it is of.
        values: figures by name; NaN, on disk null, for what came out as no number.
        text: what the model wrote.
        divergences: KL divergence from the full model of each token that ``values`` are means of, in nats.
        times: of a round of timing, by contender.
    """

    item: str
    contender: str
    measure: str
    values: dict[str, float | None] = {}  # msgspec copies it
    text: str = ""
    divergences: tuple[float | None, ...] = ()
    times: dict[str, RequestTime] = {}

    @property
    def key(self) -> Key:
        return self.item, self.contender, self.measure


@dataclass(frozen=True)
class _Header:
    hash: str
    facts: dict[str, Any]
    settings: dict[str, Any]


@dataclass
class Store:
    """The results in a folder, from :func:`open_store`.

    Attributes:
        records: what is known; read and appended.
        facts: what was kept beside the settings when these results were begun.
        set_aside: the file into which results of other settings were moved, or None.
        file: the open file of results, without a buffer: what could not be written is not written later.
    """

    folder: Path
    records: dict[Key, Record]
    facts: dict[str, Any]
    set_aside: Path | None
    file: FileIO

    def append(self, record: Record) -> None:
        """Add a result; when this returns, it is on the disk.

        Raises:
            FileError: it cannot be written. The results before it are there; the same run goes on behind them.
        """
        line = memoryview(msgspec.json.encode(record) + b"\n")
        try:
            while line:
                line = line[self.file.write(line) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise write_error(self.folder / _ITEMS, error) from error
        self.records[record.key] = record


@contextlib.contextmanager
def open_store(
    folder: str | os.PathLike[str], settings: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> Iterator[Store]:
    """Take up the results in a folder, which is made where it is missing, and keep other runs out of it.

    Results belong together if the settings are equal, which are plain JSON values; the facts are kept beside them for
    the reader, without being compared.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(folder / ".lock", "wb") as lock:
        try:
            _lock(lock.fileno())
        except OSError as error:
            raise DataError(
                f"another evaluation is writing into {os.fspath(folder)!r}; wait for it or choose another folder"
            ) from error
        header, set_aside = _take_up(folder, _Header(content_hash(settings), {**(facts or {})}, {**settings}))
        with _opened(folder / _ITEMS, "a+b") as file:
            file.seek(0)
            content = file.readall()
            end = content.rfind(b"\n") + 1  # what a crash left of the last line does not count
            try:
                file.truncate(end)
            except OSError as error:
                raise write_error(folder / _ITEMS, error) from error
            records = {record.key: record for record in _parse(content[:end], folder / _ITEMS)}
            yield Store(folder, records, header.facts, set_aside, file)


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[FileIO]:
    """Open a file without a buffer. What is in it was synced before it is closed, when errors tell nothing any more."""
    file = FileIO(path, mode)
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _take_up(folder: Path, mine: _Header) -> tuple[_Header, Path | None]:
    """Put results of other settings aside, and take up those of these settings, or write the settings."""
    here = folder / _ITEMS, folder / _SETTINGS
    found = _read_header(here[1])
    if found.hash == mine.hash:
        if not here[0].exists():
            _move(_aside(here, mine)[:1], here[:1])
        return found, None
    aside, earlier = _aside(here, found), _aside(here, mine)
    set_aside = aside[0] if here[0].exists() else None
    _move(here, aside)
    found = _read_header(earlier[1])
    if found.hash == mine.hash:
        _move(earlier[::-1], here[::-1])
        return found, set_aside
    write_atomically(here[1], json_text(mine))
    return mine, set_aside


def _aside(paths: Sequence[Path], header: _Header) -> list[Path]:
    """Where files of these settings are put aside."""
    return [path.with_name(f"{path.stem}-{header.hash[:12]}{path.suffix}") for path in paths]


def _move(paths: Sequence[Path], targets: Sequence[Path]) -> None:
    for path, target in zip(paths, targets, strict=True):
        with contextlib.suppress(FileNotFoundError):
            replace(path, target)


def _read_header(path: Path) -> _Header:
    """That of unknown settings if there is no such file, or if it is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Header)
    except (FileNotFoundError, msgspec.DecodeError):
        return _Header("unknown", {}, {})


def _parse(content: bytes, path: Path) -> Iterator[Record]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            yield msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError as error:
            raise DataError(
                f"line {number} of {os.fspath(path)!r} is no result ({error}); remove it, or choose another folder"
            ) from error
