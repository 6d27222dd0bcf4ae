"""What was read before, and need not be read again: saved states of one model, in memory and on disk.

A file is ``MAGIC``, the length of a JSON header, the header, token ids as int32 of little endian, and llama.cpp's state
of sequence 0, which knows under which sets its positions were computed. The header has the SHA-256 of all behind it.
"""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..files import StrPath, write_atomically

MAGIC = b"adaskip prefix 1\n"
_SUFFIX = ".adaskip-prefix"
_LEFT_OVER = re.compile(rf"\..*{re.escape(_SUFFIX)}\.[0-9a-f]+\.tmp")
"""What :func:`write_atomically` leaves when the process is killed."""
_MOST_HEADER = 1 << 16
_OVERHEAD = 1024  # bytes that a file counts for beside its tokens and its state: more than its header has

Tokens = npt.NDArray[np.int32]


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    n_tokens: int
    n_bytes: int
    sha256: str


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


def n_common(a: Tokens, b: Tokens) -> int:
    """Return how many tokens at the beginning are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n


class PrefixCache:
    """Saved states, the least recently used of which go first. Not for several threads at once.

    A state is written as soon as it is there, in a thread of its own, unless another one is being written; those that
    were not are written when the cache is closed. Unless ``can_rewind``, all tokens of a state begin the prompt.

    Args:
        most: bytes that they may take in memory, and in the folder.
        folder: where they outlast the process, made where it is missing; None for memory alone. Where several processes
            use it, each keeps its own files within the bound. A DataError where it cannot be used.
    """

    def __init__(self, most: int, folder: StrPath | None = None) -> None:
        self.most, self.can_rewind = most, True
        self.folder = None if folder is None else Path(folder)
        self.entries: list[Entry] = []  # the most recently used last
        self._writer = ThreadPoolExecutor(1, "prefix-cache")
        self._has_warned = False
        self._writing: Future[None] | None = None
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._scan(self.folder)
            except OSError as error:
                raise DataError(f"cannot use {str(folder)!r} ({error.strerror}); choose another --cache-dir") from error

    def find(self, keys: Collection[str], tokens: Tokens) -> tuple[Entry | None, int]:
        """Return the entry of one of these keys that has most of a prompt's first tokens, and how many; (None, 0)."""
        best, most = None, 0
        for entry in self.entries:
            if entry.key in keys:
                n = n_common(entry.tokens, tokens)
                if n > most and (self.can_rewind or n == len(entry.tokens)):
                    best, most = entry, n
        return best, most

    def take(self, entry: Entry) -> bytearray | None:
        """Return the state of an entry, which is the most recently used now; None where its file is gone or damaged."""
        if entry.state is None:
            self._writer.submit(int).result()  # it may be being written
            found = None if entry.path is None else _read(entry.path, with_state=True)
            if found is not None and (found.key, found.n_bytes) == (entry.key, entry.n_bytes):
                entry.state = found.state
        if entry.state is None:
            self._remove(entry)
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
        body = entry.tokens.astype("<i4").tobytes()
        digest = hashlib.sha256(body)
        digest.update(state)
        header = msgspec.json.encode(_Header(entry.key, len(entry.tokens), entry.n_bytes, digest.hexdigest()))
        try:
            content = b"".join([MAGIC, len(header).to_bytes(8, "little"), header, body, state])
            write_atomically(path, content, mode=0o600)
        except OSError as error:
            entry.path = None
            if not self._has_warned:
                self._has_warned = True
                print(f"{error}; what was read is kept in memory alone", file=sys.stderr)

    def _scan(self, folder: Path) -> None:
        """Take up what is there, the oldest first; what is no whole file of ours is removed."""
        found = []
        for path in folder.iterdir():
            is_ours = path.name.endswith(_SUFFIX)
            if is_ours and (entry := _read(path)) is not None:
                found.append((path.stat().st_mtime_ns, entry))
            elif is_ours or _LEFT_OVER.fullmatch(path.name):
                _unlink(path)
        self.entries = [entry for _, entry in sorted(found, key=lambda each: each[0])]
        self._bound()


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _read(path: Path, *, with_state: bool = False) -> Entry | None:
    """Read a file, with its state or all of it but that; None where it is gone, or no whole file of ours."""
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
            n_header = int.from_bytes(file.read(8), "little")
            header = msgspec.json.decode(file.read(min(n_header, _MOST_HEADER)), type=_Header)
            begin, n_tokens = file.tell(), 4 * header.n_tokens
            size = os.fstat(file.fileno()).st_size
            if header.n_tokens < 1 or header.n_bytes < 0 or size - begin != n_tokens + header.n_bytes:
                return None
            body = memoryview(file.read() if with_state else file.read(n_tokens))
    except (OSError, ValueError, OverflowError, msgspec.MsgspecError):
        return None
    if with_state and hashlib.sha256(body).hexdigest() != header.sha256:
        return None
    tokens = np.frombuffer(body[:n_tokens], "<i4").astype(np.int32)
    return Entry(header.key, tokens, header.n_bytes, bytearray(body[n_tokens:]) if with_state else None, path)
