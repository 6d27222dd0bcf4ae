"""Plan files: JSON for what people read, and the vectors of the skipped sublayers in one binary file beside it.

``X.json`` says what is skipped, for which model, and for a plan that `adaskip-cpp tune` found what was promised and
measured. ``X.bin`` (see :mod:`adaskip_cpp.model.stored`) holds for each of the JSON's ``sets`` in turn, for each of its
``arrays`` as listed, one part of that shape per attention and then per FFN, as listed.
"""

import math
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import PlanFileError
from . import stored
from .identity import ModelInfo, check_model, plan_path
from .plan import Mode, OnlineStage, SkipPlan
from .promise import Tuning
from .skip_set import SkipSet, marked

FORMAT_VERSION = 1
_FORMAT = "adaskip-plan"

_MOST_MEMORY = 4 << 30
"""More bytes than any plan's arrays take once they have a row for every sublayer."""

_Layers = Annotated[int, msgspec.Meta(ge=1, le=9999)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


@dataclass(frozen=True)
class PlanFile:
    """What a plan file holds: a plan, and how `adaskip-cpp tune` found it, None for one from elsewhere."""

    plan: SkipPlan
    tuning: Tuning | None = None


@dataclass(frozen=True)
class _Set:
    """A skip set in the JSON; ``scale`` is of the attentions, then of the FFNs, ``arrays`` the shapes per sublayer."""

    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    scale: tuple[float, ...]
    arrays: dict[Literal["bias", "down", "up"], tuple[_Size, ...]]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(len(self.attention) + len(self.ffn), *shape) for shape in self.arrays.values()]

    def skip_set(self, n_layer: int, arrays: stored.Arrays) -> SkipSet:
        skip, scale = marked(n_layer, self.attention, self.ffn), np.ones((n_layer, 2))
        kinds, layers = np.nonzero(skip.T)
        if layers.tolist() != [*self.attention, *self.ffn] or len(self.scale) != len(layers):
            raise ValueError("it does not list each sublayer once, in ascending order, with a scale")
        if self.arrays and not layers.size:
            raise ValueError("a set has arrays of no sublayer")
        scale[layers, kinds] = self.scale
        parts = {name: np.zeros((n_layer, 2, *shape), np.float32) for name, shape in self.arrays.items()}
        for part, values in zip(parts.values(), arrays, strict=True):
            part[layers, kinds] = values
        return SkipSet(skip, scale, **parts)


@dataclass(frozen=True)
class _File:
    """The JSON. Phases and the schedule refer to ``sets`` by number, from 0 on; ``vectors`` is the file beside it."""

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
    vectors: stored.VectorsFile | None
    tuning: Tuning | None


def save_plan(path: str | os.PathLike[str], plan: SkipPlan, tuning: Tuning | None = None) -> None:
    """Write a plan as JSON, its vectors to a file ``.bin`` beside it.

    Raises:
        OSError: a file cannot be written; what was there before is still there.
    """
    sets = list(dict.fromkeys((plan.prefill, *(each for _, each in plan.decode_sets))))
    arrays: list[npt.NDArray[np.float32]] = []
    entries = []
    for each in sets:
        parts = {name: getattr(each, name) for name in ("bias", "down", "up") if each.n_skip}
        rows = {name: part.swapaxes(0, 1)[each.skip.T] for name, part in parts.items() if part is not None}
        arrays += rows.values()
        shapes: Any = {name: array.shape[1:] for name, array in rows.items()}
        entries.append(_Set(each.attention, each.ffn, tuple(each.scale.T[each.skip.T].tolist()), shapes))
    data = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        **vars(plan),
        "n_layer": plan.n_layer,
        "prefill": sets.index(plan.prefill),
        "decode": sets.index(plan.decode),
        "schedule": [(start, sets.index(each)) for start, each in plan.schedule],
        "sets": entries,
        "vectors": None,
        "tuning": tuning,
    }
    stored.save(path, data, arrays)


def load_plan(path: str | os.PathLike[str], *, model: str | os.PathLike[str] | None = None) -> PlanFile:
    """Read a plan file, of a model where one is named.

    Raises:
        PlanFileError: a file is missing, truncated, malformed, of another format or version, or the two do not belong
            together.
        ProfileMismatchError: it is of another model.
        OSError: a file cannot be read.
    """
    name = os.fspath(path)
    way_out = "`adaskip-cpp tune` or `adaskip-cpp plan -o`"
    try:
        file = msgspec.convert(_nan_for_null(stored.load(name, _FORMAT, "plan file", FORMAT_VERSION)), _File)
        plan = _plan(file, name)
    except FileNotFoundError:
        raise PlanFileError(f"there is no plan file {name!r}; write one with {way_out}") from None
    except ValueError as error:  # among them all of msgspec's and our own
        raise PlanFileError(f"{name!r} cannot be used: {error}; write it again with {way_out}") from error
    if model is not None and plan.model is not None:
        check_model(plan.model, model, name)
    return PlanFile(plan, file.tuning)


def is_plan_file(path: str | os.PathLike[str]) -> bool:
    try:
        with open(path, "rb") as file:
            return f'"format": "{_FORMAT}"'.encode() in file.read(256)
    except OSError:
        return False


def plan_beside(model: str | os.PathLike[str]) -> PlanFile:
    name = plan_path(model)
    if not os.path.exists(name):
        raise PlanFileError(f"there is no plan {name!r} beside the model; run `adaskip-cpp tune {os.fspath(model)}`")
    return load_plan(name, model=model)


def _plan(file: _File, path: str) -> SkipPlan:
    shapes = [shape for each in file.sets for shape in each.shapes]
    if 8 * file.n_layer * sum(math.prod(shape) for each in file.sets for shape in each.arrays.values()) > _MOST_MEMORY:
        raise ValueError("it is of a larger model than any")
    if shapes and file.vectors is None:
        raise ValueError("it names no file of its vectors")
    arrays = iter(() if file.vectors is None else file.vectors.read(path, shapes))
    sets = [each.skip_set(file.n_layer, [next(arrays) for _ in each.arrays]) for each in file.sets]
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


def _nan_for_null(data: Any) -> Any:
    """JSON has no NaN: the ends of an interval that one measurement has not are null there."""
    if isinstance(data, dict):
        ends = ("low", "high")
        return {
            name: math.nan if value is None and name in ends else _nan_for_null(value) for name, value in data.items()
        }
    return [_nan_for_null(value) for value in data] if isinstance(data, list) else data
