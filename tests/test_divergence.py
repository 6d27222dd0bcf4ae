"""adaskip_cpp.calibration.divergence: what skipping each sublayer in the bulk costs, against NumPy passes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fake_llama import FakeLlama
from reference import ReferenceModel, ReferenceRun, Windows

import adaskip_cpp
from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.calibration.divergence import N_BEHIND, measure_divergence, measure_windows
from adaskip_cpp.model.statistics import WHOLE, map_scale

Tiny = Callable[..., Path]
Tokens = Callable[..., list[int]]
Open = Callable[..., Any]

HEAD = 4  # tokens that every plan runs whole by default; of the measurement's own prompts the last one does too


def calibrated(llm: Any, requests: Any, **options: Any) -> Profile:
    return adaskip_cpp.calibrate(llm, requests, **{"n_decode": 2, "cost": False, "rank": 4, **options})


def behind(model: ReferenceModel, piece: Sequence[int], n: int, skip: Any = None, **standing_in: Any) -> Any:
    """Probabilities behind the last ``n`` tokens, float64 [n, n_vocab]; the bulk of those before them skips."""
    run, end = ReferenceRun(model), len(piece) - n
    run.eval(piece[: min(HEAD, end)])
    if end > HEAD:
        run.eval(piece[HEAD : end - 1], skip, **standing_in, keeps_kv=True)
        run.eval(piece[end - 1 : end])
    logits = np.asarray(run.eval(piece[end:]).logits, np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def expected(path: Path, profile: Profile, pieces: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """The mean over all judged tokens of sum p log(p / q), every sublayer alone; with what stands in by the maps.

    Those in the greater half in the first piece are judged by that alone.
    """
    if len(pieces) > 1:
        first, every = (expected_of_all(path, profile, each) for each in (pieces[:1], pieces))
        return np.where(first <= np.sort(first, axis=None)[first.size // 2 - 1], every, first)
    return expected_of_all(path, profile, pieces)


def expected_of_all(path: Path, profile: Profile, pieces: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    model, maps = ReferenceModel(path), profile.maps
    assert maps is not None
    result, scale = np.zeros((model.n_layer, 2)), map_scale(profile.median_ratio)
    parts = {"scale": scale, "down": maps.down[:, :2], "up": maps.up[:, :2]}
    for at in np.ndindex(result.shape):
        skip, found = np.zeros(result.shape, bool), []
        skip[at] = True
        for piece in pieces:
            n = max(1, min(48, len(piece) // 4))
            p, q = behind(model, piece, n), behind(model, piece, n, skip, **parts)
            found.extend((p * np.log(p / q)).sum(axis=1))
        result[at] = np.mean(found)
    return result


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("lengths", [(40,), (24, 60, 7)], ids=str)
@pytest.mark.parametrize("logits_all", [False, True])
def test_each_figure_is_the_mean_divergence_of_the_tokens_behind(
    name: str, lengths: tuple[int, ...], logits_all: bool, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    # The GELU of Gemma is a table in F16, which is as far off as is written in test_bulk.py.
    llm = open_model(tiny(name), logits_all=logits_all)
    profile = calibrated(llm, [tokens(40, seed) for seed in range(3)], divergence=False)
    assert profile.divergence is None
    pieces = [tokens(n, seed) for seed, n in enumerate(lengths, 10)]
    found, wanted = measure_divergence(llm, profile, pieces), expected(tiny(name), profile, pieces)
    np.testing.assert_allclose(found, wanted, rtol=2e-2 if name == "gemma3" else 1e-3, atol=1e-6 * wanted.max())
    assert (wanted[:-1] > 0).all()
    assert (found[-1] == 0).all(), "nobody reads what the last layer makes of a bulk, and batches are the same"


def test_windows_cost_what_the_reference_says(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    """An eighth of each piece, between a head of 4 and a tail of 64; of no attention, one, two and all."""
    pieces = [tokens(300, 10), tokens(256, 11), tokens(255, 12)]  # the last is too short
    found = measure_windows(open_model(tiny(), n_ctx=512), pieces)
    assert found is not None and found.layers == (0, 1, 2)
    model, wanted = ReferenceModel(tiny()), []
    for n in range(4):
        divergences = []
        for piece in pieces[:2]:
            behind_n, odds = min(48, len(piece) // 4), []
            for layers in ((), (0, 1, 2)[3 - n :]):
                run, end = ReferenceRun(model), len(piece) - behind_n
                run.eval(piece[:4])
                run.eval(piece[4 : end - 64], windows=Windows(layers, len(piece) // 8, 4))
                run.eval(piece[end - 64 : end])
                logits = np.asarray(run.eval(piece[end:]).logits, np.float64)
                odds.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
            divergences.extend((np.exp(odds[0]) * (odds[0] - odds[1])).sum(axis=1))
        wanted.append(np.mean(divergences))
    np.testing.assert_allclose(found.divergence, np.maximum.accumulate(wanted), rtol=2e-3, atol=1e-8)
    assert found.divergence[1] < found.divergence[3], "nobody reads the last layer's attention in the bulk"


def test_short_pieces_do_not_tell_what_windows_cost(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    """All of them is head, tail and what is judged, so that windows would seem to cost nothing."""
    assert measure_windows(open_model(tiny(), n_ctx=512), [tokens(100), tokens(255)]) is None


@pytest.mark.parametrize(("name", "layers"), [("gemma3", (1,)), ("mamba", None)])
def test_what_cannot_be_windowed_has_no_part_in_it(
    name: str, layers: tuple[int, ...] | None, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    found = measure_windows(open_model(tiny(name), n_ctx=512), [tokens(256)])
    assert (None if found is None else found.layers) == layers


def test_of_a_long_piece_the_last_48_tokens_are_judged(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    llm = open_model(tiny(), n_ctx=256)
    profile = calibrated(llm, [tokens(40)], divergence=False)
    piece = tokens(240, 3)
    found, wanted = measure_divergence(llm, profile, [piece]), expected(tiny(), profile, [piece])
    assert N_BEHIND == 48
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6 * wanted.max())


def test_a_sublayer_that_does_nothing_costs_nothing(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    llm = open_model(tiny(zero=[(0, "attention"), (1, "ffn")]))
    profile = calibrated(llm, [tokens(40, seed) for seed in range(4)])
    assert profile.divergence is not None
    assert profile.divergence[0, 0] < 1e-9 and profile.divergence[1, 1] < 1e-9
    assert min(profile.divergence[0, 1], profile.divergence[1, 0]) > 1e-6


@pytest.mark.parametrize("name", ["jamba", "lfm2", "gemma4-per-layer"])
def test_where_a_sublayer_cannot_be_skipped_there_is_no_figure(
    name: str, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    llm = open_model(tiny(name))
    profile = calibrated(llm, [tokens(40, seed) for seed in range(4)])
    assert profile.divergence is not None
    may = np.reshape([row.in_bulk for row in llm.sublayers], (llm.n_layer, 2))
    np.testing.assert_array_equal(np.isnan(profile.divergence), ~may)
    assert (profile.divergence[may] >= 0).all()


def test_calibration_measures_it_on_its_last_requests(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    llm, requests = open_model(tiny()), [tokens(40, seed) for seed in range(5)]
    profile = calibrated(llm, requests)
    wanted = expected(tiny(), profile, requests[-1:])
    assert profile.divergence is not None
    np.testing.assert_allclose(profile.divergence, wanted, rtol=1e-3, atol=1e-6 * wanted.max())


def test_all_requests_have_a_part_in_the_statistics_and_those_not_judged_in_the_maps() -> None:
    requests = [np.random.default_rng(seed).integers(2, 300, 40).tolist() for seed in range(5)]
    profile = calibrated(FakeLlama(), requests)
    whole, fewer = (calibrated(FakeLlama(), each, divergence=False) for each in (requests, requests[:-1]))
    assert profile.prefill == whole.prefill and profile.decode == whole.decode
    assert fewer.maps is not None and profile.maps is not None and whole.maps is not None
    # Those of layers, as the scales of the others are figures of the statistics.
    np.testing.assert_array_equal(profile.maps.up[:, WHOLE], fewer.maps.up[:, WHOLE])
    np.testing.assert_array_equal(profile.maps.down[:, WHOLE], fewer.maps.down[:, WHOLE])
    assert not np.array_equal(profile.maps.up[:, WHOLE], whole.maps.up[:, WHOLE])


@pytest.mark.parametrize(("n_requests", "n_pieces"), [(1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (12, 3), (40, 3)])
def test_one_request_in_four_is_judged_and_three_at_most(
    n_requests: int, n_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def measure(llm: Any, profile: Profile, pieces: Any, on_progress: Any) -> Any:
        seen.append(pieces)
        return np.zeros((3, 2))

    monkeypatch.setattr("adaskip_cpp.calibration.calibrate.measure_divergence", measure)
    requests = [[5 + index, 6, 7] for index in range(n_requests)]
    profile = calibrated(FakeLlama(), requests)
    assert seen == ([requests[n_requests - n_pieces :]] if n_pieces else [])
    assert (profile.divergence is None) == (n_pieces == 0)


def test_requests_of_one_token_have_nothing_behind_a_prompt() -> None:
    assert calibrated(FakeLlama(), [[5], [6], [7], [8]]).divergence is None


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, LookupError])
def test_the_models_plan_and_draft_are_back_afterwards(
    error: type[BaseException] | None, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    llm = open_model(tiny())
    profile = calibrated(llm, [tokens(40)], divergence=False)
    plan, draft = SkipPlan.manual(3, ffn=[1]), object()
    llm.set_plan(plan)
    llm.draft_model = draft
    told: list[float] = []

    def on_progress(fraction: float) -> None:
        told.append(fraction)
        if error is not None and len(told) == 2:
            raise error

    if error is None:
        assert np.isfinite(measure_divergence(llm, profile, [tokens(20)], on_progress=on_progress)).all()
        np.testing.assert_allclose(told, np.arange(1, 7) / 6)
    else:
        with pytest.raises(error):
            measure_divergence(llm, profile, [tokens(20)], on_progress=on_progress)
    assert llm.plan == plan and llm.draft_model is draft and llm.n_tokens == 0
    llm.draft_model = None
    llm.eval(tokens(20))


def test_without_maps_what_is_measured_is_what_stands_in_then(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    llm, piece = open_model(tiny()), tokens(40, 9)
    profile = calibrated(llm, [tokens(40)], divergence=False, rank=0)
    found = measure_divergence(llm, profile, [piece])
    assert profile.prefill.mean_u is not None and profile.prefill.mean_v is not None
    ratio = profile.median_ratio
    parts = {"scale": ratio, "bias": profile.prefill.mean_v - ratio[..., None] * profile.prefill.mean_u}
    model, skip = ReferenceModel(tiny()), np.zeros((3, 2), bool)
    skip[0, 1] = True
    p, q = behind(model, piece, 10), behind(model, piece, 10, skip, **parts)
    assert found[0, 1] == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-3)
