"""adaskip_cpp.calibrate: profiles of a model in NumPy, and of tiny ones."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from oracles.fake_llama import FakeLlama
from oracles.fixtures import Open
from oracles.profiles import FIGURES, measured
from oracles.reference import ReferenceRun
from oracles.tiny_families import tokens

import adaskip_cpp
from adaskip_cpp import SkipPlan
from adaskip_cpp.calibration.linear import DEFAULT_RANK, RIDGE
from adaskip_cpp.errors import NativeError, RequestError
from adaskip_cpp.model.statistics import map_scale

PLAN = SkipPlan.manual(3, ffn=[1])
N_DECODE = 4


def calibrate(llm: Any, *args: Any, **options: Any) -> adaskip_cpp.Profile:
    return adaskip_cpp.calibrate(llm, *args, **{"n_decode": N_DECODE, "cost": False, **options})


@pytest.fixture
def llm() -> Any:
    return FakeLlama()


def test_figures_are_means_over_requests_of_a_numpy_model(open_tiny: Open, numpy_model: Open) -> None:
    """Prompts, in several ubatches, then greedy decoding; the reference computes and chooses every token itself."""
    prompts, of_prompts, of_answers = [tokens(30), tokens(11, 1)], list[Any](), list[Any]()
    profile = calibrate(open_tiny(n_ubatch=8), prompts, n_decode=6)
    for prompt in prompts:
        run = ReferenceRun(numpy_model())
        traces: list[Any] = [run.eval(prompt)]
        for _ in range(6):
            traces.append(run.eval([int(traces[-1].logits[-1].argmax())]))
        of_prompts.append(measured(traces[0].u, traces[0].v))
        u, v = (np.concatenate([getattr(each, name) for each in traces[1:]], axis=2) for name in "uv")
        of_answers.append(measured(u, v))
    for actual, expected in ((profile.prefill, of_prompts), (profile.decode, of_answers)):
        assert actual.n_tokens == sum(each.n_tokens for each in expected)
        for name in FIGURES:
            wanted = np.mean([getattr(each, name) for each in expected], axis=0)
            np.testing.assert_allclose(getattr(actual, name), wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=name)
    assert profile.similarity is profile.prefill.similarity


def test_a_profile_says_what_it_was_learned_from(llm: Any) -> None:
    """Requests may come one by one, and fill the context."""
    profile = calibrate(llm, iter([np.full(60, 5), "hello"]), description="a long and a short one")
    assert (profile.n_requests, profile.n_tokens, profile.model) == (2, 60 + 6, llm.model_info)
    assert (profile.prefill.n_tokens, profile.decode.n_tokens) == (60 + 6, 2 * N_DECODE)
    assert profile.cost is None and profile.corpus == "a long and a short one"
    assert "caller" in calibrate(llm, ["hello"]).corpus
    profile = calibrate(llm, n_requests=3, n_tokens=40)
    assert (profile.n_requests, profile.n_tokens) == (3, 120) and "pydoc_data.topics" in profile.corpus


def test_of_many_requests_20_spread_evenly_are_continued_in_decode(llm: Any) -> None:
    requests = [[5 + i] * 2 for i in range(30)]
    profile = calibrate(llm, requests)
    assert (profile.n_requests, profile.prefill.n_tokens, profile.decode.n_tokens) == (30, 60, 20 * N_DECODE)
    pairs = itertools.pairwise(tokens for _, tokens in llm.evaluated)
    continued = [one[0] - 5 for one, other in pairs if len(one) == 2 and other == one[:1]]  # again, for its logits
    assert continued == [index for index in range(30) if index % 3 != 2]


@pytest.mark.parametrize("fail_after", [None, (1, KeyboardInterrupt()), (4, RuntimeError("boom"))])
def test_the_whole_model_reads_requests_and_is_left_as_it_was_however_it_ends(llm: Any, fail_after: Any) -> None:
    llm.set_plan(PLAN)
    llm.eval([9, 9, 9])
    llm.evaluated.clear()
    llm.draft_model, llm.fail_after = object(), fail_after
    before = llm.plan, llm.draft_model
    with pytest.raises(type(fail_after[1])) if fail_after else contextlib.nullcontext():
        calibrate(llm, ["hello", [5, 6], "again"])
    assert llm.evaluated and all(plan is None for plan, _ in llm.evaluated)
    assert (llm.plan, llm.draft_model) == before and llm.n_tokens == 0 and not llm.collecting


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("requests", [], "no requests"),
        ("requests", "one text", "not several"),
        *(("requests", ["good", value], "request 1 is empty") for value in ("", [])),
        ("requests", ["good", [5] * 61], r"request 1 has 61 tokens and 4 to decode, the model's context 64"),
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
    assert llm.evaluated == [] and llm.plan is PLAN


def test_statistics_that_miss_tokens_are_noticed(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "eval", lambda tokens, *phase: FakeLlama.eval(llm, tokens[1:], *phase))
    with pytest.raises(NativeError, match="2 of a request's 3 tokens"):
        calibrate(llm, [[5, 6, 7]])


def test_maps_of_a_model_equal_regressions_on_a_numpy_forward_pass(open_tiny: Open, numpy_model: Open) -> None:
    """Maps of full rank, but for BF16: ridge regressions of v - s u on u. The first third of the layers has none.

    That of a layer has the input of its attention as u, the output of its FFN as v, and s = 1.
    """
    prompts = [tokens(100, seed) for seed in (1, 2)]
    llm = open_tiny(n_ubatch=32)
    profile = calibrate(llm, prompts, rank=64)
    assert llm.n_evaluated == 200 + 2 * (1 + N_DECODE), "each is read once, but for its last token before decode"
    traces = [ReferenceRun(numpy_model()).eval(prompt) for prompt in prompts]
    u, v = (np.concatenate([getattr(trace, name)[:, :, 1:] for trace in traces], axis=2) for name in "uv")
    maps = profile.maps
    assert maps is not None and maps.up.shape[3] == u.shape[3]
    assert maps.fitted.tolist() == [[False] * 3, [True] * 3, [True] * 3]
    inputs, outputs = np.concatenate([u, u[:, :1]], axis=1), np.concatenate([v, v[:, 1:]], axis=1)
    scale = np.concatenate([map_scale(profile.prefill.median_ratio), np.ones((len(u), 1))], axis=1)
    for layer, kind in np.argwhere(maps.fitted):
        x, rest = inputs[layer, kind], outputs[layer, kind] - scale[layer, kind] * inputs[layer, kind]
        penalty = RIDGE * x.var(axis=0).mean() * len(x) * np.eye(x.shape[1])
        expected = x @ np.linalg.solve(x.T @ x + penalty, x.T @ rest)
        actual = x @ maps.down[layer, kind].T @ maps.up[layer, kind].T
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize(("rank", "expected"), [(0, None), (1, 1), (4, 4), (DEFAULT_RANK, 4)])
def test_the_rank_is_at_most_the_width_and_0_for_no_maps(llm: Any, rank: int, expected: int | None) -> None:
    maps = calibrate(llm, [list(range(5, 40))], rank=rank).maps
    assert maps is None if expected is None else maps is not None and maps.up.shape[3] == expected
    assert calibrate(llm, [[5], [6]], rank=rank).maps is None, "requests of one token leave nothing to fit"


@pytest.mark.parametrize("name", ["gemma4", "gemma4-per-layer"])
def test_a_profile_tells_what_the_bulk_alone_can_skip(name: str, open_tiny: Open) -> None:
    llm = open_tiny(name)
    profile = calibrate(llm, [tokens(40, seed) for seed in range(4)], rank=2)
    rows = [row for row in llm.sublayers if row.in_bulk and not row.skippable]
    assert rows and [(each, "attention") for each in profile.bulk_only] == [(row.layer, row.kind) for row in rows]
    assert profile.skippable.ravel().tolist() == [row.skippable for row in llm.sublayers]
    assert profile.in_bulk.all()
    windows = {row.layer: row.window for row in llm.sublayers if row.windowable}
    assert profile.windowable == tuple(layer for layer, own in windows.items() if not own) != ()
    assert profile.sliding == tuple(layer for layer, own in windows.items() if own) != ()
    for mode, may in (("prompt", profile.in_bulk[llm.n_layer // 3 :]), ("e2e", profile.skippable)):
        plan = profile.plan(int(may.sum()), mode=mode)
        assert mode == "e2e" or (plan.bulk.skip.skip[1:].all() and not plan.prefill.skip.any())
        llm.set_plan(plan)


def test_a_sublayer_that_is_not_skippable_has_no_map_nor_has_its_layer() -> None:
    profile = calibrate(FakeLlama(unobserved=[(1, 0)]), [list(range(5, 30))])
    assert np.argwhere(~profile.skippable).tolist() == [[1, 0]]
    assert np.argwhere(~profile.maps.fitted[1:]).tolist() == [[0, 0], [0, 2]]
    assert profile.plan(5, mode="e2e").compensation == "linear"


def test_each_stage_tells_its_progress(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[Any]:
        told[name] = []
        yield lambda fraction, words="": told[name].append(fraction)

    module = sys.modules["adaskip_cpp.calibration.calibrate"]
    monkeypatch.setattr(module, "measure_cost", lambda llm, rank, on_progress: on_progress(1.0))
    calibrate(llm, ["hello", "world"], cost=True, on_stage=stage)
    assert list(told) == ["Calibrating", "Timing sublayers"]
    assert all(fractions == sorted(fractions) and fractions[-1] == 1.0 for fractions in told.values())
