"""Keeps the results of an unfinished ``tune`` or ``evaluate`` in a file, so that the next run continues there."""

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from ..errors import AdaSkipError
from ..files import StrPath, write_atomically
from ..model.identity import ModelInfo
from ..model.stored import numbers_for_nulls, vectors_path
from ..planning.profile import Profile

_T = TypeVar("_T")


class Memo:
    """Findings of an unfinished run: values by name in a JSON file, and a profile beside it.

    Args:
        path: the file; None keeps nothing.
        key: a text that stands for all that the findings depend on, such as a hash of the model, the texts and the
            options. A file with another key is not read, and is written again.
    """

    def __init__(self, path: StrPath | None = None, key: str = "") -> None:
        self.path = path if path is None else os.fspath(path)
        self._profile_path = f"{(self.path or '').removesuffix('.json')}-profile.json"
        self._data: dict[str, Any] = {"key": key}
        if self.path is None:
            return
        with contextlib.suppress(OSError, ValueError):
            with open(self.path, "rb") as file:
                data: Any = numbers_for_nulls(msgspec.json.decode(file.read()))
            if isinstance(data, dict) and data.get("key") == key:
                self._data = data

    def find(self, name: str, kind: type[_T] | Any) -> _T | None:
        """Return a value by its name; None if there is none of this kind. msgspec converts ``kind`` from JSON."""
        with contextlib.suppress(msgspec.ValidationError, KeyError):
            return msgspec.convert(self._data[name], kind)
        return None

    def keep(self, values: Mapping[str, Any]) -> None:
        """Keep values by their names, all or none: they are on the disk when this returns, unless it is a FileError."""
        self._data |= {name: msgspec.to_builtins(value) for name, value in values.items()}
        if self.path is not None:
            write_atomically(self.path, msgspec.json.encode(self._data))

    def get(self, name: str, kind: type[_T] | Any, make: Callable[[], _T]) -> _T:
        """Return a value by its name, as ``find``; make and keep it if there is none."""
        if (value := self.find(name, kind)) is None:
            self.keep({name: (value := make())})
        return value

    @property
    def n_read(self) -> int:
        """Tokens that all runs have read, the sum of those given to ``count``."""
        return self.find("n_read", int) or 0

    def count(self, n_tokens: int) -> None:
        """Add to the tokens that all runs have read."""
        self.keep({"n_read": self.n_read + n_tokens})

    def profile(self, model: ModelInfo) -> Profile | None:
        """Return the profile that an earlier run kept; None if there is none of ``AdaSkipLlama.model_info``."""
        with contextlib.suppress(AdaSkipError, OSError):
            if self.path is not None and self.find("profile", bool):
                found = Profile.load(self._profile_path)
                return found if found.model == model else None
        return None

    def keep_profile(self, profile: Profile) -> None:
        """Keep a profile for a later run."""
        if self.path is not None:
            profile.save(self._profile_path)
            self.keep({"profile": True})

    def remove(self) -> None:
        """Remove the files, after the run has finished."""
        if self.path is not None:
            for path in (self.path, vectors_path(self._profile_path), self._profile_path):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
