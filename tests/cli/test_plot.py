"""``adaskip-cpp plot``: the files it writes, what they show, and the terminal's version."""

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
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.skip_set import SkipSet
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
    """``plot(...)``: the verb, with profiles of 3 and of 5 layers as small.adaskip.json and large.adaskip.json."""
    make(3).save(tmp_path / "small.adaskip.json")
    make(5, "cd").save(tmp_path / "large.adaskip.json")

    def run(*args: object) -> Result:
        words = [str(tmp_path / arg) if str(arg).endswith(".json") else str(arg) for arg in args]
        return CliRunner().invoke(main, ["plot", *words, "--compensation", "median"], prog_name="adaskip-cpp")

    return run


def test_it_writes_every_figure_twice_and_names_the_files(plot: Callable[..., Result], tmp_path: Path) -> None:
    result = plot("small.adaskip.json", "-o", tmp_path / "out", "--skip", 2)
    assert result.exit_code == 0, result.output
    names = {f"{name}.{form}" for name in ("layers", "sublayers", "phases", "plan") for form in ("png", "svg")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert [Path(line).name for line in result.stdout.split()] and set(result.stdout.split()) == {
        str(tmp_path / "out" / name) for name in names
    }


def test_several_profiles_share_pictures_and_have_a_plan_each(plot: Callable[..., Result], tmp_path: Path) -> None:
    result = plot("small.adaskip.json", "large.adaskip.json", "-o", tmp_path / "out", "--skip", 1)
    assert result.exit_code == 0, result.output
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"layers", "sublayers", "phases", "plan-1", "plan-2"}


def test_the_lines_show_the_profiles_figures() -> None:
    profile = make(4)
    (axes,) = profile_plots.layers({"a": profile}).axes
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), range(4))
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), profile.prefill.layer_similarity)
    (axes,) = profile_plots.sublayers({"a": profile}).axes
    for line, column, name in zip(axes.lines, (0, 1), ("attention", "FFN"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), profile.similarity[:, column])
        assert line.get_label() == name
    attention, ffn = profile_plots.phases({"a": profile}).axes
    np.testing.assert_array_equal(attention.lines[1].get_ydata(), profile.decode.similarity[:, 0])
    np.testing.assert_array_equal(ffn.lines[0].get_ydata(), profile.prefill.similarity[:, 1])


def test_models_of_different_depth_are_drawn_from_first_to_last_layer() -> None:
    (axes,) = profile_plots.layers({"a": make(3), "b": make(5)}).axes
    assert [line.get_xdata()[[0, -1]].tolist() for line in axes.lines] == [[0, 1], [0, 1]]
    assert axes.get_xlabel() == "depth: layer / last layer"


@pytest.mark.parametrize("extreme", [[[1.0, 1.0]], [[-0.9, 0.999999], [0.5, 0.2]], [[0.5, float("nan")], [0.2, 0.1]]])
def test_every_similarity_lies_within_the_axes(extreme: list[list[float]], tmp_path: Path) -> None:
    similarity = np.array(extreme)
    ones = np.where(np.isnan(similarity), np.nan, 1.0)
    phase = PhaseStatistics(similarity, ones, ones, similarity[:, 0], *vectors(len(similarity)), 10)
    profile = Profile(phase, phase, 1, 10, ModelInfo("ab" * 32, "llama", len(extreme)))
    (axes,) = profile_plots.sublayers({"a": profile}).axes
    low, high = axes.get_ylim()
    assert low <= np.nanmin(similarity) and min(np.nanmax(similarity), 1 - 1e-4) <= high
    assert len(axes.get_yticks()) >= 2


def test_the_strip_fills_what_is_skipped_and_hatches_what_only_decode_skips() -> None:
    plan = SkipPlan.manual(4, attention=[1], ffn=[2])
    (axes,) = profile_plots.plan_strip("a", plan).axes
    filled = [(round(p.get_x() + 0.42), int(p.get_y())) for p in axes.patches if p.get_facecolor()[3] > 0]
    assert filled == [(1, 0), (2, 1)]
    decode = SkipPlan.manual(4, attention=[1], ffn=[2], phase="decode")
    (axes,) = profile_plots.plan_strip("a", decode).axes
    assert [(round(p.get_x() + 0.42), int(p.get_y())) for p in axes.patches if p.get_hatch()] == [(1, 0), (2, 1)]


def test_the_strip_of_a_bulk_fills_what_that_skips_and_hatches_what_decode_does() -> None:
    none, bulk = SkipSet.none(4), SkipPlan.manual(4, attention=[2], ffn=[2, 3]).prefill
    plan = SkipPlan(none, SkipPlan.manual(4, attention=[1], ffn=[3]).prefill, bulk=Bulk(bulk))
    (axes,) = profile_plots.plan_strip("a", plan).axes
    at = {(round(p.get_x() + 0.42), int(p.get_y())): p for p in axes.patches}
    assert [where for where, p in at.items() if p.get_facecolor()[3] > 0] == [(2, 0), (2, 1), (3, 1)]
    assert [where for where, p in at.items() if p.get_hatch()] == [(1, 0), (3, 1)]
    assert axes.get_title(loc="left") == "a: 3 (decode 2) of 8 sublayers skipped"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["skipped in the bulk", "in decode"]


