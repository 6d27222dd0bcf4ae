"""adaskip_cpp.calibrate: profiles of a model in NumPy, and of tiny ones."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from oracles.fake_llama import BOS, FakeLlama
from oracles.fixtures import Open
from oracles.profiles import FIGURES, measured
from oracles.reference import ReferenceRun
from oracles.tiny_families import tokens

import adaskip_cpp
from adaskip_cpp import SkipPlan
from adaskip_cpp.calibration.linear import DEFAULT_RANK, RIDGE, LinearFit
from adaskip_cpp.errors import NativeError, RequestError
from adaskip_cpp.model.statistics import map_scale

PLAN = SkipPlan.manual(3, ffn=[1])
N_DECODE = 4


def calibrate(llm: Any, *args: Any, **options: Any) -> adaskip_cpp.Profile:
    """Without timing sublayers, which a model without a library cannot do."""
    return adaskip_cpp.calibrate(llm, *args, **{"n_decode": N_DECODE, "cost": False, **options})


@pytest.fixture
def llm() -> Any:
    return FakeLlama()


# --- calibration ------------------------------------------------------------------------------------------------------


def decoded(llm: FakeLlama, prompt: list[int]) -> list[int]:
    """The tokens that are evaluated in decode after a prompt."""
    tokens = [llm.next_token(prompt[-1])]
    while len(tokens) < N_DECODE:
        tokens.append(llm.next_token(tokens[-1]))
    return tokens


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_figures_are_the_mean_over_requests_of_each_requests_figures(llm: Any, phase: str) -> None:
    requests = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]
    profile = calibrate(llm, requests)
    statistics = getattr(profile, phase)
    texts = requests if phase == "prefill" else [decoded(llm, request) for request in requests]
    each = [measured(*llm.streams(text)) for text in texts]
    for name in FIGURES:
        expected = np.mean([getattr(one, name) for one in each], axis=0)
        np.testing.assert_allclose(getattr(statistics, name), expected, rtol=1e-4, atol=1e-6)
    assert statistics.n_tokens == sum(len(text) for text in texts)
    assert (profile.similarity is statistics.similarity) == (phase == "prefill")


def test_both_phases_of_a_model_equal_a_numpy_forward_pass(open_tiny: Open, numpy_model: Open) -> None:
    """Prompt, then greedy decoding; the reference computes and chooses every token itself."""
    prompt = tokens(30)
    profile = calibrate(open_tiny(), [prompt], n_decode=6)
    run = ReferenceRun(numpy_model())
    prefill = run.eval(prompt)
    pieces, logits = [], prefill.logits[-1]
    for _ in range(6):
        pieces.append(run.eval([int(logits.argmax())]))
        logits = pieces[-1].logits[-1]
    for actual, traces in ((profile.prefill, [prefill]), (profile.decode, pieces)):
        expected = measured(*(np.concatenate([getattr(each, name) for each in traces], axis=2) for name in "uv"))
        assert actual.n_tokens == expected.n_tokens
        for name in FIGURES:
            wanted = getattr(expected, name)
            np.testing.assert_allclose(getattr(actual, name), wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_a_profile_says_what_it_was_learned_from(llm: Any) -> None:
    """Requests may come one by one, and fill the context."""
    profile = calibrate(llm, iter([np.full(60, 5), "hello"]), description="a long and a short one")
    assert (profile.n_requests, profile.n_tokens, profile.model) == (2, 60 + 6, llm.model_info)
    assert (profile.prefill.n_tokens, profile.decode.n_tokens) == (60 + 6, 2 * N_DECODE)
    assert profile.cost is None
    assert profile.corpus == "a long and a short one"
    assert profile.package_version == adaskip_cpp.__version__
    assert profile.created.endswith("+00:00")
    assert "caller" in calibrate(llm, ["hello"]).corpus


def test_of_many_requests_20_spread_evenly_are_continued_in_decode(llm: Any) -> None:
    requests = [[5 + i] * 2 for i in range(30)]
    profile = calibrate(llm, requests)
    assert (profile.n_requests, profile.prefill.n_tokens, profile.decode.n_tokens) == (30, 60, 20 * N_DECODE)
    pieces = [tokens for _, tokens in llm.evaluated]
    # A request that is continued has its last token evaluated again, for its logits.
    continued = [
        request[0] - 5 for request, after in itertools.pairwise(pieces) if len(request) == 2 and after == request[:1]
    ]
    assert continued == [index for index in range(30) if index % 3 != 2]


def test_without_requests_it_reads_pages_of_the_language_reference(llm: Any) -> None:
    profile = calibrate(llm, n_requests=3, n_tokens=40)
    assert (profile.n_requests, profile.n_tokens) == (3, 120)
    assert "pydoc_data.topics" in profile.corpus


def test_each_request_runs_alone_through_the_full_model(llm: Any) -> None:
    llm.set_plan(PLAN)
    llm.eval([9, 9, 9])
    llm.evaluated.clear()
    llm.draft_model = draft_model = object()
    calibrate(llm, ["ab", [5, 6]])
    expected = []
    for request in ([BOS, ord("a") + 2, ord("b") + 2], [5, 6]):  # the last token again, for its logits
        expected += [request, [request[-1]], *([token] for token in decoded(llm, request))]
    assert llm.evaluated == [(None, piece) for piece in expected]
    assert llm.plan is PLAN and llm.draft_model is draft_model
    assert llm.n_tokens == 0 and not llm.collecting


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
def test_an_interruption_leaves_the_model_as_it_was(llm: Any, error: BaseException) -> None:
    llm.set_plan(PLAN)
    llm.fail_after = (1, error)
    with pytest.raises(type(error)):
        calibrate(llm, ["hello", "world", "again"])
    assert llm.plan is PLAN
    assert llm.n_tokens == 0 and not llm.collecting
    llm.fail_after = None
    assert calibrate(llm, ["hello"]).n_requests == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("requests", [], "no requests"),
        ("requests", "one text", "not several"),
        *(("requests", ["good", value], "request 1 is empty") for value in ("", [])),
        ("requests", ["good", [5] * 61], r"request 1 has 61 tokens and 4 to decode, the model's context 64"),
        ("requests", ["good", "x" * 60], r"request 1 has 61 tokens"),
        ("requests", ["good", [5, 300]], r"request 1 has the token id 300.*0 to 299"),
        ("requests", ["good", [-1]], r"request 1 has the token id -1"),
        *(("requests", ["good", value], "request 1 is neither") for value in ([0.5], 7, None)),
        *(("n_decode", value, r"n_decode.*at least 1") for value in (0, -1, 1.5)),
        *(("rank", value, r"rank.*from 0 \(none\) to 4096") for value in (-1, 4097, 1.5, "32", None)),
    ],
)
def test_requests_and_options_are_checked_before_anything_runs(llm: Any, option: str, value: Any, message: str) -> None:
    llm.set_plan(PLAN)
    with pytest.raises(RequestError, match=message):
        calibrate(llm, **{"requests": ["good"], option: value})
    assert llm.evaluated == []
    assert llm.plan is PLAN


def test_statistics_that_miss_tokens_are_noticed(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "eval", lambda tokens, *phase: FakeLlama.eval(llm, tokens[1:], *phase))
    with pytest.raises(NativeError, match="2 of a request's 3 tokens"):
        calibrate(llm, [[5, 6, 7]])


# --- linear maps ------------------------------------------------------------------------------------------------------


def ridge(u: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """Ridge regression of v - scale u on u without a constant, float64 [n_tokens, n_embd], in closed form."""
    penalty = RIDGE * u.var(axis=0).mean() * len(u) * np.eye(u.shape[1])
    return np.asarray(np.linalg.solve(u.T @ u + penalty, u.T @ (v - scale * u)).T)


def assert_ridge(profile: adaskip_cpp.Profile, u: np.ndarray, v: np.ndarray) -> None:
    """The maps, of full rank, are ridge regressions of v - s u on u, [n_layer, 2, n_tokens, n_embd], but for BF16.

    The first third of the layers has none. That of a layer has the input of its attention as u, the output of its FFN
    as v, and s = 1.
    """
    maps = profile.maps
    assert maps is not None and maps.up.shape[3] == u.shape[3]
    assert maps.fitted.all(axis=1).tolist() == maps.fitted.any(axis=1).tolist() == [False, True, True]
    inputs, outputs = np.concatenate([u, u[:, :1]], axis=1), np.concatenate([v, v[:, 1:]], axis=1)
    scale = np.concatenate([map_scale(profile.prefill.median_ratio), np.ones((len(u), 1))], axis=1)
    for at in np.argwhere(maps.fitted):
        at = tuple(at)
        expected = inputs[at] @ ridge(inputs[at], outputs[at], scale[at]).T
        actual = inputs[at] @ maps.down[at].T @ maps.up[at].T
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-2 * np.abs(expected).max())


def test_maps_of_a_model_equal_regressions_on_a_numpy_forward_pass(open_tiny: Open, numpy_model: Open) -> None:
    prompts, traces = [tokens(100, seed) for seed in (1, 2)], []
    profile = calibrate(open_tiny(n_ubatch=32), prompts, rank=64)
    for prompt in prompts:
        traces.append(ReferenceRun(numpy_model()).eval(prompt))
    u, v = (np.concatenate([getattr(trace, name)[:, :, 1:] for trace in traces], axis=2) for name in "uv")
    assert_ridge(profile, u, v)


def test_the_rank_is_at_most_the_length_of_the_stream(llm: Any) -> None:
    for rank, expected in ((1, 1), (3, 3), (4, 4), (DEFAULT_RANK, 4)):
        maps = calibrate(llm, [list(range(5, 40))], rank=rank).maps
        assert maps is not None and (maps.n_layer, *maps.up.shape[2:]) == (3, 4, expected)


@pytest.mark.parametrize("name", ["gemma4", "gemma4-per-layer"])
def test_a_profile_tells_what_the_bulk_alone_can_skip(name: str, open_tiny: Open) -> None:
    llm = open_tiny(name)
    profile = calibrate(llm, [tokens(40, seed) for seed in range(4)], rank=2)
    rows = [row for row in llm.sublayers if row.in_bulk and not row.skippable]
    assert rows and [(each, "attention") for each in profile.bulk_only] == [(row.layer, row.kind) for row in rows]
    assert profile.skippable.ravel().tolist() == [row.skippable for row in llm.sublayers]
    assert profile.in_bulk.all()
    assert profile.windowable == tuple(row.layer for row in llm.sublayers if row.windowable) != ()
    for mode, may in (("prompt", profile.in_bulk[llm.n_layer // 3 :]), ("e2e", profile.skippable)):
        plan = profile.plan(int(may.sum()), mode=mode)
        assert mode == "e2e" or (plan.bulk.skip.skip[1:].all() and not plan.prefill.skip.any())
        llm.set_plan(plan)
        llm.reset()
        llm.eval(tokens(40))
        assert np.isfinite(llm.scores[39]).all()


def test_every_request_is_read_once_however_little_memory_the_moments_may_take(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides what is decoded, and the last token of each prompt, which is read again for its logits."""
    monkeypatch.setattr(sys.modules["adaskip_cpp.calibration.calibrate"], "LinearFit", partial(LinearFit, most_bytes=1))
    llm = open_tiny()
    profile = calibrate(llm, [tokens(n, n) for n in (40, 50, 60)], rank=4)
    assert profile.maps is not None
    assert llm.n_evaluated == 40 + 50 + 60 + 3 * (1 + N_DECODE)


