"""Calibration: run requests through the full model and learn how much each sublayer changes its input."""

import contextlib
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from typing import SupportsIndex, TypeAlias

import numpy as np

from ..engine.llama import AdaSkipLlama
from ..engine.native_types import StatisticsBatch
from ..errors import NativeError, RequestError
from ..measuring import corpus
from ..model.skip_set import KINDS
from ..model.statistics import WHOLE, LinearMaps, PhaseStatistics, map_scale
from ..planning.profile import Profile
from ..progress import progress_bar
from .cost import measure_cost, set_aside
from .divergence import N_BEHIND, N_PIECES, N_PROMPT, measure_divergence, measure_windows
from .linear import DEFAULT_RANK, LinearFit, Matrix, moments_bytes
from .similarity import RequestStatistics

MAX_DECODED = 20
"""Requests that are continued in decode, spread evenly over all; as many as the authors use."""

_MOMENTS_BYTES = 2 << 30

Request: TypeAlias = "str | Sequence[SupportsIndex]"
"""A text, or token ids."""


def calibrate(
    llm: AdaSkipLlama,
    requests: Iterable[Request] | None = None,
    *,
    n_requests: int = corpus.N_REQUESTS,
    n_tokens: int = corpus.N_TOKENS,
    n_decode: int = 32,
    rank: int = DEFAULT_RANK,
    cost: bool = True,
    divergence: bool = True,
    windows: bool = True,
    progress: bool | None = None,
    description: str | None = None,
) -> Profile:
    """Learn a profile from calibration requests: the paper's offline importance learning, and the same of decode.

    Every request runs in prefill through the full model, which continues :data:`MAX_DECODED` of them by ``n_decode``
    tokens, greedily and past an end of text too. What :class:`adaskip_cpp.model.statistics.PhaseStatistics` holds is
    computed over all tokens of one phase of a request and then averaged over the requests. The model's plan is set
    aside meanwhile and put back at the end, also after an error or Ctrl-C; its KV cache is dropped.

    Args:
        requests: texts or lists of token ids, all of them used; text like your own gives a better profile. None: those
            of :func:`adaskip_cpp.measuring.corpus.requests`, from text that every Python carries.
        n_requests: requests to cut from it, of ``n_tokens`` tokens each, if ``requests`` is None.
        n_decode: tokens to decode after a request, at least 1.
        rank: of the linear maps that are fitted for compensation ``"linear"``, see
            :mod:`adaskip_cpp.calibration.linear`; 0 for none. The moments of all sublayers take ``16 * n_layer * n_embd
            ** 2`` bytes; beyond 2 GiB they are gathered in several passes over the requests.
        cost: whether to measure what each sublayer costs on this machine, which ``Profile.plan(speedup=...)`` needs.
        divergence: whether to measure what skipping each sublayer in the bulk of a prompt costs the tokens behind it,
            which chooses what mode ``"prompt"`` skips. The requests that it is measured on, one in four and three at
            most, have no part in the maps.
        windows: whether to measure with it what attentions cost that look back at a window, which mode ``"prompt"``
            narrows for ``speedup=``.
        progress: True shows progress on stderr, False does not; None does where stderr is a terminal and it will take
            more than 2 s.
        description: what text this is, in words, stored in the profile.

    Raises:
        RequestError: there are no requests, or one is empty, leaves the model's context no room for ``n_decode``
            tokens, or has token ids that are not in the vocabulary. All are checked before the first one runs.
    """
    if requests is None:
        token_lists = corpus.requests(llm, n_requests, n_tokens)
    elif isinstance(requests, str | bytes):
        raise RequestError("requests is one text, not several; pass a list of texts or of token-id lists")
    else:
        token_lists = [_tokens(llm, request, index) for index, request in enumerate(requests)]
    _check(llm, token_lists, n_decode, rank)
    if description is None:
        description = corpus.DESCRIPTION if requests is None else "requests given by the caller"

    prefill: list[PhaseStatistics] = []
    decode: list[PhaseStatistics] = []
    # One fit per pass over the requests, each of as many sublayers as its moments have memory for.
    fitted_to = _to_fit(llm) if rank else []
    n_fit = max(_MOMENTS_BYTES // moments_bytes(llm.n_embd()), 1)
    fits = [LinearFit(fitted_to[start : start + n_fit]) for start in range(0, len(fitted_to), n_fit)]
    judging = token_lists[len(token_lists) - min(N_PIECES, len(token_lists) // 4) :] if divergence else []
    n_fitted = len(token_lists) - len(judging)
    n_decoded = min(len(token_lists), MAX_DECODED)
    decodes = {index * len(token_lists) // n_decoded for index in range(n_decoded)}
    n_text = sum(map(len, token_lists))
    n_seen, n_expected = 0, n_text * max(len(fits), 1) + n_decode * n_decoded

    def advance(n_tokens: int) -> None:
        nonlocal n_seen
        n_seen += n_tokens
        on_progress(n_seen / n_expected, f"{len(prefill)}/{len(token_lists)} requests, {n_seen:,} tokens")

    with set_aside(llm):
        llm.set_plan(None)
        with progress_bar("Calibrating", progress) as on_progress:
            for index, tokens in enumerate(token_lists):
                prefill.append(_observe(llm, tokens, advance, fit=fits[0] if fits and index < n_fitted else None))
                if index in decodes:
                    decode.append(_observe(llm, tokens, advance, n_decode=n_decode))
            mean = PhaseStatistics.mean(prefill)
            fitted: dict[tuple[int, int], tuple[Matrix, Matrix]] = {}
            for index, fit in enumerate(fits):
                for tokens in token_lists[:n_fitted] if index else ():  # the first pass has been made
                    _observe(llm, tokens, advance, fit=fit)
                fitted |= fit.fit(rank, map_scale(mean.median_ratio))
                fit.clear()
        with progress_bar("Timing sublayers", progress) as on_time:
            cost_model = measure_cost(llm, on_progress=on_time) if cost else None

    profile = Profile(
        prefill=mean,
        decode=PhaseStatistics.mean(decode),
        n_requests=len(prefill),
        n_tokens=n_text,
        model=llm.model_info,
        corpus=description,
        package_version=metadata.version("adaskip-cpp"),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cost=cost_model,
        maps=_maps(llm, fitted),
        bulk_only=tuple(row.layer for row in llm.sublayers if row.in_bulk and not row.skippable),
    )
    pieces = [tokens[: N_PROMPT + N_BEHIND] for tokens in judging if len(tokens) > 1]
    if pieces:
        with progress_bar("Skipping each sublayer", progress) as on_skipped:
            profile = replace(profile, divergence=measure_divergence(llm, profile, pieces, on_progress=on_skipped))
    if pieces and windows:
        with progress_bar("Narrowing attentions", progress) as on_narrowed:
            profile = replace(profile, windows=measure_windows(llm, judging, on_progress=on_narrowed))
    return profile


def _tokens(llm: AdaSkipLlama, request: Request, index: int) -> list[int]:
    if isinstance(request, str):
        return corpus.tokens_of(llm, request, bos=True) if request else []  # else the token that begins a sequence
    try:
        return [operator.index(token) for token in request]
    except TypeError as error:
        message = f"request {index} is neither a text nor a list of token ids; pass str or whole numbers"
        raise RequestError(message) from error


def _check(llm: AdaSkipLlama, token_lists: list[list[int]], n_decode: int, rank: int) -> None:
    if not isinstance(rank, int) or not 0 <= rank <= 4096:
        raise RequestError(f"the rank of the linear maps is {rank!r}; use a whole number from 0 (none) to 4096")
    if not isinstance(n_decode, int) or n_decode < 1:
        raise RequestError(f"n_decode is {n_decode!r}; decode at least 1 token per request")
    if not token_lists:
        raise RequestError("there are no requests; pass at least one, or None for the built-in text")
    n_ctx, n_vocab = llm.context_size, llm.n_vocab()
    for index, tokens in enumerate(token_lists):
        if not tokens:
            raise RequestError(f"request {index} is empty; leave it out")
        if len(tokens) + n_decode > n_ctx:
            raise RequestError(
                f"request {index} has {len(tokens)} tokens and {n_decode} to decode, the model's context {n_ctx}; "
                "shorten it or load the model with a larger n_ctx"
            )
        if wrong := [token for token in tokens if not 0 <= token < n_vocab]:
            where = f"request {index} has the token id {wrong[0]}, which is not in the vocabulary"
            raise RequestError(f"{where}; use ids from 0 to {n_vocab - 1}")


def _observe(
    llm: AdaSkipLlama,
    tokens: list[int],
    advance: Callable[[int], None],
    *,
    fit: LinearFit | None = None,
    n_decode: int = 0,
) -> PhaseStatistics:
    """Statistics of a prompt, or of ``n_decode`` tokens generated behind it while it is in the cache."""
    statistics = RequestStatistics(llm.n_layer)
    phase = "decode" if n_decode else "prefill"

    def sink(batch: StatisticsBatch) -> None:
        if batch.phase != phase:  # the prompt's last token is evaluated again, for its logits
            return
        statistics.add(batch)
        if fit is not None and batch.activations is not None:
            fit.add(batch.activations, batch.positions)
        advance(batch.dot.shape[2])

    with llm.collect_statistics(sink, keep_logits=n_decode > 0, vectors=True, activations=fit is not None):
        if n_decode:
            with contextlib.closing(llm.generate(tokens, temp=0.0)) as generated:
                for _ in range(n_decode + 1):  # the first one is sampled from the prompt's logits
                    next(generated)
        else:
            llm.reset()
            llm.eval(tokens)
    seen, expected = statistics.n_tokens, n_decode or len(tokens)
    if seen != expected:
        raise NativeError(f"statistics cover {seen} of a request's {expected} tokens; please report this as a bug")
    return statistics.result()


def _to_fit(llm: AdaSkipLlama) -> list[tuple[int, int]]:
    """What maps are fitted to: sublayers as (layer, kind), and whole layers as (layer, WHOLE)."""
    found = [(row.layer, KINDS.index(row.kind)) for row in llm.sublayers if row.in_bulk]
    whole = [(layer, WHOLE) for layer in range(llm.n_layer) if {(layer, 0), (layer, 1)} <= {*found}]
    return sorted(found + whole)


def _maps(llm: AdaSkipLlama, fitted: dict[tuple[int, int], tuple[Matrix, Matrix]]) -> LinearMaps | None:
    """Return the maps as arrays, NaN where there is none; None where requests of one token left nothing to fit on."""
    if not fitted:
        return None
    rank, n_embd = next(iter(fitted.values()))[0].shape
    down = np.full((llm.n_layer, 3, rank, n_embd), np.nan, np.float32)
    up = np.full((llm.n_layer, 3, n_embd, rank), np.nan, np.float32)
    for where, pair in fitted.items():
        down[where], up[where] = pair
    return LinearMaps(down, up)
