"""What was read before, and need not be read again: saved states of one model, in memory and on disk.

A file is ``MAGIC``, an HMAC-SHA256 of all that follows, the length of a JSON header, the header, token ids as int32 of
little endian, and llama.cpp's state of sequence 0, which knows under which sets its positions were computed. llama.cpp
believes what is in a state, so the folder and the key of the HMAC in it are their owner's alone.
"""

import contextlib
import errno
import hashlib
import hmac
import os
import re
import secrets
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import msgspec
import numpy as np

from ..engine.edits import Tokens, n_common
from ..errors import DataError
from ..files import StrPath, write_atomically

MAGIC = b"adaskip prefix 2\n"
_SUFFIX = ".adaskip-prefix"
_LEFT_OVER = re.compile(rf"\..*{re.escape(_SUFFIX)}\.[0-9a-f]+\.tmp")
"""What :func:`write_atomically` leaves when the process is killed."""
_OLD = 3600 * 10**9  # nanoseconds after which nobody writes such a file any more
_KEY, _KEY_BYTES = "hmac.key", 32
_MAC_BYTES, _MOST_HEADER = 32, 1 << 16
_READING = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"))
"""Follows no link, and does not wait for the writer of a pipe."""
_MOST_FORGOTTEN = 16  # each has its token ids, so that it can be told that a prompt was known
_OVERHEAD = 1024  # bytes that a file counts for beside its tokens and its state: more than its header has


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    n_tokens: int
    n_bytes: int


@dataclass(eq=False)
class Entry:
    """One saved state: ``state`` is None where it is on disk alone, ``path`` where it is in memory alone.

    ``key`` is of all that must be equal for it to be read: the model, its settings, the plan.
    """

    key: str
    tokens: Tokens
    n_bytes: int
    state: bytearray | None = None
    path: Path | None = None

    @property
    def n_file(self) -> int:
        """Bytes of its file, or somewhat more."""
        return self.n_bytes + self.tokens.nbytes + _OVERHEAD


