"""A tuned plan: what `adaskip-cpp tune` found for one model, what it promised and what it measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from ..errors import NotSkippableError, PlanError, ProfileFormatError
from ..intervals import Interval
from ..planning.compensation import DEFAULT_COMPENSATION
from ..planning.modes import compensated_plan
from ..planning.request import PlanRequest
from .plan import Mode, SkipPlan, mark_layers, sublayer_name

if TYPE_CHECKING:
    from ..planning.profile import Profile

__all__ = ["Promise", "PromiseKind", "SpeedUp", "TunedPlan"]

PromiseKind: TypeAlias = Literal["max_loss", "min_agreement", "speedup"]
Setting: TypeAlias = "str | int | float | None"

_WAYS_OUT = "run `adaskip-cpp tune` again"


@dataclass(frozen=True)
class Promise:
    """What a plan was asked to keep.

    Attributes:
        kind: ``"max_loss"``: at most ``value`` nats per token more than the full model loses. ``"min_agreement"``: at
            least this share of the tokens is predicted as the full model predicts it. ``"speedup"``: a request is
            answered at least ``value`` times as fast.
        value: 0 or more; from 0 to 1; 1 or more.

    Raises:
        PlanError: the kind is unknown or the value impossible.
    """

    kind: PromiseKind
    value: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(PromiseKind):
            raise PlanError(f"unknown promise {self.kind!r}; use one of: {', '.join(get_args(PromiseKind))}")
        low, high = {"max_loss": (0, math.inf), "min_agreement": (0, 1), "speedup": (1, math.inf)}[self.kind]
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not (number and math.isfinite(self.value) and low <= self.value <= high):
            top = f"to {high}" if math.isfinite(high) else "on"
            raise PlanError(f"cannot promise {self.kind} {self.value!r}; use a number from {low} {top}")

    def __str__(self) -> str:
        if self.kind == "max_loss":
            return f"an added loss of at most {self.value:g} nats per token"
        if self.kind == "min_agreement":
            return f"the full model's choice for at least {100 * self.value:g}% of the tokens"
        return f"requests answered at least {self.value:g} times as fast"


@dataclass(frozen=True)
class SpeedUp:
    """How many times as fast as the full model a plan was measured to be.

    Attributes:
        of: ``"first token"``, ``"decode"`` (a token after it) or ``"request"``, both together.
        context: tokens of the prompt.
        n_decode: tokens of the answer behind the first one.
        ratio: full model's time over the plan's, pair by pair.
    """

    of: Literal["first token", "decode", "request"]
    context: int
    n_decode: int
    ratio: Interval


@dataclass(frozen=True)
class TunedPlan:
    """The plan of a profile that generation uses where no other is asked for.

    Attributes:
        attention: layers whose attention is skipped, ascending.
        ffn: layers whose FFN is skipped, ascending. Both () for a model that is left whole.
        promise: what was asked.
        loss: nats per token that the plan adds, mean over the texts, on text that the search did not see.
        agreement: share of tokens for which it finds the same token most likely as the full model, likewise.
        n_texts, n_tokens: how much text that is.
        speedups: measured, full model and plan in turn.
        compensation: name of the compensation.
        mode: ``"prefill"``, ``"decode"`` or ``"e2e"``.
        online: whether each answer adds FFNs, which the promise does not cover.
        settings: how it was found, for people to read.

    Raises:
        ProfileFormatError: a value is impossible.
    """

    attention: tuple[int, ...]
    ffn: tuple[int, ...]
    promise: Promise
    loss: Interval
    agreement: Interval
    n_texts: int
    n_tokens: int
    speedups: tuple[SpeedUp, ...] = ()
    compensation: str = DEFAULT_COMPENSATION
    mode: Mode = "e2e"
    online: bool = False
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("attention", "ffn"):
            layers = tuple(getattr(self, name))
            if any(type(layer) is not int or layer < 0 for layer in layers) or list(layers) != sorted(set(layers)):
                raise ProfileFormatError(f"the tuned plan's {name} {layers} are not ascending layers; {_WAYS_OUT}")
            object.__setattr__(self, name, layers)
        try:
            PlanRequest(mode=self.mode, compensation=self.compensation)
        except PlanError as error:
            raise ProfileFormatError(f"the tuned plan cannot be used: {error}") from error
        object.__setattr__(self, "speedups", tuple(self.speedups))
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    __hash__ = None  # type: ignore[assignment]

    @property
    def n_skip(self) -> int:
        """Number of sublayers skipped; 0 leaves the model whole."""
        return len(self.attention) + len(self.ffn)

    def plan(self, profile: Profile) -> SkipPlan:
        """Make the plan from the statistics of its profile.

        Raises:
            PlanError: the profile is of fewer layers, lacks what the compensation needs, or never observed a sublayer
                that is to be skipped.
        """
        skip = np.zeros((profile.n_layer, 2), np.bool_)
        mark_layers(skip, 0, self.attention)
        mark_layers(skip, 1, self.ffn)
        names = [sublayer_name(layer, kind) for layer, kind in np.argwhere(skip & ~profile.skippable)]
        if names:
            raise NotSkippableError(f"this model cannot skip {', '.join(names)}; {_WAYS_OUT}")
        request = PlanRequest(mode=self.mode, compensation=self.compensation, online=self.online)
        return compensated_plan(profile, skip, request, "tuned")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "attention": list(self.attention),
            "ffn": list(self.ffn),
            "compensation": self.compensation,
            "mode": self.mode,
            "online": self.online,
            "promise": {"kind": self.promise.kind, "value": self.promise.value},
            "measured": {
                "loss": self.loss.to_dict(),
                "agreement": self.agreement.to_dict(),
                "n_texts": self.n_texts,
                "n_tokens": self.n_tokens,
            },
            "speedups": [
                {"of": each.of, "context": each.context, "n_decode": each.n_decode, "ratio": each.ratio.to_dict()}
                for each in self.speedups
            ],
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, data: Any) -> TunedPlan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ProfileFormatError: a field is missing or malformed.
        """
        try:
            measured, promise = data["measured"], data["promise"]
            return cls(
                attention=tuple(_list(data["attention"])),
                ffn=tuple(_list(data["ffn"])),
                promise=Promise(promise["kind"], promise["value"]),
                loss=_interval(measured["loss"]),
                agreement=_interval(measured["agreement"]),
                n_texts=_count(measured["n_texts"]),
                n_tokens=_count(measured["n_tokens"]),
                speedups=tuple(_speedup(each) for each in _list(data["speedups"])),
                compensation=data["compensation"],
                mode=data["mode"],
                online=_of(data["online"], bool),
                settings={str(name): _setting(value) for name, value in data["settings"].items()},
            )
        except ProfileFormatError:
            raise
        except KeyError as error:
            raise ProfileFormatError(f"the tuned plan lacks {error}; {_WAYS_OUT}") from error
        except (AttributeError, PlanError, TypeError, ValueError, OverflowError) as error:
            raise ProfileFormatError(f"the tuned plan is malformed ({error}); {_WAYS_OUT}") from error


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is not of the type {kind.__name__}")
    return value


def _list(value: Any) -> Sequence[Any]:
    return _of(value, list)  # type: ignore[no-any-return]


def _count(value: Any) -> int:
    if _of(value, int) < 0:
        raise ValueError(f"{value!r} is not a count")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _interval(data: Any) -> Interval:
    low, high = (math.nan if data[name] is None else _number(data[name]) for name in ("low", "high"))
    return Interval(_number(data["value"]), low, high, _count(data["n"]))


def _speedup(data: Any) -> SpeedUp:
    if data["of"] not in ("first token", "decode", "request"):
        raise ValueError(f"there is no speed-up of {data['of']!r}")
    return SpeedUp(data["of"], _count(data["context"]), _count(data["n_decode"]), _interval(data["ratio"]))


def _setting(value: Any) -> Setting:
    if value is None or type(value) in (str, int):
        return value  # type: ignore[no-any-return]
    return _number(value)
