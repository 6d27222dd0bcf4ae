"""Plan files: JSON for what people read, and the vectors of the skipped sublayers in one binary file beside it.

``X.json`` says what is skipped, for which model, and for a plan that `adaskip-cpp tune` found what was promised and
measured. ``X.bin`` is nothing but numbers, float32 of little endian: for each of the JSON's ``sets`` in turn, for each
of its ``arrays`` as listed, one part of that shape per attention and then per FFN, as listed. Its SHA-256 is in the
JSON. Move or copy the two together; a plan without vectors is JSON alone.
"""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from ..errors import PlanFileError
from ..files import json_text, write_atomically, write_pair
from .beside import check_model, plan_path
from .identity import ModelInfo
from .plan import Mode, OnlineStage, SkipPlan
from .promise import Tuning
from .skip_set import SkipSet, mark_layers
from .stored import VectorsFile, file_beside, read_json

__all__ = ["PlanFile", "is_plan_file", "load_plan", "plan_beside", "save_plan"]

FORMAT_VERSION = 1
_FORMAT = "adaskip-plan"
_AGAIN = "write it again with `adaskip-cpp tune` or `adaskip-cpp plan -o`"

_MOST_MEMORY = 4 << 30
"""More bytes than any plan's arrays take once they have a row for every sublayer."""

