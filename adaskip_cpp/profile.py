"""A profile: what calibration learned about the sublayers of one model."""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .compensation import get_compensation
from .errors import BudgetError, ProfileFormatError, ProfileMissingError, ProfileVersionError
from .files import write_atomically
from .model import ModelInfo
from .plan import SkipPlan, SkipSet
from .strategies import get_strategy

__all__ = ["Profile"]

_FORMAT = "adaskip-profile"
_FORMAT_VERSION = 1
_STATISTICS = ("similarity", "norm_ratio", "median_ratio")


@dataclass(frozen=True, eq=False)
class Profile:
    """Statistics of one model's sublayers in prefill, averaged over calibration requests.

    The arrays are float64 ``[n_layer, 2]``, columns attention and FFN, read-only, and NaN where a sublayer cannot be
    taken out of the model's graph.

    Attributes:
        similarity: mean IO similarity.
        norm_ratio: mean of ``||V||_F / ||U||_F``, the paper's compensation.
        median_ratio: mean of the median per-token ``|v| / |u|``.
        n_requests: calibration requests.
        n_tokens: their tokens, all together.
        model: the model that was calibrated.
        corpus: what text it was calibrated on, in words.
        package_version: version of adaskip-cpp that calibrated it.
        created: UTC time of calibration, ISO 8601.

    Raises:
        ProfileFormatError: the arrays' shapes or values are impossible.
    """

    similarity: npt.NDArray[np.float64]
    norm_ratio: npt.NDArray[np.float64]
    median_ratio: npt.NDArray[np.float64]
    n_requests: int
    n_tokens: int
    model: ModelInfo
    corpus: str = ""
    package_version: str = ""
    created: str = ""

    def __post_init__(self) -> None:
        observed = ~np.isnan(np.asarray(self.similarity, np.float64))
        for name in _STATISTICS:
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.shape != (self.model.n_layer, 2):
                raise ProfileFormatError(
                    f"{name!r} has the shape {array.shape}, not [{self.model.n_layer}, 2]; calibrate again"
                )
            if np.isinf(array).any() or (np.isnan(array) == observed).any():
                raise ProfileFormatError(f"{name!r} has values that calibration cannot give; calibrate again")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Profile(architecture={self.model.architecture!r}, n_layer={self.n_layer}, "
            f"n_requests={self.n_requests}, n_tokens={self.n_tokens}, fingerprint={self.model.fingerprint[:12]!r})"
        )

    @property
    def n_layer(self) -> int:
        """Number of layers of the model."""
        return self.model.n_layer

    @property
    def skippable(self) -> npt.NDArray[np.bool_]:
        """bool ``[n_layer, 2]``: the sublayers that were observed and so can be skipped."""
        return ~np.isnan(self.similarity)

    def plan(self, n_skip: int = 12, compensation: str = "paper", *, strategy: str = "adaskip") -> SkipPlan:
        """Choose sublayers to skip, the same in prefill and decode.

        Args:
            n_skip: number of sublayers to skip.
            compensation: ``"paper"`` (norm ratio), ``"none"`` (1.0) or ``"median"`` (median per-token ratio).
            strategy: how to choose; ``"adaskip"`` is the paper's offline rule.

        Raises:
            BudgetError: ``n_skip`` is negative or more than can be skipped.
            CompensationError: ``compensation`` is unknown.
            PlanError: ``strategy`` is unknown.
        """
        choose, compensate = get_strategy(strategy), get_compensation(compensation)
        n_max = int(self.skippable.sum())
        try:
            budget = operator.index(n_skip)
        except TypeError:
            raise BudgetError(f"n_skip is {n_skip!r}; use a whole number from 0 to {n_max}") from None
        if not 0 <= budget <= n_max:
            raise BudgetError(
                f"cannot skip {budget} sublayers: {n_max} of this model's {2 * self.n_layer} can be skipped; "
                f"use a number from 0 to {n_max}"
            )
        skip = choose(self, budget)
        chosen = SkipSet(skip, np.where(skip, compensate(self), 1.0))
        return SkipPlan(chosen, chosen, self.model, strategy, compensation)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the file format, with null for NaN."""
        return {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "model": self.model.to_dict(),
            "calibration": {
                "n_requests": self.n_requests,
                "n_tokens": self.n_tokens,
                "corpus": self.corpus,
                "package_version": self.package_version,
                "created": self.created,
            },
            "prefill": {name: _to_rows(getattr(self, name)) for name in _STATISTICS},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Profile:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ProfileFormatError: not a profile, or a field is missing or malformed.
            ProfileVersionError: a profile in a format version that this release does not read.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ProfileFormatError("this is not an adaskip profile; write one with `adaskip-cpp calibrate`")
        if data.get("version") != _FORMAT_VERSION:
            raise ProfileVersionError(
                f"the profile has format version {data.get('version')!r}, this release reads {_FORMAT_VERSION}; "
                "calibrate again or install the release that wrote it"
            )
        try:
            model = ModelInfo.from_dict(data["model"])
            calibration, prefill = data["calibration"], data["prefill"]
            arrays = [_from_rows(prefill[name]) for name in _STATISTICS]
            counts = [_count(calibration, name) for name in ("n_requests", "n_tokens")]
            words = [str(calibration.get(name, "")) for name in ("corpus", "package_version", "created")]
        except KeyError as error:
            raise ProfileFormatError(f"the profile lacks {error}; calibrate again") from error
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ProfileFormatError(f"the profile is malformed ({error}); calibrate again") from error
        return cls(arrays[0], arrays[1], arrays[2], counts[0], counts[1], model, words[0], words[1], words[2])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, atomically: after a failure the old file is still there, and no other.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), allow_nan=False, indent=1) + "\n"
        # One layer a line: a list of plain values has no brackets inside, and JSON has no line breaks in strings.
        text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda row: "[" + re.sub(r",\s+", ", ", row[1]) + "]", text)
        write_atomically(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile file.

        Raises:
            ProfileMissingError: there is no such file; also a ``FileNotFoundError``.
            ProfileFormatError: truncated, not JSON, not a profile, or a field is missing or malformed.
            ProfileVersionError: written in a format version that this release does not read.
            OSError: the file cannot be read.
        """
        name = os.fspath(path)
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
        except FileNotFoundError:
            raise ProfileMissingError(
                f"there is no profile {name!r}; write one with `adaskip-cpp calibrate MODEL -o {name}`"
            ) from None
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of absurd length
            raise ProfileFormatError(
                f"{name!r} is truncated or is not JSON ({error}); write it again with `adaskip-cpp calibrate`"
            ) from error
        try:
            return cls.from_dict(data)
        except (ProfileFormatError, ProfileVersionError) as error:
            raise type(error)(f"{name!r}: {error}") from error


def _to_rows(array: npt.NDArray[np.float64]) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in array]


def _from_rows(rows: Any) -> npt.NDArray[np.float64]:
    for row in rows:
        for value in row:
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"{value!r} is not a number")
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def _count(calibration: Mapping[str, Any], name: str) -> int:
    value = calibration[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"'{name}' is not a positive whole number")
    return value
