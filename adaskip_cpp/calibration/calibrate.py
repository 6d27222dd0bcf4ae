"""``calibrate``, for users: reads requests with the whole model, and learns a profile of its sublayers."""

import contextlib
import operator
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from typing import SupportsIndex, TypeAlias

import numpy as np

from ..engine.llama import AdaSkipLlama
from ..engine.statistics import StatisticsBatch
from ..errors import NativeError, RequestError
from ..measuring import corpus
from ..model.arrays import Vectors
from ..model.skip_set import KINDS, late_layers
from ..model.statistics import WHOLE, LinearMaps, PhaseStatistics, map_scale
from ..planning.profile import Profile
from ..progress import Stage, progress_bar
from .cost import measure_cost, set_aside
from .linear import DEFAULT_RANK, LinearFit
from .similarity import RequestStatistics

MAX_DECODED = 20  # requests that are continued in decode, spread evenly over all; the authors use 20
Request: TypeAlias = "str | Sequence[SupportsIndex]"  # a text, or token ids


def calibrate(
    llm: AdaSkipLlama,
    requests: Iterable[Request] | None = None,
    *,
    n_requests: int = corpus.N_REQUESTS,
    n_tokens: int = corpus.N_TOKENS,
    n_decode: int = 32,
    rank: int = DEFAULT_RANK,
    cost: bool = True,
    on_stage: Stage = progress_bar,
    description: str | None = None,
) -> Profile:
    """Calibrate a model: measure the effect and the time of each sublayer on sample texts, as a profile to plan with.

    This is the paper's offline importance learning, for prompts and for answers. The whole model reads every request,
    and continues 20 of them by ``n_decode`` tokens. The model's plan is set again at the end, also after an error or
    Ctrl-C. Its KV cache is empty then.

    Args:
        llm: the model.
        requests: texts, or lists of token ids, that fit into the context. Text like your own gives a better profile.
            None for text that every installation has.
        n_requests: number of requests to cut from that text, if ``requests`` is None.
        n_tokens: tokens of each of these.
        n_decode: tokens to decode after a request, from 1 on.
        rank: rank of the linear maps for compensation ``"linear"``, up to 4096; 0 for no maps. Sublayers of the first
            third of the layers get none.
        cost: whether the time of each sublayer is measured. ``Profile.plan(speedup=...)`` needs it.
        on_stage: shows progress. The default one shows stages of more than 2 s on stderr, if that is a terminal.
            ``adaskip_cpp.progress.silent`` shows nothing.
        description: the text in words, stored in the profile.

    Raises:
        RequestError: there are no requests, or one is empty, is too long for the context, or has an unknown token id.
            All requests are checked before the first one is read.

    Examples:
        >>> llm = AdaSkipLlama("model.gguf", n_ctx=2048)
        >>> profile = calibrate(llm, [open("mine.txt").read()])
    """
    if requests is None:
        token_lists = corpus.requests(llm, n_requests, n_tokens)
    elif isinstance(requests, str | bytes):
        raise RequestError("requests is one text, not several; pass a list of texts or of token-id lists")
    else:
        token_lists = [_tokens(llm, request, index) for index, request in enumerate(requests)]
    _check(llm, token_lists, n_decode, rank)
    default = corpus.DESCRIPTION if requests is None else "requests given by the caller"
    prefill, decode, fit = list[PhaseStatistics](), list[PhaseStatistics](), LinearFit(_to_fit(llm) if rank else [])
    n_decoded = min(len(token_lists), MAX_DECODED)
    decodes = {index * len(token_lists) // n_decoded for index in range(n_decoded)}
    n_seen, n_text = 0, sum(map(len, token_lists))

    def advance(n_tokens: int) -> None:
        nonlocal n_seen
        n_seen += n_tokens
        share = n_seen / (n_text + n_decode * n_decoded)
        on_progress(share, f"{len(prefill)}/{len(token_lists)} requests, {n_seen:,} tokens")

    with set_aside(llm):
        llm.set_plan(None)
        with on_stage("Calibrating") as on_progress:
            for index, tokens in enumerate(token_lists):
                prefill.append(_observe(llm, tokens, advance, fit))
                if index in decodes:
                    decode.append(_observe(llm, tokens, advance, fit, n_decode))
            mean = PhaseStatistics.mean(prefill)
            fitted = fit.fit(rank, map_scale(mean.median_ratio))
        cost_model = None
        if cost:
            with on_stage("Timing sublayers") as on_time:
                cost_model = measure_cost(llm, rank=rank, on_progress=on_time)
    return Profile(
        prefill=mean,
        decode=PhaseStatistics.mean(decode),
        n_requests=len(prefill),
        n_tokens=n_text,
        model=llm.model_info,
        corpus=default if description is None else description,
        package_version=metadata.version("adaskip-cpp"),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cost=cost_model,
        maps=_maps(llm, fitted),
        windowable=tuple(row.layer for row in llm.sublayers if row.windowable and not row.window),
        sliding=tuple(row.layer for row in llm.sublayers if row.windowable and row.window),
        bulk_only=tuple(row.layer for row in llm.sublayers if row.in_bulk and not row.skippable),
    )


def _tokens(llm: AdaSkipLlama, request: Request, index: int) -> list[int]:
    if isinstance(request, str):
        return corpus.tokens_of(llm, request, bos=True) if request else []  # "" would be the begin token
    try:
        return [operator.index(token) for token in request]
    except TypeError as error:
        why = f"request {index} is neither a text nor a list of token ids"
        raise RequestError(f"{why}; pass str or whole numbers") from error


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
            why = f"request {index} has {len(tokens)} tokens and {n_decode} to decode, the model's context {n_ctx}"
            raise RequestError(f"{why}; shorten it or load the model with a larger n_ctx")
        if wrong := [token for token in tokens if not 0 <= token < n_vocab]:
            where = f"request {index} has the token id {wrong[0]}, which is not in the vocabulary"
            raise RequestError(f"{where}; use ids from 0 to {n_vocab - 1}")


def _observe(
    llm: AdaSkipLlama, tokens: list[int], advance: Callable[[int], None], fit: LinearFit, n_decode: int = 0
) -> PhaseStatistics:
    """Return the statistics of a prompt, or of ``n_decode`` tokens generated after it; the prompt is cached then."""
    statistics, phase = RequestStatistics(llm.n_layer), "decode" if n_decode else "prefill"

    def sink(batch: StatisticsBatch) -> None:
        if batch.phase != phase:  # the prompt's last token is evaluated again, for its logits
            return
        statistics.add(batch)
        if batch.activations is not None:
            fit.add(batch.activations, batch.positions)
        advance(batch.dot.shape[2])

    fits = bool(fit.sublayers) and not n_decode
    with llm.collect_statistics(sink, keep_logits=n_decode > 0, activations=fits):
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
    """Return what maps are fitted to: sublayers as (layer, kind), and whole layers as (layer, WHOLE)."""
    late = late_layers(llm.n_layer)
    found = [(row.layer, KINDS.index(row.kind)) for row in llm.sublayers if row.in_bulk and row.layer in late]
    whole = [(layer, WHOLE) for layer in late if {(layer, 0), (layer, 1)} <= {*found}]
    return sorted(found + whole)


def _maps(llm: AdaSkipLlama, fitted: dict[tuple[int, int], tuple[Vectors, Vectors]]) -> LinearMaps | None:
    """Return the maps as arrays, NaN for no map; None if there are none, as after requests of one token."""
    if not fitted:
        return None
    rank, n_embd = next(iter(fitted.values()))[0].shape
    down = np.full((llm.n_layer, 3, rank, n_embd), np.nan, np.float32)
    up = np.full((llm.n_layer, 3, n_embd, rank), np.nan, np.float32)
    for where, pair in fitted.items():
        down[where], up[where] = pair
    return LinearMaps(down, up)