class PrefixCache:
    """Saved states, the least recently used of which go first. Not for several threads at once.

    A state is written as soon as it is there, in a thread of its own, unless another one is being written; those that
    were not are written when the cache is closed. Unless ``can_rewind``, all tokens of a state begin the prompt.

    Args:
        most: bytes that they may take in memory, and in the folder.
        folder: where they outlast the process, made where it is missing; None for memory alone. Where several processes
            use it, each keeps its own files within the bound. A DataError where it cannot be used, or is not this
            user's alone.
    """

    def __init__(self, most: int, folder: StrPath | None = None) -> None:
        self.most, self.can_rewind = most, True
        self.folder = None if folder is None else Path(folder)
        self.entries: list[Entry] = []  # the most recently used last
        self.forgotten: deque[Entry] = deque(maxlen=_MOST_FORGOTTEN)  # for want of room, or with a damaged file
        self._writer = ThreadPoolExecutor(1, "prefix-cache")
        self._has_warned = False
        self._writing: Future[None] | None = None
        self._hmac_key = b""
        if self.folder is not None:
            with usable(self.folder):
                self._hmac_key = _hmac_key(self.folder)
                self._scan(self.folder)

    def find(
        self, keys: Collection[str], tokens: Tokens, known: Callable[[Tokens, Tokens], int] = n_common
    ) -> tuple[Entry | None, int]:
        """Return the entry of one of these keys by which most of a prompt is known, and how much; (None, 0) for none.

        ``known`` counts the tokens that a prompt has of those of an entry.
        """
        best, most = None, 0
        for entry in self.entries:
            if entry.key in keys:
                n = known(entry.tokens, tokens)
                if n > most and (self.can_rewind or n == len(entry.tokens)):
                    best, most = entry, n
        return best, most

    def take(self, entry: Entry) -> bytearray | None:
        """Return the state of an entry, which is the most recently used now; None where its file is gone or damaged."""
        if entry.state is None:
            self._writer.submit(int).result()  # it may be being written
            found = None if entry.path is None else self._read(entry.path, with_state=True)
            if found is not None and found.key == entry.key and np.array_equal(found.tokens, entry.tokens):
                entry.state = found.state
        if entry.state is None:
            self._remove(entry)
            self.forgotten.append(entry)
            return None
        self.entries.remove(entry)
        self.entries.append(entry)
        if entry.path is not None:
            with contextlib.suppress(OSError):
                os.utime(entry.path)
        state = entry.state
        self._bound(keep=entry)
        return state

    def put(self, key: str, tokens: Tokens, state: bytearray) -> None:
        """Keep a state that fits; what it has all the tokens of is dropped, as a part of it serves as well."""
        if len(state) > self.most:
            return
        for other in [each for each in self.entries if each.key == key]:
            common = n_common(other.tokens, tokens)
            if common == len(other.tokens) and (self.can_rewind or len(tokens) == common):
                self._remove(other)
        entry = Entry(key, tokens.astype(np.int32), len(state), state)
        self.entries.append(entry)
        if self._writing is None or self._writing.done():
            self._save(entry)
        self._bound()

    def close(self) -> None:
        """Write what was not written yet, and wait for it."""
        for entry in self.entries:
            if entry.path is None:
                self._save(entry)
        self._bound()
        self._writer.shutdown()

    @property
    def n_bytes(self) -> int:
        """Bytes in memory."""
        return sum(entry.n_bytes for entry in self.entries if entry.state is not None)

    def _bound(self, keep: Entry | None = None) -> None:
        """Drop states from memory, and files, until both fit; an entry that has neither any more is forgotten."""
        in_memory, on_disk = self.n_bytes, sum(each.n_file for each in self.entries if each.path is not None)
        for entry in list(self.entries):
            if in_memory > self.most and entry.state is not None and entry is not keep:
                entry.state = None
                in_memory -= entry.n_bytes
            if on_disk > self.most and entry.path is not None:
                self._drop_file(entry)
                on_disk -= entry.n_file
            if entry.state is None and entry.path is None:
                self.entries.remove(entry)
                self.forgotten.append(entry)

    def _remove(self, entry: Entry) -> None:
        with contextlib.suppress(ValueError):  # what was put since it was found may have taken its place
            self.entries.remove(entry)
        self._drop_file(entry)

    # -- on disk ---------------------------------------------------------------------------------------------------

    def _drop_file(self, entry: Entry) -> None:
        path, entry.path = entry.path, None
        if path is not None:
            self._writer.submit(_unlink, path)  # behind its own writing

    def _save(self, entry: Entry) -> None:
        """Have the writer write an entry, where there is a folder."""
        if self.folder is not None and entry.state is not None and entry.n_file <= self.most:
            digest = hashlib.sha256(entry.key.encode() + b"\0" + entry.tokens.tobytes()).hexdigest()[:32]
            entry.path = self.folder / f"{digest}{_SUFFIX}"
            self._writing = self._writer.submit(self._write, entry, entry.path, entry.state)

    def _write(self, entry: Entry, path: Path, state: bytearray) -> None:
        header = msgspec.json.encode(_Header(entry.key, len(entry.tokens), entry.n_bytes))
        parts: list[bytes | bytearray] = [
            len(header).to_bytes(8, "little"),
            header,
            entry.tokens.astype("<i4").tobytes(),
            state,
        ]
        try:
            content = b"".join([MAGIC, self._mac(*parts), *parts])
            write_atomically(path, content, mode=0o600, follows_link=False)
        except OSError as error:
            entry.path = None
            if not self._has_warned:
                self._has_warned = True
                print(f"{error}; what was read is kept in memory alone", file=sys.stderr)

    def _scan(self, folder: Path) -> None:
        """Take up what is there, the oldest first; what is no whole file of ours is removed.

        Another process may be writing a file that is not whole yet, so one of those is removed when it is old.
        """
        found = []
        for path in folder.iterdir():
            is_ours = path.name.endswith(_SUFFIX)
            with contextlib.suppress(FileNotFoundError):  # another process has removed or renamed it
                changed = path.lstat().st_mtime_ns
                if is_ours and (entry := self._read(path)) is not None:
                    found.append((changed, entry))
                elif is_ours or (_LEFT_OVER.fullmatch(path.name) and time.time_ns() - changed > _OLD):
                    _unlink(path)
        self.entries = [entry for _, entry in sorted(found, key=lambda each: each[0])]
        self._bound()

    def _read(self, path: Path, *, with_state: bool = False) -> Entry | None:
        """Read a file, with its state or all of it but that; None where it is gone, or no whole file of ours.

        Only with its state it is known whether a process with the folder's key wrote it.
        """
        try:
            with _open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size > self.most + _MOST_HEADER or file.read(len(MAGIC)) != MAGIC:
                    return None
                mac, length = file.read(_MAC_BYTES), file.read(8)
                head = file.read(min(int.from_bytes(length, "little"), _MOST_HEADER))
                header = msgspec.json.decode(head, type=_Header)
                n_tokens, n_rest = 4 * header.n_tokens, size - file.tell()
                if header.n_tokens < 1 or header.n_bytes < 0 or n_rest != n_tokens + header.n_bytes:
                    return None
                body = file.read(n_tokens)
                entry = Entry(header.key, np.frombuffer(body, "<i4").astype(np.int32), header.n_bytes, path=path)
                if with_state:
                    entry.state = bytearray(header.n_bytes)
                    file.readinto(entry.state)
        except (OSError, ValueError, OverflowError, msgspec.MsgspecError):
            return None
        if entry.state is not None and not hmac.compare_digest(mac, self._mac(length, head, body, entry.state)):
            return None
        return entry

    def _mac(self, *parts: bytes | bytearray) -> bytes:
        mac = hmac.new(self._hmac_key, digestmod="sha256")
        for part in parts:
            mac.update(part)
        return mac.digest()


@contextlib.contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Make a folder for states, where it is missing; a DataError where it, or what is done with it, cannot be had."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(folder)
        yield
    except OSError as error:
        raise DataError(
            f"cannot use {str(folder)!r} ({error.strerror or error}); choose another --cache-dir"
        ) from error


def _check_owner(folder: Path) -> None:
    """Refuse a folder in which another user could put a state, or read one."""
    about = folder.stat()
    if not hasattr(os, "geteuid"):  # Windows has other rules
        return
    if about.st_uid != os.geteuid():
        raise DataError(f"{str(folder)!r} belongs to another user; choose another --cache-dir")
    if about.st_mode & 0o022:
        raise DataError(f"other users may write in {str(folder)!r}; choose another --cache-dir, or `chmod go-w` it")


def _hmac_key(folder: Path) -> bytes:
    """Return the key of the states in a folder, which the first process there makes."""
    path = folder / _KEY
    with contextlib.suppress(FileNotFoundError), _open_regular(path) as file:
        if len(key := file.read(_KEY_BYTES + 1)) == _KEY_BYTES:
            return key
    write_atomically(path, secrets.token_bytes(_KEY_BYTES), mode=0o600, follows_link=False)
    with _open_regular(path) as file:  # that of a process which did the same just now
        return file.read(_KEY_BYTES)


def _open_regular(path: Path) -> BufferedReader:
    """Open a file to read; an OSError where it is a link, a pipe or anything else that is no file."""
    descriptor = os.open(path, _READING)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
