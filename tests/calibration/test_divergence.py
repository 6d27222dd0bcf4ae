"""adaskip_cpp.calibration.divergence: what skipping each sublayer in the bulk costs, against NumPy passes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracles.expected import log_probabilities
from oracles.fake_llama import FakeLlama
from oracles.fixtures import Open, Tiny
from oracles.reference import ReferenceModel, ReferenceRun, Windows
from oracles.tiny_families import tokens

import adaskip_cpp
from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.calibration.divergence import N_ANSWER, N_PROMPT, measure_divergence, measure_windows
from adaskip_cpp.model.statistics import WHOLE, map_scale

HEAD = 4  # tokens that every plan runs whole by default; of the measurement's own prompts the last one does too


def calibrated(llm: Any, requests: Any, **options: Any) -> Profile:
    return adaskip_cpp.calibrate(llm, requests, **{"n_decode": 2, "cost": False, "rank": 4, **options})


def odds(model: ReferenceModel, prompt: Sequence[int], answer: Sequence[int], **bulk: Any) -> Any:
    """Logarithms of probabilities after an answer's tokens but the last, float64; the bulk of the prompt skips."""
    run, end = ReferenceRun(model), max(len(prompt) - 1, 0)
    run.eval(prompt[: min(HEAD, end)])
    if end > HEAD:
        run.eval(prompt[HEAD:end], **bulk, keeps_kv=True)
    run.eval(prompt[end:])
    return log_probabilities(run.eval(answer[:-1]).logits)


