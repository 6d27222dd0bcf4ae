"""Keeps the results of an unfinished ``tune`` in a file, so that the next run continues there."""

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from ..errors import AdaSkipError
from ..files import json_text, write_atomically
from ..model.identity import ModelInfo
from ..model.stored import numbers_for_nulls, vectors_path
from ..planning.profile import Profile

_T = TypeVar("_T")


class Memo:
    """Findings of an unfinished ``tune``: values by name in a JSON file, and a profile beside it.

    Args:
        path: the file; None keeps nothing.
        key: a text that stands for the model, the texts and the options, such as their hash. A file with another key is
            not read, and is written again.
    """

    def __init__(self, path: str | None = None, key: str = "") -> None:
        self._path = path
        self._profile_path = f"{(path or '').removesuffix('.json')}-profile.json"
        self._data: dict[str, Any] = {"key": key}
        if path is None:
            return
        with contextlib.suppress(OSError, ValueError):
            with open(path, "rb") as file:
                data: Any = numbers_for_nulls(msgspec.json.decode(file.read()))
            if isinstance(data, dict) and data.get("key") == key:
                self._data = data

    def get(self, name: str, kind: type[_T] | Any, make: Callable[[], _T]) -> _T:
        """Return a value by its name; make and keep it if the file has none. msgspec converts ``kind`` to JSON."""
        with contextlib.suppress(msgspec.ValidationError, KeyError):
            return msgspec.convert(self._data[name], kind)
        value = make()
        self._data[name] = msgspec.to_builtins(value)
        self._write()
        return value

    def _write(self) -> None:
        if self._path is not None:
            write_atomically(self._path, json_text(self._data))

    @property
    def n_read(self) -> int:
        """Tokens that all runs have read, the sum of those given to ``count``."""
        n = self._data.get("n_read")
        return n if isinstance(n, int) else 0

    def count(self, n_tokens: int) -> None:
        """Add to the tokens that all runs have read."""
        self._data["n_read"] = self.n_read + n_tokens
        self._write()

    def profile(self, model: ModelInfo) -> Profile | None:
        """Return the profile that an earlier run kept; None if there is none of ``AdaSkipLlama.model_info``."""
        with contextlib.suppress(AdaSkipError, OSError):
            if self._path is not None and self._data.get("profile"):
                found = Profile.load(self._profile_path)
                return found if found.model == model else None
        return None

    def keep_profile(self, profile: Profile) -> None:
        """Keep a profile for a later run."""
        if self._path is not None:
            profile.save(self._profile_path)
            self.get("profile", bool, lambda: True)

    def remove(self) -> None:
        """Remove the files, after the run has finished."""
        if self._path is not None:
            for path in (self._path, vectors_path(self._profile_path), self._profile_path):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
