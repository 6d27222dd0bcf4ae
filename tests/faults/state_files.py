"""Folders of cached states as a list of dicts describes them: real files changed, or anything else of any name."""

from __future__ import annotations

import hmac
import json
import os
from pathlib import Path
from typing import Any

from adaskip_cpp.serving.prefix_cache import MAGIC

__all__ = ["FOLDER_KEY", "changed_state", "put_file"]

FOLDER_KEY = bytes(32)
_MAC = 32


def changed_state(content: bytes, changes: dict[str, Any]) -> tuple[bytes, bytes]:
    """Return a file made of a real one, and its state.

    ``{"text": T}`` is these bytes alone, as Latin-1. Else ``header`` is put over the header, or in its place where it
    is no dict; ``length`` is what the file says of its length; ``tokens`` replace the tokens; ``put`` is a list of
    [POSITION, VALUE], numbers of 32 bits in the state, from its end where the position is negative; ``repeat`` is how
    often the state is there; ``cut`` leaves so many bytes of the file; ``signed`` has an HMAC of all that.
    """
    if "text" in changes:
        return changes["text"].encode("latin-1", "replace"), b""
    start = len(MAGIC) + _MAC + 8
    length = int.from_bytes(content[start - 8 : start], "little")
    header = json.loads(content[start : start + length])
    tokens = content[start + length :][: 4 * header["n_tokens"]]
    state = bytearray(content[start + length + len(tokens) :]) * min(int(changes.get("repeat", 1)), 20)
    for at, value in changes.get("put", ())[:200]:
        first = int(at) % max(len(state) - 3, 1)
        state[first : first + 4] = (int(value) % 2**32).to_bytes(4, "little")
    if "tokens" in changes:
        tokens = b"".join((int(each) % 2**32).to_bytes(4, "little") for each in changes["tokens"])
    other = changes.get("header", {})
    head = json.dumps({**header, **other} if isinstance(other, dict) else other).encode()
    size = (int(changes.get("length", len(head))) % 2**64).to_bytes(8, "little")
    body = size + head + tokens + state
    mac = content[len(MAGIC) : len(MAGIC) + _MAC]
    if changes.get("signed"):
        mac = hmac.digest(FOLDER_KEY, body, "sha256")
    whole = MAGIC + mac + body
    return whole[: int(changes["cut"])] if "cut" in changes else whole, bytes(state)


def put_file(path: Path, content: bytes, kind: str, elsewhere: Path) -> None:
    """Write a file; or a link to one elsewhere of this content, a pipe or a folder."""
    if kind == "link":
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(content)