def answers(piece: Sequence[int]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The prompt of a piece, what continues it, and its copy from a quarter on; none of too few tokens to judge."""
    n = max(2, min(48, len(piece) // 4))
    end = len(piece) - n
    return piece[:end], piece[end:], piece[end // 4 : end // 4 + n] if n > 16 else []


def of_one(path: Path, profile: Profile, piece: Sequence[int]) -> npt.NDArray[np.float64]:
    """The sum of p log(p / q) at each judged token, ``[2, n_layer, 2, n]``, every sublayer alone."""
    model, maps = ReferenceModel(path), profile.maps
    mapped = np.zeros((model.n_layer, 2), bool) if maps is None else maps.fitted[:, :2]
    statistics = profile.prefill
    assert statistics.mean_u is not None and statistics.mean_v is not None
    scale = np.where(mapped, map_scale(statistics.median_ratio), statistics.median_ratio)
    bias = statistics.mean_v - statistics.median_ratio[..., None] * statistics.mean_u
    bias[mapped] = 0.0
    parts: dict[str, Any] = {"scale": scale, "bias": bias}
    if maps is not None:
        parts |= {name: np.nan_to_num(getattr(maps, name)[:, :2]) for name in ("down", "up")}
    prompt, *both = answers(piece)
    found = []
    for answer, n_cue in zip(both, (1, 8), strict=True):
        rows = []
        for at in np.ndindex(mapped.shape) if answer else ():
            skip = np.zeros(mapped.shape, bool)
            skip[at] = True
            p, q = odds(model, prompt, answer), odds(model, prompt, answer, skip=skip, **parts)
            rows.append((np.exp(p) * (p - q)).sum(axis=1)[n_cue - 1 :])
        found.append(np.reshape(rows, (*mapped.shape, -1)) if rows else None)
    return [found[0], found[0] if found[1] is None else found[1]]  # type: ignore[return-value]


def expected(path: Path, profile: Profile, pieces: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """Means over tokens of the first piece, and over pieces of the half of all sublayers that costs less there."""
    first = np.array([each.mean(axis=2) for each in of_one(path, profile, pieces[0])])
    if len(pieces) == 1:
        return first
    others = [of_one(path, profile, piece) for piece in pieces[1:]]
    copies = [each[1] for each in others if each[0] is not each[1]] or [each[0] for each in others]
    rest = [np.concatenate(kind, axis=2).mean(axis=2) for kind in ([each[0] for each in others], copies)]
    every = (first + len(others) * np.array(rest)) / len(pieces)
    worse = first.max(axis=0)
    return np.where(worse <= np.sort(worse, axis=None)[worse.size // 2 - 1], every, first)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("lengths", "rank"),
    [((40,), 4), ((90,), 4), ((72, 100, 7), 4), ((N_PROMPT + N_ANSWER,), 4), ((80,), 0)],
    ids=["no copy", "one piece", "three pieces", "a long piece's answer has 48 tokens", "no maps"],
)
def test_each_figure_is_the_mean_divergence_of_an_answers_tokens(
    name: str, lengths: tuple[int, ...], rank: int, tiny: Tiny, open_tiny: Open
) -> None:
    # The GELU of Gemma is a table in F16, which is as far off as is written in test_bulk.py.
    llm = open_tiny(name, logits_all=False, n_ctx=256)
    profile = calibrated(llm, [tokens(40, seed) for seed in range(3)], n_judged=0, rank=rank)
    assert profile.divergence is None and profile.copying is None
    assert (N_PROMPT, N_ANSWER) == (192, 48) and (profile.maps is None) == (rank == 0)
    pieces = [tokens(n, seed) for seed, n in enumerate(lengths, 10)]
    found, wanted = measure_divergence(llm, profile, pieces), expected(tiny(name), profile, pieces)
    np.testing.assert_allclose(found, wanted, rtol=2e-2 if name == "gemma3" else 1e-3, atol=1e-6 * wanted.max())
    assert (wanted[:, :-1] > 0).all() or name == "gemma3", "whose layer 1 looks back at 8 tokens alone"
    assert not found[0][-1].any() and not found[1][-1].any(), "nobody reads what the last layer makes of a bulk"
    assert np.array_equal(*found) is (lengths == (40,)), "of a piece too short to copy from all answers are continued"


def test_windows_cost_what_the_reference_says(open_tiny: Open, numpy_model: Open) -> None:
    """An eighth of the shortest piece, between a head of 4 and a tail of 64; of no attention, one, two and all."""
    pieces = [tokens(300, 10), tokens(256, 11), tokens(255, 12)]  # the last is too short
    found = measure_windows(open_tiny(n_ctx=512), pieces)
    assert found is not None and found.layers == (0, 1, 2)
    model, wanted = numpy_model(), []
    for n in range(4):
        divergences = []
        for piece in pieces[:2]:
            after_n, odds = min(48, len(piece) // 4), []
            for layers in ((), (0, 1, 2)[3 - n :]):
                run, end = ReferenceRun(model), len(piece) - after_n
                run.eval(piece[:4])
                run.eval(piece[4 : end - 64], windows=Windows(layers, 256 // 8, 4))
                run.eval(piece[end - 64 : end])
                odds.append(log_probabilities(run.eval(piece[end:-1]).logits))
            divergences.extend((np.exp(odds[0]) * (odds[0] - odds[1])).sum(axis=1))
        wanted.append(np.mean(divergences))
    np.testing.assert_allclose(found.divergence, np.maximum.accumulate(wanted), rtol=2e-3, atol=1e-8)
    assert found.divergence[1] < found.divergence[3], "nobody reads the last layer's attention in the bulk"


@pytest.mark.parametrize("name, n, layers", [("gemma3", 256, (1,)), ("mamba", 256, None), ("llama", 255, None)])
def test_what_cannot_be_windowed_has_no_part_in_it_and_short_pieces_do_not_tell(
    name: str, n: int, layers: Any, open_tiny: Open
) -> None:
    """All of a short piece is head, tail and what is judged, so that windows would seem to cost nothing."""
    found = measure_windows(open_tiny(name, n_ctx=512), [tokens(100), tokens(n)])
    assert (None if found is None else found.layers) == layers


@pytest.mark.parametrize("name", ["jamba", "lfm2", "gemma4-per-layer"])
def test_where_a_sublayer_cannot_be_skipped_or_is_early_there_is_no_figure(name: str, open_tiny: Open) -> None:
    llm = open_tiny(name)
    profile = calibrated(llm, [tokens(80, seed) for seed in range(4)])
    may = np.reshape([row.in_bulk for row in llm.sublayers], (llm.n_layer, 2))
    may[: llm.n_layer // 3] = False
    for lost in (profile.divergence, profile.copying):
        assert lost is not None
        np.testing.assert_array_equal(np.isnan(lost), ~may)
        assert (lost[may] >= 0).all()


def test_all_requests_have_a_part_in_the_statistics_and_those_not_judged_in_the_maps() -> None:
    requests = [np.random.default_rng(seed).integers(2, 300, 40).tolist() for seed in range(5)]
    profile = calibrated(FakeLlama(), requests)
    whole, fewer = (calibrated(FakeLlama(), each, n_judged=0) for each in (requests, requests[:-1]))
    assert profile.prefill == whole.prefill and profile.decode == whole.decode
    assert fewer.maps is not None and profile.maps is not None and whole.maps is not None
    # Those of layers, as the scales of the others are figures of the statistics.
    np.testing.assert_array_equal(profile.maps.up[:, WHOLE], fewer.maps.up[:, WHOLE])
    np.testing.assert_array_equal(profile.maps.down[:, WHOLE], fewer.maps.down[:, WHOLE])
    assert not np.array_equal(profile.maps.up[:, WHOLE], whole.maps.up[:, WHOLE])


@pytest.mark.parametrize(
    ("n_requests", "given", "n_pieces"),
    [(1, {}, 0), (3, {}, 0), (4, {}, 1), (7, {}, 1), (8, {}, 2), (12, {}, 3), (40, {}, 3), (40, {"n_judged": 5}, 5)],
)
def test_one_request_in_four_is_judged_from_the_end_and_three_at_most_by_default(
    n_requests: int, given: Any, n_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def measure(llm: Any, profile: Profile, pieces: Any, layers: Any, on_progress: Any) -> Any:
        seen.append((pieces, layers))
        return np.full((3, 2), 0.5), np.full((3, 2), 0.25)

    monkeypatch.setattr("adaskip_cpp.calibration.calibrate.measure_divergence", measure)
    requests = [[5 + index, 6, 7, 8] for index in range(n_requests)]
    profile = calibrated(FakeLlama(), requests, **given)
    assert seen == ([(requests[n_requests - n_pieces :], range(1, 3))] if n_pieces else [])
    found = [None if each is None else each.max() for each in (profile.divergence, profile.copying)]
    assert found == ([0.5, 0.25] if n_pieces else [None, None])


def test_requests_of_three_tokens_have_no_prompt_and_answer() -> None:
    assert calibrated(FakeLlama(), [[5 + i, 6, 7] for i in range(4)]).divergence is None


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, LookupError])
def test_the_models_plan_and_draft_are_back_afterwards(error: type[BaseException] | None, open_tiny: Open) -> None:
    llm = open_tiny()
    profile = calibrated(llm, [tokens(40)], n_judged=0)
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
