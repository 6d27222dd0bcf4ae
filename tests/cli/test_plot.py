"""``adaskip-cpp plot``: the files it writes, and what they show."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from oracles.frontiers import frontier, point

from adaskip_cpp import Frontier, Profile, SkipPlan
from adaskip_cpp.cli.main import main
from adaskip_cpp.model.frontier import GROWTH
from adaskip_cpp.model.identity import ModelInfo
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.statistics import PhaseStatistics
from adaskip_cpp.pictures import profile_plots

pytest.importorskip("matplotlib")


def vectors(n_layer: int) -> np.ndarray:
    return np.zeros((2, n_layer, 2, 4), np.float32)


def make(n_layer: int, fingerprint: str = "ab") -> Profile:
    rng = np.random.default_rng(n_layer)
    ones = np.ones((n_layer, 2))

    def phase() -> PhaseStatistics:
        return PhaseStatistics(
            rng.uniform(0.3, 1, (n_layer, 2)), ones, ones, rng.uniform(0, 1, n_layer), *vectors(n_layer), 10
        )

    prefill, known = phase(), ModelInfo(fingerprint * 32, "llama", n_layer)
    lost = 1 - prefill.similarity
    return Profile(prefill, phase(), 1, 10, known, divergence=lost, copying=lost)


@pytest.fixture
def plot(tmp_path: Path) -> Callable[..., Result]:
    """``plot(...)``: the verb, with a profile of 3 layers as small.adaskip.json."""
    make(3).save(tmp_path / "small.adaskip.json")

    def run(*args: object) -> Result:
        words = [str(tmp_path / arg) if str(arg).endswith(".json") else str(arg) for arg in args]
        return CliRunner().invoke(main, ["plot", *words], prog_name="adaskip-cpp")

    return run


def test_it_writes_the_picture_twice_and_names_the_files(plot: Callable[..., Result], tmp_path: Path) -> None:
    result = plot("small.adaskip.json", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    names = {"similarity.png", "similarity.svg"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert set(result.stdout.split()) == {str(tmp_path / "out" / name) for name in names}


def test_the_lines_show_the_profiles_figures() -> None:
    profile = make(4)
    layers, attention, ffn = profile_plots.similarity(profile).axes
    for axes, of_phase in (
        (layers, lambda phase: phase.layer_similarity),
        (attention, lambda phase: phase.similarity[:, 0]),
        (ffn, lambda phase: phase.similarity[:, 1]),
    ):
        for line, name in zip(axes.lines, ("prefill", "decode"), strict=True):
            assert line.get_label() == name
            np.testing.assert_array_equal(line.get_xdata(), range(4))
            np.testing.assert_array_equal(line.get_ydata(), of_phase(getattr(profile, name)))


@pytest.mark.parametrize("extreme", [[[1.0, 1.0]], [[-0.9, 0.999999], [0.5, 0.2]], [[0.5, float("nan")], [0.2, 0.1]]])
def test_every_similarity_lies_within_the_axes(extreme: list[list[float]]) -> None:
    similarity = np.array(extreme)
    ones = np.where(np.isnan(similarity), np.nan, 1.0)
    phase = PhaseStatistics(similarity, ones, ones, similarity[:, 0], *vectors(len(similarity)), 10)
    profile = Profile(phase, phase, 1, 10, ModelInfo("ab" * 32, "llama", len(extreme)))
    axes = profile_plots.similarity(profile).axes[0]
    low, high = axes.get_ylim()
    assert low <= np.nanmin(similarity) and min(np.nanmax(similarity), 1 - 1e-4) <= high
    assert len(axes.get_yticks()) >= 2


def test_without_matplotlib_it_says_what_to_install(
    plot: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = plot("small.adaskip.json", "-o", tmp_path / "out")
    assert result.exit_code == 1 and 'pip install "adaskip-cpp[plot]"' in result.stderr
    assert not (tmp_path / "out").exists()


def test_pictures_need_a_folder(plot: Callable[..., Result]) -> None:
    result = plot("small.adaskip.json")
    assert result.exit_code == 2 and "-o" in result.output


def test_a_missing_profile_is_one_line_and_writes_nothing(plot: Callable[..., Result], tmp_path: Path) -> None:
    result = plot("nope.json", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "no profile" in result.output
    assert not (tmp_path / "out").exists()


# -- a frontier ------------------------------------------------------------------------------------------------------


def found() -> Frontier:
    mild, strong = (SkipPlan.manual(3, ffn=ffn, phase="bulk") for ffn in ([1], [1, 2]))
    return frontier([point(mild, 0.01, {2048: 1.25, 8192: 1.6}), point(strong, 0.04, {2048: 2.0, 8192: 2.5})])


def test_a_frontier_is_drawn(plot: Callable[..., Result], tmp_path: Path) -> None:
    save_plan(tmp_path / "a.adaskip-plan.json", found())
    result = plot("a.adaskip-plan.json", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"frontier.png", "frontier.svg"}


def test_a_plan_without_a_frontier_is_a_usage_error(plot: Callable[..., Result], tmp_path: Path) -> None:
    save_plan(tmp_path / "one.json", SkipPlan.manual(3, ffn=[1]))
    result = plot("one.json", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "one.json has no frontier" in result.stderr


def test_the_curves_begin_at_the_whole_model_and_show_time_and_loss_of_each_plan() -> None:
    (axes,) = profile_plots.losses(found()).axes
    curves = {str(line.get_label()): line.get_xydata().tolist() for line in axes.lines}
    assert curves["prompts of 2,048 tokens"] == [[1, 0], [1 / 1.25, 0.01], [0.5, 0.04]]
    # Prompts four times as long as those that were judged count as two doublings.
    expected = [[1, 0], [1 / 1.6, 0.01 * GROWTH**2], [1 / 2.5, 0.04 * GROWTH**2]]
    np.testing.assert_allclose(curves["prompts of 8,192 tokens"], expected)
    low, high = sorted(axes.get_xlim())
    assert all(low <= x <= high for name, curve in curves.items() if "prompts" in name for x, _ in curve)


def test_a_frontier_of_a_very_fast_plan_lies_within_the_axes() -> None:
    plan = SkipPlan.manual(3, ffn=[1], phase="bulk")
    (axes,) = profile_plots.losses(frontier([point(plan, 0.01, {2048: 8.0})])).axes
    assert min(axes.get_xlim()) <= 1 / 8


def test_a_frontier_without_plans_is_drawn_too() -> None:
    assert len(profile_plots.losses(frontier([])).axes) == 1
