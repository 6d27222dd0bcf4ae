"""Text files read, JSON that people read, hashes of contents, and files written atomically where they can be."""

import contextlib
import hashlib
import os
import re
import secrets
from typing import Any

import click
import msgspec
import numpy as np

from .errors import DataError


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file, ``-`` for stdin."""
    try:
        with click.open_file(path, encoding="utf-8") as file:
            return str(file.read())
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(path)!r} is not UTF-8 text ({error.reason}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {os.fspath(path)!r} ({error.strerror}); check the path") from error


def check_output(path: str, option: str = "-o") -> None:
    """Refuse a file that cannot be written before minutes of work, not after."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder {folder!r}; create it or choose another place with {option} FILE")
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise DataError(f"cannot write {path!r}; choose another place with {option} FILE")


def json_text(data: Any) -> str:
    """Return JSON that people read: indented, with lists of plain values on one line, and null for NaN."""
    text = msgspec.json.format(msgspec.json.encode(data), indent=1).decode() + "\n"
    # A list of plain values has no brackets inside, and JSON has no line breaks in strings.
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda row: "[" + re.sub(r",\s+", ", ", row[1]) + "]", text)


def content_hash(value: Any) -> str:
    """Return the SHA-256 in hexadecimal of all that it holds, arrays included, whatever the order of its keys."""

    def encode(other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return [str(other.dtype), other.shape, hashlib.sha256(other.tobytes()).hexdigest()]
        return dict(other)  # a read-only view of a dictionary

    return hashlib.sha256(msgspec.json.encode(value, enc_hook=encode, order="sorted")).hexdigest()


def write_atomically(path: str | os.PathLike[str], content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file, of a mode that the umask narrows; after a failure the old one is still there, and no other."""
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(f"{os.fspath(path)!r} is not a regular file; choose another name")
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_pair(path: str | os.PathLike[str], text: str, beside: str | os.PathLike[str], content: bytes) -> None:
    """Write a file and the one beside it that it names; after a failure the old ones are still there, and no others."""
    old = None
    with contextlib.suppress(FileNotFoundError), open(beside, "rb") as file:
        old = file.read()
    write_atomically(beside, content)
    try:
        write_atomically(path, text)
    except BaseException:
        with contextlib.suppress(OSError):
            if old is None:
                os.unlink(beside)
            else:
                write_atomically(beside, old)
        raise
