"""Which sublayers to skip in which phase, and with what compensation."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

from .errors import CompensationError, PlanError, SublayerRangeError
from .model import ModelInfo

__all__ = ["KINDS", "SkipPlan", "SkipSet", "sublayer_name"]

KINDS = ("attention", "FFN")
"""The kinds of sublayer, in the order of the columns of every ``[n_layer, 2]`` array."""


def sublayer_name(layer: int, kind: int) -> str:
    """Name a sublayer for a message: ``attention of layer 3``."""
    return f"{KINDS[kind]} of layer {layer}"


@dataclass(frozen=True, eq=False)
class SkipSet:
    """The sublayers skipped in one phase.

    Attributes:
        skip: bool ``[n_layer, 2]``, columns attention and FFN; read-only.
        scale: float64 ``[n_layer, 2]``, the compensation ``s`` in ``v := s * u`` where skipped, 1.0 elsewhere;
            read-only.

    Raises:
        PlanError: the arrays' shapes are not both ``[n_layer, 2]``.
        CompensationError: a skipped sublayer's compensation is not finite or not positive.
    """

    skip: npt.NDArray[np.bool_]
    scale: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        skip = np.array(self.skip, dtype=np.bool_)
        scale = np.array(self.scale, dtype=np.float64)
        if skip.ndim != 2 or skip.shape[0] < 1 or skip.shape[1] != 2 or scale.shape != skip.shape:
            raise PlanError(
                f"skip flags and compensation need the shape [n_layer, 2], not {skip.shape} and {scale.shape}; "
                "give one row per layer, columns attention and FFN"
            )
        for layer, kind in np.argwhere(skip):
            if not (np.isfinite(scale[layer, kind]) and scale[layer, kind] > 0):
                raise CompensationError(
                    f"the compensation of {sublayer_name(layer, kind)} is {scale[layer, kind]}; "
                    'use a finite number above 0, or compensation="none"'
                )
        scale[~skip] = 1.0
        for name, array in (("skip", skip), ("scale", scale)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @classmethod
    def none(cls, n_layer: int) -> SkipSet:
        """Skip nothing in a model of ``n_layer`` layers."""
        return cls(np.zeros((n_layer, 2), np.bool_), np.ones((n_layer, 2)))

    @property
    def n_layer(self) -> int:
        """Number of layers of the model."""
        return int(self.skip.shape[0])

    @property
    def n_skip(self) -> int:
        """Number of sublayers skipped."""
        return int(self.skip.sum())

    @property
    def attention(self) -> tuple[int, ...]:
        """Layers whose attention is skipped, ascending."""
        return tuple(int(layer) for layer in np.flatnonzero(self.skip[:, 0]))

    @property
    def ffn(self) -> tuple[int, ...]:
        """Layers whose FFN is skipped, ascending."""
        return tuple(int(layer) for layer in np.flatnonzero(self.skip[:, 1]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SkipSet):
            return NotImplemented
        return np.array_equal(self.skip, other.skip) and np.array_equal(self.scale, other.scale)

    def __hash__(self) -> int:
        return hash((self.skip.shape, self.skip.tobytes(), self.scale.tobytes()))

    def __repr__(self) -> str:
        return f"SkipSet(n_layer={self.n_layer}, attention={self.attention}, ffn={self.ffn})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the skipped sublayers of each kind with their compensation."""
        return {
            name: [{"layer": layer, "scale": float(self.scale[layer, kind])} for layer in layers]
            for kind, (name, layers) in enumerate((("attention", self.attention), ("ffn", self.ffn)))
        }

    @classmethod
    def from_dict(cls, n_layer: int, data: Mapping[str, Any]) -> SkipSet:
        """Read what :meth:`to_dict` wrote, for a model of ``n_layer`` layers.

        Raises:
            PlanError: a field is missing or malformed, a layer is out of range, or a compensation is invalid.
        """
        skip, scale = np.zeros((n_layer, 2), np.bool_), np.ones((n_layer, 2))
        for kind, name in enumerate(("attention", "ffn")):
            try:
                rows = [(row["layer"], float(row["scale"])) for row in data[name]]
            except (KeyError, TypeError, ValueError) as error:
                raise PlanError(f"the plan's list {name!r} is missing or malformed; write the plan again") from error
            _mark(skip, kind, [layer for layer, _ in rows])
            for layer, value in rows:
                scale[layer, kind] = value
        return cls(skip, scale)


