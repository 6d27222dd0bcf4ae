"""Plan files: a plan, or the frontier that `adaskip-cpp tune` found, in JSON, and their vectors in a file beside it.

``X.json`` says what is skipped, for which model, and for a frontier what was measured. ``X.bin`` (see
:mod:`adaskip_cpp.model.stored`) holds the biases of the JSON's ``sets``, one vector per attention and then per FFN, as
listed, and then of each set ``down`` and ``up`` of those that a map stands in for.
"""

import contextlib
import math
import os
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import PlanError, PlanFileError
from . import stored
from .frontier import DEFAULT_LOSS, Figures, Frontier, Point
from .identity import ModelInfo, check_model, plan_path
from .mode import ModeName
from .plan import Bulk, OnlineStage, SkipPlan
from .skip_set import SkipSet, marked

FORMAT_VERSION = 5
_FORMAT = "adaskip-plan"
_MAPS = ("down", "up")

_Layers = Annotated[int, msgspec.Meta(ge=1, le=9999)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


@dataclass(frozen=True)
class PlanFile:
    """What a plan file holds: one plan, or a frontier to choose from; the other is None."""

    plan: SkipPlan | None = None
    frontier: Frontier | None = None

    def plan_for(self, n_tokens: int, max_loss: float = DEFAULT_LOSS) -> SkipPlan | None:
        """Return the plan, or the one that the frontier chooses for a prompt; None for the whole model."""
        return self.plan if self.frontier is None else self.frontier.choose(n_tokens, max_loss)

    @property
    def plans(self) -> tuple[SkipPlan, ...]:
        """All plans in it."""
        if self.frontier is not None:
            return tuple(point.plan for point in self.frontier.points)
        return () if self.plan is None else (self.plan,)


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
class _Plan:
    """A plan in the JSON; its phases and schedule refer to the file's ``sets`` by number, from 0 on."""

    strategy: str
    compensation: str
    mode: ModeName | Literal["manual"]
    bulk: _Bulk | None
    prefill: int
    decode: int
    schedule: tuple[tuple[int, int], ...]
    online: OnlineStage | None

    def plan(self, sets: list[SkipSet], model: ModelInfo | None) -> SkipPlan:
        around = {"set": 0} if self.bulk is None else dict(vars(self.bulk))
        in_bulk = around.pop("set")
        used = (self.prefill, self.decode, *(at for _, at in self.schedule), in_bulk)
        if not all(0 <= at < len(sets) for at in used):
            raise ValueError(f"it refers to a set that is not among its {len(sets)}")
        return SkipPlan(
            sets[self.prefill],
            sets[self.decode],
            schedule=tuple((start, sets[index]) for start, index in self.schedule),
            online=self.online,
            bulk=None if self.bulk is None else Bulk(sets[in_bulk], **around),
            model=model,
            strategy=self.strategy,
            compensation=self.compensation,
            mode=self.mode,
        )


@dataclass(frozen=True)
class _File:
    """The JSON. ``frontier`` is a :class:`Frontier` whose points lack their plans, which are those of ``plans``."""

    model: ModelInfo | None
    n_layer: _Layers
    plans: Annotated[tuple[_Plan, ...], msgspec.Meta(max_length=64)]
    sets: tuple[_Set, ...]
    vectors: stored.VectorsFile | None
    frontier: dict[str, Any] | None


def save_plan(path: str | os.PathLike[str], plan: SkipPlan | Frontier, *, model: ModelInfo | None = None) -> None:
    """Write a plan or a frontier as JSON, its vectors to a file ``.bin`` beside it.

    Args:
        model: of a frontier without any plan, the model that it is of.

    Raises:
        PlanError: the plans of a frontier are of several models.
        OSError: a file cannot be written; what was there before is still there.
    """
    plans = PlanFile(frontier=plan).plans if isinstance(plan, Frontier) else (plan,)
    if len({(each.model, each.n_layer) for each in plans}) > 1:
        raise PlanError("the plans of a frontier are of several models; tune again")
    model = plans[0].model if plans else model
    n_layer = plans[0].n_layer if plans else model.n_layer if model else 1
    sets = list(dict.fromkeys(each for of in plans for each in of.sets))
    entries, parts = zip(*map(_Set.of, sets), strict=True) if sets else ((), ())

    def entry(each: SkipPlan) -> dict[str, Any]:
        return {
            **{name: getattr(each, name) for name in ("strategy", "compensation", "mode", "online")},
            "bulk": each.bulk and each.bulk.to_dict(sets.index(each.bulk.skip)),
            "prefill": sets.index(each.prefill),
            "decode": sets.index(each.decode),
            "schedule": [(start, sets.index(step)) for start, step in each.schedule],
        }

    data = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        "model": model,
        "n_layer": n_layer,
        "plans": [entry(each) for each in plans],
        "sets": entries,
        "vectors": None,
        "frontier": frontier_dict(plan) if isinstance(plan, Frontier) else None,
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
        file = _read(name)
        found = _found(file, name)
    except FileNotFoundError:
        raise PlanFileError(f"there is no plan file {name!r}; write one with {way_out}") from None
    except (ValueError, RecursionError) as error:  # among them all of msgspec's and our own
        raise PlanFileError(f"{name!r} cannot be used: {error}; write it again with {way_out}") from error
    if model is not None and file.model is not None:
        check_model(file.model, model, name)
    return found


def is_plan_file(path: str | os.PathLike[str]) -> bool:
    try:
        with open(path, "rb") as file:
            return f'"format": "{_FORMAT}"'.encode() in file.read(256)
    except OSError:
        return False


def frontier_beside(model: str | os.PathLike[str]) -> Frontier | None:
    """Return the frontier beside a model without its points, and without reading their vectors; None if there is none.

    A file that cannot be used counts as none: :func:`plan_beside` tells why.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        file = _read(plan_path(model))
        return None if file.frontier is None else _frontier(file, file.frontier)[0]
    return None


def plan_beside(model: str | os.PathLike[str]) -> PlanFile:
    name = plan_path(model)
    if not os.path.exists(name):
        raise PlanFileError(f"there is no plan {name!r} beside the model; run `adaskip-cpp tune {os.fspath(model)}`")
    return load_plan(name, model=model)


def _read(path: str) -> _File:
    return msgspec.convert(stored.numbers_for_nulls(stored.load(path, _FORMAT, "plan file", FORMAT_VERSION)), _File)


def _frontier(file: _File, data: dict[str, Any]) -> tuple[Frontier, list[Figures]]:
    """Return the frontier without points, and the figures of a point for each plan."""
    points = data.get("points")
    if not isinstance(points, list) or len(points) != len(file.plans):
        raise ValueError("its frontier does not have a point for each of its plans")
    return msgspec.convert({**data, "points": ()}, Frontier), msgspec.convert(points, list[Figures])


def _found(file: _File, path: str) -> PlanFile:
    shapes, maps = ([shape for each in file.sets for shape in each.shapes(*names)] for names in (("bias",), _MAPS))
    n_values = sum(math.prod(shape) for each in file.sets for shape in each.arrays.values())
    if 8 * file.n_layer * n_values > stored.MOST_MEMORY:
        raise ValueError("it is of a larger model than any")
    if (shapes or maps) and file.vectors is None:
        raise ValueError("it names no file of its vectors")
    found = [] if file.vectors is None else file.vectors.read(path, shapes, maps)
    biases, halves = iter(found[: len(shapes)]), iter(found[len(shapes) :])
    sets = [
        each.skip_set(file.n_layer, [next(halves if name in _MAPS else biases) for name in sorted(each.arrays)])
        for each in file.sets
    ]
    plans = [each.plan(sets, file.model) for each in file.plans]
    if file.frontier is None:
        if len(plans) != 1:
            raise ValueError(f"it has {len(plans)} plans and no frontier")
        return PlanFile(plans[0])
    frontier, figures = _frontier(file, file.frontier)
    of_plans = (Point(**vars(each), plan=plan) for plan, each in zip(plans, figures, strict=True))
    return PlanFile(frontier=replace(frontier, points=tuple(of_plans)))


def frontier_dict(frontier: Frontier) -> dict[str, Any]:
    """Return the figures of a frontier, without its plans."""
    points = [{name: value for name, value in vars(each).items() if name != "plan"} for each in frontier.points]
    return {field.name: getattr(frontier, field.name) for field in fields(frontier)} | {"points": points}
