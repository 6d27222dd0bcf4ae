"""What an evaluation has measured so far, on disk, so that a run can go on where it ended.

``settings.json`` says what is measured and how, with a hash of that; ``items.jsonl`` holds a line of JSON per result.
Results of other settings are never mixed in: they are put aside under names with their hash, and taken up again if
those settings come back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..errors import DataError
from ..files import write_atomically

__all__ = ["Key", "Store", "settings_hash"]

Key = tuple[str, str, str]
"""Item, contender and measure: what a result is of."""

_KEY = ("item", "contender", "measure")
_ITEMS, _SETTINGS = "items.jsonl", "settings.json"
_N_HASH = 12
"""Digits of a hash in a file's name."""


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of settings, in hexadecimal, whatever the order of their keys.

    Args:
        settings: plain JSON values.
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True, allow_nan=False).encode()).hexdigest()


class Store:
    """The results in a folder; a context manager that keeps other runs out of it.

    Attributes:
        folder: where they are.
        records: what is known, by item, contender and measure; read and appended.
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
        self.records: dict[Key, dict[str, Any]] = {}
        self.set_aside: Path | None = None
        self._hash = settings_hash(settings)
        self._settings = dict(settings)
        self._facts = dict(facts or {})
        self._lock: IO[str] | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Store:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder / ".lock")
        try:
            self._take_up()
            path = self.folder / _ITEMS
            content = path.read_bytes() if path.exists() else b""
            records, n_good = _parse(content, path)
            self.records = {_key(record): record for record in records}
            self._file = open(path, "ab")
            self._file.truncate(n_good)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def append(self, item: str, contender: str, measure: str, values: Mapping[str, Any]) -> None:
        """Add a result; when this returns, it is on the disk.

        Raises:
            OSError: it cannot be written.
            ValueError: a value is not a finite number, a text, or a list or object of these.
        """
        if self._file is None:
            raise ValueError("the store is closed; use it in a with statement")
        record = {"item": item, "contender": contender, "measure": measure, **values}
        self._file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[item, contender, measure] = record

    def _take_up(self) -> None:
        """Put results of other settings aside, and write the settings if these are new here."""
        current = self.folder / _SETTINGS
        old = _read_hash(current)
        if old == self._hash:
            return
        if old is not None or (self.folder / _ITEMS).exists():
            for name in (_ITEMS, _SETTINGS):
                if (self.folder / name).exists():
                    target = self.folder / _named(name, old or "unknown")
                    os.replace(self.folder / name, target)
                    if name == _ITEMS:
                        self.set_aside = target
        earlier = [self.folder / _named(name, self._hash) for name in (_ITEMS, _SETTINGS)]
        if _read_hash(earlier[1]) == self._hash:
            for path, name in zip(earlier, (_ITEMS, _SETTINGS), strict=True):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, self.folder / name)
            return
        content = {"hash": self._hash, **self._facts, "settings": self._settings}
        write_atomically(current, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @property
    def facts(self) -> dict[str, Any]:
        """What was kept beside the settings when these results were begun."""
        with open(self.folder / _SETTINGS, encoding="utf-8") as file:
            content = json.load(file)
        return {name: value for name, value in content.items() if name not in ("hash", "settings")}

    def _close(self) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()
        self._file = self._lock = None


def _locked(path: Path) -> IO[str]:
    """Open a file that no other process has open this way."""
    import fcntl

    file = open(path, "w", encoding="utf-8")  # noqa: SIM115  # closed with the store
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise DataError(
            f"another evaluation is writing into {os.fspath(path.parent)!r}; wait for it or choose another folder"
        ) from error
    return file


def _named(name: str, digest: str) -> str:
    stem, ending = name.rsplit(".", 1)
    return f"{stem}-{digest[:_N_HASH]}.{ending}"


def _read_hash(path: Path) -> str | None:
    """The hash in a file of settings; None if there is no such file, ``"unknown"`` if it is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            return str(json.load(file)["hash"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return "unknown"


def _parse(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the results, and the bytes they take: what a crash left of the last line does not count."""
    end = content.rfind(b"\n") + 1
    records: list[dict[str, Any]] = []
    for number, line in enumerate(content[:end].splitlines(), start=1):
        try:
            record = json.loads(line)
            _key(record)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"line {number} of {os.fspath(path)!r} is no result ({error}); remove it, or choose another folder"
            ) from error
        records.append(record)
    return records, end


def _key(record: Mapping[str, Any]) -> Key:
    item, contender, measure = (str(record[name]) for name in _KEY)
    return item, contender, measure
