"""Text files read, JSON that people read, hashes of contents, and files written atomically where they can be."""

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
_PATIENCE_S = 2.0  # longer than a reader takes for a file of ours, or a virus scanner for a new one


def read_text(path: StrPath) -> str:
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


def write_atomically(
    path: StrPath,
    content: str | bytes,
    *,
    mode: int = 0o666,
    name: StrPath | None = None,
    follows_link: bool = True,
) -> None:
    """Write a file, of a mode that the umask narrows; after a failure the old one is still there, and no other.

    A FileError calls it ``name``, if not by its path. Unless ``follows_link``, a link of this name is replaced. A
    process that is killed meanwhile leaves a hidden ``.NAME.*.tmp`` beside it, which nothing reads.
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
    """Write a file and the one beside it that it names; after a failure the old ones are still there, and no others.

    Wherever the process is killed, one pair is whole, the old or the new: until the first file names what is written,
    that lies under the name ``waiting``, where readers look before they look into ``beside``. A FileError names it.
    """
    _check_regular(beside, beside)
    write_atomically(waiting, content, name=beside)
    try:
        write_atomically(path, text)
    except BaseException:
        is_written = False
        with contextlib.suppress(OSError):  # Ctrl-C may land right behind the replacement, as if that had failed
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
    """``os.replace``, with the patience that Windows asks for: it replaces no file that anybody reads just now."""
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
    """Return the error that names a file which cannot be written, and says what to do."""
    return FileError(
        f"cannot write {os.fspath(path)!r} ({error.strerror or error}); check its permissions and the space left, or "
        "choose another place"
    )


def _check_regular(target: StrPath, path: StrPath) -> None:
    if os.path.exists(target) and not os.path.isfile(target):
        raise FileError(f"{os.fspath(path)!r} is not a regular file; choose another name")
