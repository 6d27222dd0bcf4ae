"""Finds out what must be known of a model before it is measured, for :mod:`adaskip_cpp.benchmark.measure`."""

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import numpy.typing as npt

from ..calibration.calibrate import calibrate
from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..measuring import corpus
from ..measuring.cores import is_busy, load_average
from ..model.plan import SkipPlan
from ..planning.profile import Profile
from ..planning.request import PlanRequest

_DEFAULT_CONTEXTS = (512, 2048, 8192)
N_REQUESTS, N_TOKENS, N_DECODE = 6, 512, 16
"""Of a brief calibration: enough for a plan to be timed, not for one to be used."""


@dataclass(frozen=True)
class Configuration:
    """The model that was measured, and with what; ``load_average`` was that before, None where none is kept."""

    model: str
    file: str
    architecture: str
    fingerprint: str
    n_layer: int
    file_bytes: int
    quantisation: str
    adaskip_cpp: str
    llama_cpp_python: str
    python: str
    os: str
    load_average: float | None
    busy: bool


def configuration(llm: AdaSkipLlama) -> Configuration:
    from gguf import LlamaFileType

    try:
        file_type = LlamaFileType(int(llm.metadata.get("general.file_type", "")))
        quantisation = file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        quantisation = "unknown"
    load = load_average()
    file = os.path.basename(llm.model_path)
    return Configuration(
        model=llm.metadata.get("general.name") or file,
        file=file,
        architecture=llm.model_info.architecture,
        fingerprint=llm.model_info.fingerprint,
        n_layer=llm.n_layer,
        file_bytes=os.path.getsize(llm.model_path),
        quantisation=quantisation,
        adaskip_cpp=metadata.version("adaskip-cpp"),
        llama_cpp_python=metadata.version("llama-cpp-python"),
        python=platform.python_version(),
        os=f"{platform.system()} {platform.release()}",
        load_average=None if load is None else round(load, 2),
        busy=is_busy(load),
    )


def fit_contexts(asked: Sequence[int] | None, n_ctx_train: int, n_decode: int) -> tuple[tuple[int, ...], str]:
    """Return the contexts to measure, ascending, and a line that says what was changed, "" if nothing."""
    wanted = sorted(set(_DEFAULT_CONTEXTS if asked is None else asked))
    limit = n_ctx_train - n_decode if n_ctx_train else wanted[-1]
    if wanted[0] < 1 or limit < 1:
        raise DataError(
            f"no prompt of {wanted[0]} tokens with {n_decode} decoded behind it fits into the model's context of "
            f"{n_ctx_train:,}; use --contexts of 1 or more and fewer --decode-tokens"
        )
    if asked is not None and n_ctx_train and wanted[-1] > n_ctx_train:
        raise DataError(
            f"a context of {wanted[-1]:,} tokens is beyond the model's {n_ctx_train:,}; use smaller --contexts"
        )
    fitting = sorted({min(context, limit) for context in wanted})
    listed = ", ".join(f"{context:,}" for context in fitting)
    note = f"Contexts are {listed}: the model's {n_ctx_train:,} tokens also hold the {n_decode} that are decoded."
    return tuple(fitting), "" if fitting == wanted else note


def brief_profile(llm: AdaSkipLlama, *, cost: bool) -> Profile:
    """Calibrate on a few requests, with the time of the sublayers if a speed-up is asked for."""
    return calibrate(llm, corpus.requests(llm, N_REQUESTS, N_TOKENS), n_decode=N_DECODE, cost=cost)


def learns(request: PlanRequest) -> bool:
    """Whether a request needs a profile; lists of layers without compensation need the number of layers only."""
    return request.strategy != "manual" or request.compensation != "none"


def by_name(requests: Iterable[PlanRequest]) -> dict[str, PlanRequest]:
    """Return requests by their names in tables, numbered where two have one name."""
    named: dict[str, PlanRequest] = {}
    for request in requests:
        n = sum(name.partition(" (")[0] == request.name for name in named)
        named[f"{request.name} ({n + 1})" if n else request.name] = request
    return named


def material(
    llm: AdaSkipLlama, plans: Iterable[SkipPlan], n_tokens: int
) -> tuple[list[int], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return text for prompts, and which sublayers can be skipped, everywhere and in the bulk; refuse others' plans.

    The latter two are bool ``[n_layer, 2]``.
    """
    for plan in plans:
        llm.set_plan(plan)
    tokens = corpus.cut(llm, corpus.text(()), 1, max(n_tokens, 2))[0]
    may = np.array([(sublayer.skippable, sublayer.in_bulk) for sublayer in llm.sublayers])
    return tokens, may[:, 0].reshape(-1, 2), may[:, 1].reshape(-1, 2)