def test_the_bulk_is_drawn_and_marked_in_the_terminal(plot: Callable[..., Result], tmp_path: Path) -> None:
    args = ("small.adaskip.json", "--mode", "prompt", "--strategy", "suffix", "--skip", 2)
    drawn = plot(*args, "-o", tmp_path / "out")
    assert drawn.exit_code == 0 and (tmp_path / "out" / "plan.png").exists(), drawn.output
    rows = [line for line in plot(*args, "--terminal").stdout.splitlines() if line.startswith(("attention  ", "FFN  "))]
    assert [row.rstrip().endswith("x") and row.count("x") for row in rows if "to" not in row] == [1, 1]


def test_the_terminal_shows_the_same_without_a_folder(plot: Callable[..., Result]) -> None:
    result = plot("small.adaskip.json", "--terminal", "--skip", 2)
    assert result.exit_code == 0, result.output
    for words in ("small", "whole layers, prefill", "attention, decode", "FFN, prefill", "x skipped"):
        assert words in result.stdout


def test_without_matplotlib_it_prints_and_says_what_to_install(
    plot: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = plot("small.adaskip.json", "-o", tmp_path / "out", "--skip", 2)
    assert result.exit_code == 0, result.output
    assert "attention, decode" in result.stdout
    assert 'pip install "adaskip-cpp[plot]"' in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_pictures_need_a_folder(plot: Callable[..., Result]) -> None:
    result = plot("small.adaskip.json", "--skip", 2)
    assert result.exit_code == 2 and "-o" in result.output


def test_a_missing_profile_is_one_line_and_writes_nothing(plot: Callable[..., Result], tmp_path: Path) -> None:
    result = plot("small.adaskip.json", "nope.json", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "no profile" in str(result.exception or "") + result.output
    assert not (tmp_path / "out").exists()


# -- frontiers -------------------------------------------------------------------------------------------------------


def found(n_layer: int = 3) -> Frontier:
    mild, strong = (SkipPlan.manual(n_layer, ffn=ffn, phase="bulk") for ffn in ([1], [1, 2]))
    return frontier([point(mild, 0.01, {2048: 1.25, 8192: 1.6}), point(strong, 0.04, {2048: 2.0, 8192: 2.5})])


@pytest.fixture
def frontiers(tmp_path: Path) -> None:
    save_plan(tmp_path / "a.adaskip-plan.json", found())
    save_plan(tmp_path / "b.adaskip-plan.json", found(5))
    save_plan(tmp_path / "one.json", SkipPlan.manual(3, ffn=[1]))


@pytest.mark.usefixtures("frontiers")
@pytest.mark.parametrize("names", [["a.adaskip-plan.json"], ["a.adaskip-plan.json", "b.adaskip-plan.json"]])
def test_frontiers_are_drawn_into_one_picture(names: list[str], plot: Callable[..., Result], tmp_path: Path) -> None:
    result = plot(*names, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"frontier.png", "frontier.svg"}
    assert set(result.stdout.split()) == {str(tmp_path / "out" / f"frontier.{form}") for form in ("png", "svg")}


@pytest.mark.usefixtures("frontiers")
def test_the_terminal_shows_a_frontier_without_a_folder(plot: Callable[..., Result]) -> None:
    result = plot("a.adaskip-plan.json", "--terminal")
    assert result.exit_code == 0 and "Plans, judged after prompts of 2,048 tokens" in result.stdout


@pytest.mark.usefixtures("frontiers")
def test_a_frontier_needs_a_folder_too(plot: Callable[..., Result]) -> None:
    result = plot("a.adaskip-plan.json")
    assert result.exit_code == 2 and "-o" in result.stderr


@pytest.mark.usefixtures("frontiers")
@pytest.mark.parametrize(
    ("other", "words"),
    [("small.adaskip.json", "small.adaskip.json has no frontier"), ("one.json", "one.json has no frontier")],
)
def test_a_frontier_beside_what_is_none_is_a_usage_error(other: str, words: str, plot: Callable[..., Result]) -> None:
    result = plot("a.adaskip-plan.json", other, "--terminal")
    assert result.exit_code == 2 and words in result.stderr


def test_the_curves_begin_at_the_whole_model_and_show_time_and_loss_of_each_plan() -> None:
    (axes,) = profile_plots.frontiers({"a": found()}).axes
    curves = {str(line.get_label()): line.get_xydata().tolist() for line in axes.lines}
    assert curves["prompts of 2,048 tokens"] == [[1, 0], [1 / 1.25, 0.01], [0.5, 0.04]]
    # Prompts four times as long as those that were judged count as two doublings.
    expected = [[1, 0], [1 / 1.6, 0.01 * GROWTH**2], [1 / 2.5, 0.04 * GROWTH**2]]
    np.testing.assert_allclose(curves["prompts of 8,192 tokens"], expected)
    low, high = sorted(axes.get_xlim())
    assert all(low <= x <= high for name, curve in curves.items() if "prompts" in name for x, _ in curve)


def test_a_frontier_of_a_very_fast_plan_lies_within_the_axes() -> None:
    plan = SkipPlan.manual(3, ffn=[1], phase="bulk")
    (axes,) = profile_plots.frontiers({"a": frontier([point(plan, 0.01, {2048: 8.0})])}).axes
    assert min(axes.get_xlim()) <= 1 / 8


def test_a_frontier_without_plans_is_drawn_too() -> None:
    assert len(profile_plots.frontiers({"a": frontier([])}).axes) == 1
