"""Text files read, and files written atomically."""

from __future__ import annotations

import contextlib
import os
import secrets

from .errors import DataError

__all__ = ["read_text", "write_atomically"]


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file.

    Raises:
        DataError: it cannot be read or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{os.fspath(path)!r} is not UTF-8 text ({error.reason}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {os.fspath(path)!r} ({error.strerror}); check the path") from error


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file; after a failure the old one is still there, and no other.

    Raises:
        OSError: the file cannot be written.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(f"{os.fspath(path)!r} is not a regular file; choose another name")
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
