"""Reads and writes files, for the whole package: start with ``read_text`` and ``write_atomically``."""

import contextlib
import hashlib
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any, TypeAlias

import click
import msgspec
import numpy as np

from .errors import DataError, FileError

StrPath: TypeAlias = str | os.PathLike[str]

_IN_USE = 5, 32  # ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION
_PATIENCE_S = 2.0  # longer than programs and virus scanners read one of our files


def read_text(path: StrPath) -> str:
    """Read a UTF-8 text file, ``-`` for stdin."""
    try:
        with click.open_file(path, encoding="utf-8") as file:
            return str(file.read()).removeprefix("\ufeff")  # a mark that some editors write
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(path)!r} is not UTF-8 text ({error.reason}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {os.fspath(path)!r} ({error.strerror}); check the path") from error


def json_text(data: Any) -> str:
    """Return JSON that people read: indented, with lists of plain values on one line, and null for NaN."""
    text = msgspec.json.format(msgspec.json.encode(data), indent=1).decode() + "\n"
    # A list of plain values has no brackets inside, and JSON has no line breaks in strings.
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda row: "[" + re.sub(r",\n\s+", ", ", row[1]) + "]", text)


def content_hash(value: Any) -> str:
    """Return the SHA-256 of a value with all its content, in hexadecimal; the order of keys has no effect."""

    def encode(other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return [str(other.dtype), other.shape, hashlib.sha256(other.tobytes()).hexdigest()]
        return dict(other)  # a read-only view of a dictionary

    return hashlib.sha256(msgspec.json.encode(value, enc_hook=encode, order="sorted")).hexdigest()


def write_atomically(
    path: StrPath, content: str | bytes, *, mode: int = 0o666, name: StrPath | None = None, follows_link: bool = True
) -> None:
    """Write a file whole or not at all: after a failure the old file is unchanged, and no new one is left.

    The umask narrows ``mode``. A FileError names ``name``, or else the path. Unless ``follows_link``, a link at the
    path is replaced. A process that is killed meanwhile leaves a hidden ``.NAME.*.tmp``, which nothing reads.
    """
    target = os.path.realpath(path) if follows_link else os.path.abspath(path)
    _check_regular(target, path)
    folder, base = os.path.split(target)
    temporary = os.path.join(folder, f".{base}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise write_error(name or path, error) from error
        raise


def write_pair(path: StrPath, text: str, beside: StrPath, content: bytes, waiting: StrPath) -> None:
    """Write a file and the one beside it that it names; after a failure the old ones are unchanged, no other is left.

    If the process is killed, one pair is whole: content waits at ``waiting``, where readers look first, until ``path``
    names it. A FileError names ``path`` or ``beside``.
    """
    _check_regular(beside, beside)
    write_atomically(waiting, content, name=beside)
    try:
        write_atomically(path, text)
    except BaseException:
        is_written = False
        with contextlib.suppress(OSError):  # Ctrl-C right after the replacement looks as if that had failed
            is_written = Path(path).read_bytes() == text.encode("utf-8")
        if is_written:
            replace(waiting, beside)
        else:
            with contextlib.suppress(OSError):
                os.unlink(waiting)
        raise
    try:
        replace(waiting, beside)
    except OSError as error:
        raise write_error(beside, error) from error


def replace(source: StrPath, target: StrPath) -> None:
    """As ``os.replace``, but try again for 2 seconds on Windows, which replaces no file that is being read."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in _IN_USE or time.monotonic() > end:
                raise
            time.sleep(0.02)


def write_error(path: StrPath, error: OSError) -> FileError:
    return FileError(f"cannot write {os.fspath(path)!r} ({error.strerror or error}); check access and the space left")


def _check_regular(target: StrPath, path: StrPath) -> None:
    if os.path.exists(target) and not os.path.isfile(target):
        raise FileError(f"{os.fspath(path)!r} is not a regular file; choose another name")