@pytest.mark.parametrize(("n_layer", "n_early"), [(2, 0), (3, 1), (5, 1), (6, 2)])
def test_the_first_third_of_the_layers_gets_no_maps(n_layer: int, n_early: int) -> None:
    llm: Any = FakeLlama(n_layer=n_layer)
    maps = calibrate(llm, [list(range(5, 40))]).maps
    assert maps is not None
    assert maps.fitted.tolist() == [[layer >= n_early] * 3 for layer in range(n_layer)]


def test_without_a_rank_or_tokens_to_fit_there_are_no_maps(llm: Any) -> None:
    """Requests of one token leave nothing to fit."""
    requests = [list(range(5, 30))]
    bare, fitted, short = calibrate(llm, requests, rank=0), calibrate(llm, requests), calibrate(llm, [[5], [6]])
    assert bare.maps is None is short.maps and fitted.maps is not None
    assert bare.prefill == fitted.prefill and bare.decode == fitted.decode


def test_a_sublayer_that_is_not_skippable_has_no_map_nor_has_its_layer() -> None:
    profile = calibrate(FakeLlama(unobserved=[(1, 0)]), [list(range(5, 30))])
    assert np.argwhere(~profile.skippable).tolist() == [[1, 0]]
    assert np.argwhere(~profile.maps.fitted[1:]).tolist() == [[0, 0], [0, 2]]
    assert profile.plan(5, mode="e2e").compensation == "linear"


# --- progress ---------------------------------------------------------------------------------------------------------


def test_whoever_shows_progress_is_told_each_stage_and_what_is_done_of_it(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[Any]:
        told[name] = []
        yield lambda fraction, words="": told[name].append(fraction)

    module = sys.modules["adaskip_cpp.calibration.calibrate"]
    monkeypatch.setattr(module, "measure_cost", lambda llm, on_progress: on_progress(1.0))
    calibrate(llm, ["hello", "world"], cost=True, on_stage=stage)
    assert list(told) == ["Calibrating", "Timing sublayers"]
    assert all(fractions == sorted(fractions) and fractions[-1] == 1.0 for fractions in told.values())