_Layers = Annotated[int, msgspec.Meta(ge=1, le=9999)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


@dataclass(frozen=True)
class PlanFile:
    """What a plan file holds.

    Attributes:
        plan: the plan.
        tuning: how `adaskip-cpp tune` found it; None for a plan from elsewhere.
    """

    plan: SkipPlan
    tuning: Tuning | None = None


@dataclass(frozen=True)
class _Set:
    """A skip set in the JSON; ``scale`` is of the attentions, then of the FFNs, ``arrays`` the shapes per sublayer."""

    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    scale: tuple[float, ...]
    arrays: dict[Literal["bias", "down", "up"], tuple[_Size, ...]]

    @classmethod
    def of(cls, value: SkipSet) -> _Set:
        arrays = {name: getattr(value, name) for name in ("bias", "down", "up")}
        shapes = {name: array.shape[2:] for name, array in arrays.items() if array is not None and value.n_skip}
        return cls(value.attention, value.ffn, value.scale.T[value.skip.T].tolist(), shapes)  # type: ignore[arg-type]

    def n_values(self, n_sublayers: int) -> int:
        """Numbers in the arrays of so many sublayers."""
        return n_sublayers * sum(map(math.prod, self.arrays.values()))


@dataclass(frozen=True)
class _File:
    """The JSON. Phases and the schedule refer to ``sets`` by number, from 0 on; ``vectors`` is the file beside it."""

    format: str
    version: int
    model: ModelInfo | None
    n_layer: _Layers
    strategy: str
    compensation: str
    mode: Mode | Literal["manual"]
    prefill: int
    decode: int
    schedule: tuple[tuple[int, int], ...]
    online: OnlineStage | None
    sets: tuple[_Set, ...]
    vectors: VectorsFile | None
    tuning: Tuning | None


def save_plan(path: str | os.PathLike[str], plan: SkipPlan, tuning: Tuning | None = None) -> None:
    """Write a plan as JSON, its vectors to a file ``.bin`` beside it.

    Raises:
        OSError: a file cannot be written; what was there before is still there.
    """
    sets: list[SkipSet] = []
    for each in (plan.prefill, *(each for _, each in plan.decode_sets)):
        if each not in sets:
            sets.append(each)
    parts = [
        getattr(each, name).swapaxes(0, 1)[each.skip.T].astype("<f4").tobytes()
        for each in sets
        for name in _Set.of(each).arrays
    ]
    target = os.path.realpath(path)
    binary, content = file_beside(target, ".bin"), b"".join(parts)
    data = _File(
        _FORMAT,
        FORMAT_VERSION,
        plan.model,
        plan.n_layer,
        plan.strategy,
        plan.compensation,
        plan.mode,
        sets.index(plan.prefill),
        sets.index(plan.decode),
        tuple((start, sets.index(each)) for start, each in plan.schedule),
        plan.online,
        tuple(map(_Set.of, sets)),
        VectorsFile.of(binary, content) if content else None,
        tuning,
    )
    if content:
        write_pair(target, json_text(data), binary, content)
    else:
        write_atomically(target, json_text(data))


def load_plan(path: str | os.PathLike[str], *, model: str | os.PathLike[str] | None = None) -> PlanFile:
    """Read a plan file, of a model where one is named.

    Raises:
        PlanFileError: a file is missing, truncated, malformed, of another format or version, or the two do not belong
            together.
        ProfileMismatchError: it is of another model.
        OSError: a file cannot be read.
    """
    name = os.fspath(path)
    try:
        data = read_json(name)
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError("this is no plan file")
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(f"it has format version {data.get('version')!r}, this release reads {FORMAT_VERSION}")
        file = msgspec.convert(_nan_for_null(data), _File)
        plan = _plan(file, os.path.dirname(os.path.realpath(name)))
    except FileNotFoundError:
        raise PlanFileError(
            f"there is no plan file {name!r}; write one with `adaskip-cpp tune` or `adaskip-cpp plan -o`"
        ) from None
    except ValueError as error:  # among them all of msgspec's and our own
        raise PlanFileError(f"{name!r} cannot be used: {error}; {_AGAIN}") from error
    if model is not None and plan.model is not None:
        check_model(plan.model, model, name)
    return PlanFile(plan, file.tuning)


def is_plan_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as plan files do; False for one that is not there."""
    try:
        with open(path, "rb") as file:
            return f'"format": "{_FORMAT}"'.encode() in file.read(256)
    except OSError:
        return False


def plan_beside(model: str | os.PathLike[str]) -> PlanFile:
    """Read the plan file beside a model.

    Raises:
        PlanFileError: it is missing or cannot be used.
        ProfileMismatchError: it is of another model.
    """
    name = plan_path(model)
    if not os.path.exists(name):
        raise PlanFileError(f"there is no plan {name!r} beside the model; run `adaskip-cpp tune {os.fspath(model)}`")
    return load_plan(name, model=model)


def _plan(file: _File, folder: str) -> SkipPlan:
    values = _values(file, folder)
    sets = [_skip_set(each, file.n_layer, values) for each in file.sets]
    if not all(0 <= index < len(sets) for index in (file.prefill, file.decode, *(index for _, index in file.schedule))):
        raise ValueError(f"it refers to a set that is not among its {len(sets)}")
    return SkipPlan(
        sets[file.prefill],
        sets[file.decode],
        schedule=tuple((start, sets[index]) for start, index in file.schedule),
        online=file.online,
        model=file.model,
        strategy=file.strategy,
        compensation=file.compensation,
        mode=file.mode,
    )


def _values(file: _File, folder: str) -> io.BytesIO:
    """Read the binary file; nothing but what the JSON names, counts and hashes is accepted."""
    n_bytes = 4 * sum(each.n_values(len(each.attention) + len(each.ffn)) for each in file.sets)
    if 4 * sum(each.n_values(2 * file.n_layer) for each in file.sets) > _MOST_MEMORY:
        raise ValueError("it is of a larger model than any")
    if file.vectors is None:
        if n_bytes:
            raise ValueError("it names no file of its vectors")
        return io.BytesIO()
    content = file.vectors.read(folder, n_bytes)
    if len(content) != n_bytes:
        raise ValueError(f"the file of its vectors, {file.vectors.file!r}, is of another plan")
    return io.BytesIO(content)


def _skip_set(stored: _Set, n_layer: int, values: io.BytesIO) -> SkipSet:
    """Return a set, whose numbers come next in ``values``."""
    skip, scale = np.zeros((n_layer, 2), np.bool_), np.ones((n_layer, 2))
    mark_layers(skip, 0, stored.attention)
    mark_layers(skip, 1, stored.ffn)
    rows = (*stored.attention, *stored.ffn), (0,) * len(stored.attention) + (1,) * len(stored.ffn)
    n = len(rows[0])
    if skip.sum() != n or len(stored.scale) != n:
        raise ValueError(f"{skip.sum()} sublayers are listed {n} times, with {len(stored.scale)} scales")
    if stored.arrays and not n:
        raise ValueError("a set has arrays of no sublayer")
    scale[rows] = stored.scale
    arrays = {}
    for name, shape in stored.arrays.items():
        arrays[name] = np.zeros((n_layer, 2, *shape), np.float32)
        arrays[name][rows] = np.frombuffer(values.read(4 * n * math.prod(shape)), "<f4").reshape(n, *shape)
    return SkipSet(skip, scale, **arrays)


def _nan_for_null(data: Any) -> Any:
    """JSON has no NaN: the ends of an interval that one measurement has not are null there."""
    if isinstance(data, dict):
        ends = ("low", "high")
        return {
            name: math.nan if value is None and name in ends else _nan_for_null(value) for name, value in data.items()
        }
    return [_nan_for_null(value) for value in data] if isinstance(data, list) else data
