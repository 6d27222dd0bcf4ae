"""``adaskip-cpp plot``: the files it writes, and what they show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.command_line import fails, run
from oracles.frontiers import frontier, point
from oracles.profiles import profile, statistics

from adaskip_cpp import Frontier, SkipPlan
from adaskip_cpp.model.frontier import GROWTH
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.pictures import profile_plots

pytest.importorskip("matplotlib")


def found() -> Frontier:
    mild, strong = (SkipPlan.manual(3, ffn=ffn, phase="bulk") for ffn in ([1], [1, 2]))
    return frontier([point(mild, 0.01, {2048: 1.25, 8192: 1.6}), point(strong, 0.04, {2048: 2.0, 8192: 8.0})])


def test_a_profile_and_a_frontier_are_drawn_in_two_files_each_which_are_named(
    profile_path: Path, tmp_path: Path
) -> None:
    save_plan(tmp_path / "a.adaskip-plan.json", found())
    for path, name in ((profile_path, "similarity"), (tmp_path / "a.adaskip-plan.json", "frontier")):
        told = run("plot", path, "-o", tmp_path / name).stdout.split()
        files = {str(tmp_path / name / f"{name}.{form}") for form in ("png", "svg")}
        assert {*told} == {*map(str, (tmp_path / name).iterdir())} == files
    save_plan(tmp_path / "one.json", SkipPlan.manual(3, ffn=[1]))
    assert "has no frontier" in fails("plot", tmp_path / "one.json", "-o", tmp_path / "out", code=2)


def test_the_lines_show_the_profiles_figures() -> None:
    prefill, decode = np.random.default_rng(4).uniform(0.3, 1, (2, 4, 2))
    shown = profile(prefill, decode=statistics(decode))
    axes = profile_plots.similarity(shown).axes
    for name in ("prefill", "decode"):
        phase = getattr(shown, name)
        for each, values in zip(
            axes, (phase.layer_similarity, phase.similarity[:, 0], phase.similarity[:, 1]), strict=True
        ):
            (curve,) = [line for line in each.lines if line.get_label() == name]
            np.testing.assert_array_equal(curve.get_xdata(), range(4))
            np.testing.assert_array_equal(curve.get_ydata(), values)


@pytest.mark.parametrize("extreme", [[[1.0, 1.0]], [[-0.9, 0.999999], [0.5, float("nan")]]])
def test_every_similarity_lies_within_the_axes(extreme: list[list[float]]) -> None:
    similarity = np.array(extreme)
    axes = profile_plots.similarity(profile(similarity)).axes[0]
    low, high = axes.get_ylim()
    assert low <= np.nanmin(similarity) and min(np.nanmax(similarity), 1 - 1e-4) <= high
    assert len(axes.get_yticks()) >= 2


def test_the_curves_begin_at_the_whole_model_and_show_time_and_loss_of_each_plan() -> None:
    (axes,) = profile_plots.losses(found()).axes
    curves: dict[str, Any] = {str(each.get_label()): np.asarray(each.get_xydata()).tolist() for each in axes.lines}
    assert curves["prompts of 2,048 tokens"] == [[1, 0], [1 / 1.25, 0.01], [0.5, 0.04]]
    # Prompts four times as long as those that were judged count as two doublings.
    expected: Any = [[1, 0], [1 / 1.6, 0.01 * GROWTH**2], [1 / 8, 0.04 * GROWTH**2]]
    np.testing.assert_allclose(curves["prompts of 8,192 tokens"], expected)
    assert "prompts of 32,768 tokens" not in curves, "no speed is predicted for these"
    assert max(axes.get_xlim()) >= 1 and min(axes.get_xlim()) <= 1 / 8, "all within the axes"
    assert len(profile_plots.losses(frontier([])).axes) == 1


def test_a_curve_leaves_out_plans_that_lose_more_than_a_faster_one_at_its_length() -> None:
    plans = [SkipPlan.manual(3, ffn=ffn, phase="bulk") for ffn in ([0], [1], [1, 2])]
    speeds: Any = {2048: 1.25, 8192: 2.0}, {2048: 2.0, 8192: 1.6}, {2048: 0.8, 8192: 0.5}
    points = [point(plan, loss, each) for plan, loss, each in zip(plans, (0.01, 0.04, 0.02), speeds, strict=True)]
    (axes,) = profile_plots.losses(frontier(points)).axes
    curves: dict[str, Any] = {str(each.get_label()): np.asarray(each.get_xydata()).tolist() for each in axes.lines}
    assert curves["prompts of 2,048 tokens"] == [[1, 0], [0.8, 0.01], [0.5, 0.04]]
    np.testing.assert_allclose(curves["prompts of 8,192 tokens"], [[1, 0], [0.5, 0.01 * GROWTH**2]])
