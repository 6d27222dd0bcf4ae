"""Plan files, with a plan or the frontier of `adaskip-cpp tune`: start with ``load_plan`` and ``save_plan``."""

import contextlib
import os
from dataclasses import dataclass, replace

import msgspec

from ..errors import PlanError, PlanFileError
from ..files import StrPath
from . import stored
from .frontier import Frontier
from .identity import PLAN_SUFFIX, ModelInfo, fingerprint, plan_path
from .plan import SkipPlan

FORMAT_VERSION = 10
_FORMAT = "adaskip-plan"


@dataclass(frozen=True)
class PlanFile:
    """The content of a plan file: ``plan``, or ``frontier`` with plans of one model. Anything else is a PlanError."""

    plan: SkipPlan | None = None
    frontier: Frontier | None = None

    def __post_init__(self) -> None:
        if (self.plan is None) == (self.frontier is None):
            raise PlanError("a plan file has one plan or a frontier; tune again")
        if len({each.n_layer for each in self.plans}) > 1 or {each.model for each in self.plans} - {self.made_for}:
            raise PlanError("the plans of a frontier are of several models; tune again")

    @property
    def plans(self) -> tuple[SkipPlan, ...]:
        """The plan, or all plans of the frontier."""
        if self.frontier is not None:
            return tuple(point.plan for point in self.frontier.points)
        return () if self.plan is None else (self.plan,)

    @property
    def made_for(self) -> ModelInfo | None:
        """The model of the plans; None for any model."""
        if self.frontier is not None:
            return self.frontier.made_for
        return None if self.plan is None else self.plan.model


def save_plan(path: StrPath, plan: SkipPlan | Frontier) -> None:
    """Write a plan, or a frontier that ``tune`` returned, into the JSON file ``path``.

    Its vectors and maps are in a second file beside it, ``X.bin`` for ``X.json``. ``AdaSkipLlama(..., plan="auto")``
    reads ``X.adaskip-plan.json`` beside ``X.gguf``.

    Raises:
        PlanError: the plans of a frontier are of several models.
        OSError: a file cannot be written; what was there before is still there.
    """
    file = PlanFile(frontier=plan) if isinstance(plan, Frontier) else PlanFile(plan)
    stored.save(path, _FORMAT, FORMAT_VERSION, file)


def load_plan(path: StrPath, *, model: StrPath | None = None) -> PlanFile:
    """Read a plan file that ``save_plan``, ``adaskip-cpp tune`` or ``adaskip-cpp plan`` wrote, and the file beside it.

    Args:
        path: the JSON file.
        model: a GGUF file that the plans must be of; None for no check.

    Raises:
        PlanFileError: a file is missing, malformed, of another format or version, or the two are not of one plan.
        ProfileMismatchError: the file is of another model.
        OSError: a file cannot be read.
    """
    name = os.fspath(path)
    way_out = "`adaskip-cpp tune` or `adaskip-cpp plan -o`"
    try:
        found = stored.load(name, PlanFile, _FORMAT, FORMAT_VERSION)
    except FileNotFoundError:
        raise PlanFileError(f"there is no plan file {name!r}; write one with {way_out}") from None
    except stored.ModelGivenError as error:
        raise PlanFileError(f"{name!r} is a model; name its plan file, which {way_out} writes") from error
    except (ValueError, RecursionError) as error:  # this includes all errors of msgspec and our own
        raise PlanFileError(f"{name!r} cannot be used: {error}; write it again with {way_out}") from error
    if model is not None and (made_for := found.made_for) is not None:
        here = replace(made_for, fingerprint=fingerprint(model))
        made_for.check(here, repr(name), model, f"run `adaskip-cpp tune {os.fspath(model)}`")
    return found


def is_plan_file(path: StrPath) -> bool:
    """Return whether a file holds plans, and not a profile. Of a missing file, the name decides."""
    if not os.path.isfile(path):
        return os.fspath(path).endswith(PLAN_SUFFIX)
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return f'"format": "{_FORMAT}"'.encode() in file.read(256)
    return False


def frontier_beside(model: StrPath) -> Frontier | None:
    """Return the frontier beside a model, as :func:`frontier_of`."""
    return frontier_of(plan_path(model))


def frontier_of(path: StrPath) -> Frontier | None:
    """Return the frontier of a plan file without its points; None without one, or if the file cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = stored.load_json(path, _FORMAT, FORMAT_VERSION).get("frontier")
        if isinstance(found, dict):
            return msgspec.convert({**found, "points": ()}, Frontier)
    return None


def plan_beside(model: StrPath) -> PlanFile:
    name = plan_path(model)
    if not os.path.exists(name):
        raise PlanFileError(f"there is no plan {name!r} beside the model; run `adaskip-cpp tune {os.fspath(model)}`")
    return load_plan(name, model=model)
