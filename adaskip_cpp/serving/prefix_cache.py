"""Saved states of prompts that one model has read, in memory and on disk. Start at :class:`PrefixCache`.

A file has these parts: ``MAGIC``, an HMAC-SHA256 of all that follows, the length of a JSON header, the header, token
ids, and a state. Numbers are little endian, and token ids are int32. The state is llama.cpp's, of sequence 0, with the
skip set of each cell. llama.cpp trusts a state. So only the owner of the folder may access it and the key of the HMAC.
"""

import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import msgspec
import numpy as np

from ..engine.runs import Tokens, n_common
from ..errors import DataError
from ..files import StrPath, write_atomically

MAGIC = b"adaskip prefix 2\n"
_SUFFIX = ".adaskip-prefix"
_LEFT_OVER = re.compile(rf"\..*{re.escape(_SUFFIX)}\.[0-9a-f]+\.tmp")  # left by write_atomically in a killed process
_OLD = 3600 * 10**9  # nanoseconds after which no process still writes such a file
_KEY, _KEY_BYTES = "hmac.key", 32
_MAC_BYTES, _MOST_HEADER = 32, 1 << 16
_READING = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"))
"""Flags for opening a file: follow no link, and do not wait for the writer of a pipe."""


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    n_tokens: int
    n_bytes: int


@dataclass(eq=False)
class Entry:
    """One saved state. ``state`` is None if it is only on disk, ``path`` is None if it is only in memory."""

    key: str  # names all that must be equal for its use: the model, its settings, the client, the plan
    tokens: Tokens
    n_bytes: int
    state: bytearray | None = None
    path: Path | None = None

    @property
    def n_file(self) -> int:
        """Bytes of its file, or slightly more: beside its state and its tokens, it has at most 1024."""
        return self.n_bytes + self.tokens.nbytes + 1024


class PrefixCache:
    """Saved states. The least recently used are dropped first. For one thread at a time. Another thread writes each new
    state to disk, unless it is still writing one. :meth:`close` writes the rest. Without ``can_rewind``, a state can be
    used only if the prompt begins with all of its tokens.

    Args:
        most: largest size of all states in memory, and of all files, in bytes.
        folder: keeps states for later processes; it is made if it is missing. None: only memory. Processes that share
            it should have the same ``most``: opening it removes the oldest files beyond that, of all processes. Raises
            DataError if it cannot be used, or if others may write to it.
    """

    def __init__(self, most: int, folder: StrPath | None = None) -> None:
        self.most, self.can_rewind = most, True
        self.folder = None if folder is None else Path(folder)
        self.entries: list[Entry] = []  # the most recently used last
        self.forgotten: deque[Entry] = deque(maxlen=16)  # for want of room, or damaged: to tell that they were known
        self._writer = ThreadPoolExecutor(1, "prefix-cache")
        self._has_warned = False
        self._writing: Future[None] | None = None
        if self.folder is not None:
            with usable(self.folder):
                self._hmac_key = _hmac_key(self.folder)
                self._scan(self.folder)

    def find(
        self, keys: Collection[str], tokens: Tokens, known: Callable[[Tokens, Tokens], int] = n_common
    ) -> tuple[Entry | None, int]:
        """Return the entry with one of ``keys`` that has most of a prompt, and its number of tokens; else (None, 0).
        ``known(entry_tokens, prompt_tokens)`` counts the tokens of the prompt that the entry has.
        """
        counted = [(each, known(each.tokens, tokens)) for each in self.entries if each.key in keys]
        loadable = [(each, n) for each, n in counted if n and (self.can_rewind or n == len(each.tokens))]
        return max(loadable, key=lambda pair: pair[1], default=(None, 0))

    def take(self, entry: Entry) -> bytearray | None:
        """Return the state of an entry, and mark it as just used; None if its file is gone or damaged."""
        if entry.state is None:
            self._writer.submit(int).result()  # wait until pending files are written
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
        self._bound(keep=entry)
        return entry.state

    def put(self, key: str, tokens: Tokens, state: bytearray) -> None:
        """Save a state if it fits. Drop entries whose tokens it also has."""
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
        """Write all entries to disk, and wait for that."""
        for entry in self.entries:
            if entry.path is None:
                self._save(entry)
        self._bound()
        self._writer.shutdown()

    @property
    def n_bytes(self) -> int:
        """Bytes of states in memory."""
        return sum(entry.n_bytes for entry in self.entries if entry.state is not None)

    def _bound(self, keep: Entry | None = None) -> None:
        """Drop states and files, oldest first, until both fit. An entry without either is forgotten."""
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
        with contextlib.suppress(ValueError):  # a later put may have removed it
            self.entries.remove(entry)
        self._drop_file(entry)

    def _drop_file(self, entry: Entry) -> None:
        path, entry.path = entry.path, None
        if path is not None:
            self._writer.submit(_unlink, path)  # runs after the file is written

    def _save(self, entry: Entry) -> None:
        """Let the writer thread write an entry, if there is a folder."""
        if self.folder is not None and entry.state is not None and entry.n_file <= self.most:
            digest = hashlib.sha256(entry.key.encode() + b"\0" + entry.tokens.tobytes()).hexdigest()[:32]
            entry.path = self.folder / f"{digest}{_SUFFIX}"
            self._writing = self._writer.submit(self._write, entry, entry.path, entry.state)

    def _write(self, entry: Entry, path: Path, state: bytearray) -> None:
        header = msgspec.json.encode(_Header(entry.key, len(entry.tokens), entry.n_bytes))
        n_header, tokens = len(header).to_bytes(8, "little"), entry.tokens.astype("<i4").tobytes()
        parts: list[bytes | bytearray] = [n_header, header, tokens, state]
        try:
            write_atomically(path, b"".join([MAGIC, self._mac(*parts), *parts]), mode=0o600, follows_link=False)
        except OSError as error:
            entry.path = None
            if not self._has_warned:
                self._has_warned = True
                logging.getLogger(__name__).warning("%s; states are now kept only in memory", error)

    def _scan(self, folder: Path) -> None:
        """Find the entries in the folder, oldest first. Delete damaged files, and old temporary ones."""
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
        """Read a file, with or without its state; None if it is gone or damaged. The HMAC is checked with the state."""
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
    """Make a folder for states if it is missing. Raise DataError if it, or the code in this context, cannot use it."""
    name = repr(str(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = folder.stat()
        if hasattr(os, "geteuid"):  # Windows has no such owners and modes
            if about.st_uid != os.geteuid():
                raise DataError(f"{name} belongs to another user; choose another --cache-dir")
            if about.st_mode & 0o022:  # they could write a state
                raise DataError(f"other users may write to {name}; choose another --cache-dir, or `chmod go-w` it")
        yield
    except OSError as error:
        raise DataError(f"cannot use {name} ({error.strerror or error}); choose another --cache-dir") from error


def _hmac_key(folder: Path) -> bytes:
    """Return the key for the HMACs in a folder. The first process there makes it."""
    path = folder / _KEY
    with contextlib.suppress(FileNotFoundError), _open_regular(path) as file:
        if len(key := file.read(_KEY_BYTES + 1)) == _KEY_BYTES:
            return key
    write_atomically(path, secrets.token_bytes(_KEY_BYTES), mode=0o600, follows_link=False)
    with _open_regular(path) as file:  # another process may have replaced it just now
        return file.read(_KEY_BYTES)


def _open_regular(path: Path) -> BufferedReader:
    """Open a file to read. Raise OSError for a link, a pipe or anything else that is not a regular file."""
    descriptor = os.open(path, _READING)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("no regular file")
    return os.fdopen(descriptor, "rb")


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
