"""Plan files: JSON for what people read, and the vectors of the skipped sublayers in one binary file beside it.

``X.json`` says what is skipped, for which model, and for a plan that `adaskip-cpp tune` found what was promised and
measured. ``X.bin`` (see :mod:`adaskip_cpp.model.stored`) holds the biases of the JSON's ``sets``, one vector per
attention and then per FFN, as listed, and then of each set ``down`` and ``up`` of those that a map stands in for.
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
from .mode import ModeName
from .plan import Bulk, OnlineStage, SkipPlan
from .promise import Tuning
from .skip_set import SkipSet, marked

FORMAT_VERSION = 4
_FORMAT = "adaskip-plan"
_MAPS = ("down", "up")

_Layers = Annotated[int, msgspec.Meta(ge=1, le=9999)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


@dataclass(frozen=True)
class PlanFile:
    """What a plan file holds: a plan, and how `adaskip-cpp tune` found it, None for one from elsewhere."""

    plan: SkipPlan
    tuning: Tuning | None = None


@dataclass(frozen=True)
class _Set:
    """A skip set in the JSON; ``scale`` is of the attentions, then of the FFNs, ``arrays`` the shapes per sublayer.

    ``mapped`` says which of them, counted from 0 in that order, have a map.
    """

    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    scale: tuple[float, ...]
    arrays: dict[Literal["bias", "down", "up"], tuple[_Size, ...]]
    mapped: tuple[int, ...]

    @classmethod
    def of(cls, skip_set: SkipSet) -> "tuple[_Set, dict[str, npt.NDArray[np.float32]]]":
        """Return the set, and its arrays with a row per sublayer that has one."""
        listed, mapped = skip_set.skip.T, skip_set.mapped.T
        parts = {"bias": (skip_set.bias, listed), "down": (skip_set.down, mapped), "up": (skip_set.up, mapped)}
        rows = {name: part.swapaxes(0, 1)[which] for name, (part, which) in parts.items() if part is not None}
        shapes: Any = {name: array.shape[1:] for name, array in rows.items()}
        scale, has_map = skip_set.scale.T[listed].tolist(), np.flatnonzero(mapped[listed]).tolist()
        return cls(skip_set.attention, skip_set.ffn, tuple(scale), shapes, tuple(has_map)), rows

    def shapes(self, *names: str) -> list[tuple[int, ...]]:
        n = len(self.attention) + len(self.ffn)
        n_rows = {"bias": n, "down": len(self.mapped), "up": len(self.mapped)}
        return [(n_rows[name], *shape) for name, shape in sorted(self.arrays.items()) if name in names]

    def skip_set(self, n_layer: int, arrays: stored.Arrays) -> SkipSet:
        """Return the set; its arrays come as those of :meth:`shapes`."""
        skip, scale = marked(n_layer, self.attention, self.ffn), np.ones((n_layer, 2))
        kinds, layers = np.nonzero(skip.T)
        if layers.tolist() != [*self.attention, *self.ffn] or len(self.scale) != len(layers):
            raise ValueError("it does not list each sublayer once, in ascending order, with a scale")
        if self.arrays and not layers.size:
            raise ValueError("a set has arrays of no sublayer")
        has_maps = not self.arrays.keys().isdisjoint(_MAPS)
        if has_maps != bool(self.mapped) or [*self.mapped] != sorted({*self.mapped} & {*range(len(layers))}):
            raise ValueError("it does not say which sublayers have a map")
        scale[layers, kinds] = self.scale
        parts = {}
        for (name, shape), values in zip(sorted(self.arrays.items()), arrays, strict=True):
            rows = list(self.mapped) if name in _MAPS else slice(None)
            parts[name] = np.zeros((n_layer, 2, *shape), np.float32)
            parts[name][layers[rows], kinds[rows]] = values
        return SkipSet(skip, scale, **parts)


@dataclass(frozen=True)
class _Bulk:
    """A :class:`adaskip_cpp.model.plan.Bulk` in the JSON, its set by number."""

    set: int
    head: int
    tail: int
    windowed: tuple[int, ...]
    window_size: int


@dataclass(frozen=True)
class _File:
    """The JSON. Phases and the schedule refer to ``sets`` by number, from 0 on; ``vectors`` is the file beside it."""

    model: ModelInfo | None
    n_layer: _Layers
    strategy: str
    compensation: str
    mode: ModeName | Literal["manual"]
    bulk: _Bulk | None
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
    sets = list(dict.fromkeys(plan.sets))
    entries, parts = zip(*map(_Set.of, sets), strict=True)
    data = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        **vars(plan),
        "n_layer": plan.n_layer,
        "bulk": plan.bulk and plan.bulk.to_dict(sets.index(plan.bulk.skip)),
        "prefill": sets.index(plan.prefill),
        "decode": sets.index(plan.decode),
        "schedule": [(start, sets.index(each)) for start, each in plan.schedule],
        "sets": entries,
        "vectors": None,
        "tuning": tuning,
    }
    arrays = [[part[name] for part in parts for name in names if name in part] for names in (("bias",), _MAPS)]
    stored.save(path, data, *arrays)


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
    except (ValueError, RecursionError) as error:  # among them all of msgspec's and our own
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
    shapes, maps = ([shape for each in file.sets for shape in each.shapes(*names)] for names in (("bias",), _MAPS))
    if (
        8 * file.n_layer * sum(math.prod(shape) for each in file.sets for shape in each.arrays.values())
        > stored.MOST_MEMORY
    ):
        raise ValueError("it is of a larger model than any")
    if (shapes or maps) and file.vectors is None:
        raise ValueError("it names no file of its vectors")
    found = [] if file.vectors is None else file.vectors.read(path, shapes, maps)
    biases, halves = iter(found[: len(shapes)]), iter(found[len(shapes) :])
    sets = [
        each.skip_set(file.n_layer, [next(halves if name in _MAPS else biases) for name in sorted(each.arrays)])
        for each in file.sets
    ]
    around = {"set": 0} if file.bulk is None else dict(vars(file.bulk))
    in_bulk = around.pop("set")
    if not all(0 <= at < len(sets) for at in (file.prefill, file.decode, *(at for _, at in file.schedule), in_bulk)):
        raise ValueError(f"it refers to a set that is not among its {len(sets)}")
    return SkipPlan(
        sets[file.prefill],
        sets[file.decode],
        schedule=tuple((start, sets[index]) for start, index in file.schedule),
        online=file.online,
        bulk=None if file.bulk is None else Bulk(sets[in_bulk], **around),
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