@dataclass(frozen=True)
class SkipPlan:
    """What to skip in each phase.

    Attributes:
        prefill: the set skipped while a prompt is read.
        decode: the set skipped while tokens are generated. It skips every attention that ``prefill`` skips: that
            attention wrote no KV for the prompt, so decode must not read it.
        model: the model that the plan was made for, or None for a plan made by hand, which fits any model of as many
            layers.
        strategy: name of the strategy that chose the sublayers, ``"manual"`` for a plan made by hand.
        compensation: name of the compensation, ``"manual"`` if given by hand.

    Raises:
        PlanError: the sets disagree on the number of layers, or decode runs an attention that prefill skips.
    """

    prefill: SkipSet
    decode: SkipSet
    model: ModelInfo | None = None
    strategy: str = "manual"
    compensation: str = "manual"

    def __post_init__(self) -> None:
        if self.prefill.n_layer != self.decode.n_layer:
            raise PlanError(
                f"prefill is for {self.prefill.n_layer} layers but decode for {self.decode.n_layer}; "
                "build both for the same model"
            )
        if self.model is not None and self.model.n_layer != self.n_layer:
            raise PlanError(
                f"the plan is for {self.n_layer} layers but its model has {self.model.n_layer}; "
                "build the plan from this model's profile"
            )
        holes = sorted(set(self.prefill.attention) - set(self.decode.attention))
        if holes:
            raise PlanError(
                f"prefill skips the attention of layers {holes}, which decode runs: it would read KV that was never "
                "written; skip them in decode too"
            )

    @classmethod
    def manual(
        cls,
        n_layer: int,
        attention: Iterable[SupportsIndex] = (),
        ffn: Iterable[SupportsIndex] = (),
        scale: npt.ArrayLike | None = None,
        phase: Literal["both", "decode"] = "both",
    ) -> SkipPlan:
        """Build a plan from lists of layers.

        Args:
            n_layer: number of layers of the model.
            attention: layers whose attention is skipped, counted from 0.
            ffn: layers whose FFN is skipped.
            scale: compensation, one number or ``[n_layer, 2]``; 1.0 if None. Only skipped sublayers' values are used.
            phase: ``"both"``, or ``"decode"`` to run the full model in prefill.

        Raises:
            SublayerRangeError: a layer is not in ``range(n_layer)``.
            CompensationError: a compensation is not finite or not positive.
            PlanError: ``n_layer``, ``phase`` or the shape of ``scale`` is wrong.
        """
        if n_layer < 1:
            raise PlanError(f"n_layer is {n_layer}; pass the model's number of layers, llm.n_layer")
        if phase not in ("both", "decode"):
            raise PlanError(f"unknown phase {phase!r}; use 'both' or 'decode'")
        skip = np.zeros((n_layer, 2), np.bool_)
        _mark(skip, 0, attention)
        _mark(skip, 1, ffn)
        try:
            values = np.broadcast_to(np.asarray(1.0 if scale is None else scale, np.float64), skip.shape)
        except ValueError as error:
            raise PlanError(
                f"scale does not have the shape [{n_layer}, 2]; give one row per layer, columns attention and FFN"
            ) from error
        chosen = SkipSet(skip, values)
        compensation = "none" if scale is None else "manual"
        prefill = chosen if phase == "both" else SkipSet.none(n_layer)
        return cls(prefill, chosen, compensation=compensation)

    @property
    def n_layer(self) -> int:
        """Number of layers of the model."""
        return self.prefill.n_layer

    @property
    def attention(self) -> tuple[int, ...]:
        """Layers whose attention is skipped in prefill, ascending."""
        return self.prefill.attention

    @property
    def ffn(self) -> tuple[int, ...]:
        """Layers whose FFN is skipped in prefill, ascending."""
        return self.prefill.ffn

    @property
    def n_skip(self) -> int:
        """Number of sublayers skipped in prefill."""
        return self.prefill.n_skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "strategy": self.strategy,
            "compensation": self.compensation,
            "n_layer": self.n_layer,
            "model": None if self.model is None else self.model.to_dict(),
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SkipPlan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            PlanError: a field is missing or malformed, or the plan is invalid.
        """
        try:
            n_layer = operator.index(data["n_layer"])
            model = None if data["model"] is None else ModelInfo.from_dict(data["model"])
            strategy, compensation = str(data["strategy"]), str(data["compensation"])
            prefill, decode = data["prefill"], data["decode"]
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the plan is malformed ({error}); write it again with SkipPlan.to_dict()") from error
        if n_layer < 1:
            raise PlanError(f"the plan has n_layer {n_layer}; write it again with SkipPlan.to_dict()")
        return cls(
            SkipSet.from_dict(n_layer, prefill),
            SkipSet.from_dict(n_layer, decode),
            model,
            strategy,
            compensation,
        )


def _mark(skip: npt.NDArray[np.bool_], kind: int, layers: Iterable[SupportsIndex]) -> None:
    """Set the flags of ``layers`` in one column; refuse what is not a layer of the model."""
    n_layer = skip.shape[0]
    for layer in layers:
        try:
            index = operator.index(layer)
        except TypeError as error:
            raise SublayerRangeError(
                f"{layer!r} is not a layer number; use whole numbers from 0 to {n_layer - 1}"
            ) from error
        if not 0 <= index < n_layer:
            raise SublayerRangeError(
                f"the model has no {sublayer_name(index, kind)}; use layers from 0 to {n_layer - 1}"
            )
        skip[index, kind] = True
