"""adaskip_cpp.model.plan_file: what is stored, and what is refused."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from oracles.changed_json import LOST, change
from oracles.costs import SETTINGS
from oracles.fixtures import Tiny
from oracles.tiny_families import N_EMBD

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import PlanError, PlanFileError, ProfileMismatchError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.model.frontier import Frontier, Point, SpeedUp
from adaskip_cpp.model.identity import ModelInfo, plan_path
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.plan_file import frontier_beside, load_plan, save_plan
from adaskip_cpp.model.quality import Passkeys, Quality
from adaskip_cpp.model.settings import Settings, Tried
from adaskip_cpp.model.skip_set import SkipSet

NAN = float("nan")
OTHER_MODEL = ModelInfo("ab" * 32, "llama", 3)
RANK = 2


def skip_set(attention: tuple[int, ...] = (2,), ffn: tuple[int, ...] = (0, 1), **arrays: Any) -> SkipSet:
    """A set whose scale, and vectors where asked for, are numbers of no pattern; those of maps are BF16."""
    rng = np.random.default_rng(0)
    plan = SkipPlan.manual(3, attention, ffn, rng.uniform(0.5, 1.5, (3, 2)))
    drawn = {name: rng.normal(size=(3, 2, *shape)).astype(np.float32) for name, shape in arrays.items()}
    for name in drawn.keys() & MAPS.keys():
        drawn[name] = (drawn[name].view(np.uint32) & 0xFFFF0000).view(np.float32)
    return replace(plan.prefill, **drawn)


BIAS = {"bias": (N_EMBD,)}
MAPS = {"down": (RANK, N_EMBD), "up": (N_EMBD, RANK)}
NONE = SkipSet.none(3)


def one_map() -> SkipSet:
    """Two layers skipped whole, and of the second the FFN has a map that stands in for both of its sublayers."""
    chosen = skip_set((1, 2), (1, 2), **BIAS, **MAPS)
    assert chosen.down is not None and chosen.up is not None
    up = np.zeros_like(chosen.up)
    up[2, 1] = chosen.up[2, 1]
    return replace(chosen, up=up)


GROWN = skip_set(attention=(1, 2), **MAPS)
BULKS = ((skip_set((2,), (1,), **MAPS), ()), (one_map(), (0, 1)))


PLAN = SkipPlan(
    skip_set(**MAPS), skip_set(**MAPS), model=OTHER_MODEL, strategy="tuned", compensation="linear", mode="e2e"
)
"""A plan of maps, for a model that is nowhere."""


def quality(value: float) -> Quality:
    of = Interval(value, value / 2, 2 * value, 4)
    return Quality(
        of, value / 8, replace(of, value=-value), value / 16, Interval(0.75, 0.5, 1.0, 4), (0.5, 1.5), 4, 400
    )


def make_frontier() -> Frontier:
    """A frontier of two points, for that model."""
    settings, points = Settings(flash_attn=True, n_threads=2), []
    for i, (of, windowed) in enumerate(BULKS, start=1):
        plan = SkipPlan(NONE, NONE, bulk=Bulk(of, windowed=windowed), mode="prompt", model=OTHER_MODEL)
        kinds = quality(i / 32), quality(1 / 64), quality(1 / 128)
        points.append(Point(2048, *kinds, Passkeys(4, 3, 3), ((512, 1.125), (2048, 1.25 * i)), plan))
    return Frontier(
        tuple(points),
        settings,
        SETTINGS,
        (Tried(Settings(), 0.5, 0.75, 0.125, 3.0, True), Tried(settings, 0.25, math.inf, math.inf, math.inf, False)),
        (SpeedUp("both", 2048, Interval(1.25, 1.125, 1.5, 5), (2.5, 2.0)),),
        4321,
        {"judged_on": "some text", "n": 4, "share": 0.5, "cpu": None},
    )


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        SkipPlan.manual(3),
        SkipPlan.manual(3, attention=[1], ffn=[0, 2], scale=0.9),
        SkipPlan(skip_set(**BIAS), skip_set(**BIAS)),
        SkipPlan(skip_set(**BIAS, **MAPS), skip_set((0, 1, 2), (), **MAPS)),
        SkipPlan(NONE, skip_set(**BIAS), mode="decode", online=OnlineStage(7, 0.75, "median")),
        SkipPlan(NONE, skip_set(**MAPS), schedule=((0, skip_set(**MAPS)), (9, GROWN))),
        SkipPlan(NONE, NONE, bulk=Bulk(skip_set(**MAPS), head=0, tail=32), mode="prompt"),
        SkipPlan(NONE, skip_set((1,)), bulk=Bulk(GROWN), online=OnlineStage(7, 0.75, "median"), mode="prompt"),
        SkipPlan(NONE, NONE, bulk=Bulk(one_map()), mode="prompt"),
        SkipPlan(NONE, NONE, bulk=Bulk(NONE, windowed=(0, 2), window_size=764), mode="prompt"),
    ],
)
def test_every_plan_comes_back_as_it_was(plan: SkipPlan, tmp_path: Path) -> None:
    save_plan(tmp_path / "p.json", plan)
    found = load_plan(tmp_path / "p.json")
    assert found.plan == plan and found.frontier is None and found.plans == (plan,)


@pytest.mark.parametrize("low", [1.125, NAN])
@pytest.mark.parametrize("n_points", [2, 0])
def test_a_frontier_comes_back_as_it_was(low: float, n_points: int, tmp_path: Path) -> None:
    """By the representation of its figures, as NaN equals nothing; plans, whose maps that leaves out, by themselves."""
    speed, whole = SpeedUp("both", 2048, Interval(1.25, low, 1.5, 5), (2.5, 2.0)), make_frontier()
    frontier = replace(whole, speeds=(speed,), points=whole.points[:n_points])
    save_plan(tmp_path / "p.json", frontier)
    found = load_plan(tmp_path / "p.json")
    assert found.plan is None and found.frontier is not None and repr(found.frontier) == repr(frontier)
    assert found.plans == tuple(point.plan for point in frontier.points)


def test_plans_of_several_models_are_no_frontier(tmp_path: Path) -> None:
    first, second = make_frontier().points
    other = replace(second, plan=replace(second.plan, model=None))
    with pytest.raises(PlanError, match="of several models; tune again"):
        save_plan(tmp_path / "p.json", Frontier((first, other)))


def test_only_the_skipped_sublayers_and_the_maps_that_there_are_take_room(tmp_path: Path) -> None:
    save_plan(tmp_path / "p.json", PLAN)
    assert (tmp_path / "p.bin").stat().st_size == 3 * 2 * RANK * N_EMBD * 2  # of three sublayers, in both phases alike
    lines = [line.strip() for line in (tmp_path / "p.json").read_text().splitlines()]
    assert '"attention": [2],' in lines and '"ffn": [0, 1],' in lines
    save_plan(tmp_path / "p.json", SkipPlan(NONE, NONE, bulk=Bulk(one_map())))
    assert (tmp_path / "p.bin").stat().st_size == 4 * N_EMBD * 4 + 2 * RANK * N_EMBD * 2
    assert json.loads((tmp_path / "p.json").read_text())["plan"]["bulk"]["skip"]["up"]["rows"] == [5]
    (tmp_path / "without-vectors").mkdir()
    save_plan(tmp_path / "without-vectors" / "p.json", SkipPlan.manual(3, ffn=[1]))
    assert [path.name for path in (tmp_path / "without-vectors").iterdir()] == ["p.json"]


def test_the_vectors_lie_as_the_format_says(tmp_path: Path) -> None:
    chosen = skip_set((2,), (0,), **BIAS, **MAPS)
    save_plan(tmp_path / "p.json", SkipPlan(chosen, chosen))
    assert chosen.bias is not None and chosen.down is not None and chosen.up is not None
    parts = [array[where].ravel() for array in (chosen.bias, chosen.down, chosen.up) for where in ((0, 1), (2, 0))]
    content, n = (tmp_path / "p.bin").read_bytes(), 2 * N_EMBD * 4
    np.testing.assert_array_equal(np.frombuffer(content[:n], "<f4"), np.concatenate(parts[:2]))
    halves = np.frombuffer(content[n:], np.uint8)
    np.testing.assert_array_equal(dequantize(halves, GGMLQuantizationType.BF16), np.concatenate(parts[2:]))


# --- what is refused --------------------------------------------------------------------------------------------------


NOTHING = {"skip": {"attention": [], "ffn": [], "n_layer": 3}, "scale": [[1.0, 1.0]] * 3}
AROUND = {"head": 4, "tail": 64, "windowed": [], "window_size": 252}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((name, LOST) for name in ("format", "version", "plan", "vectors")),
        ("format", "adaskip-profile"),
        ("version", 5),
        ("plan", []),
        ("plan.mode", "both"),
        ("plan.model.n_layer", 0),
        ("plan.model.n_layer", 4),
        ("plan.bulk", AROUND),
        ("plan.bulk", {**AROUND, "skip": NOTHING, "head": -1}),
        ("plan.bulk", {**AROUND, "skip": NOTHING, "tail": 0}),
        ("plan.bulk", {**AROUND, "skip": NOTHING, "windowed": [3]}),
        ("plan.prefill", LOST),
        ("plan.decode", NOTHING),
        ("plan.schedule", [[4, NOTHING]]),
        ("plan.online", {"window": 0, "threshold": 0.5, "scale": "paper"}),
        ("plan.prefill.skip", [[0, 1], [0, 1]]),
        ("plan.prefill.skip.n_layer", 0),
        ("plan.prefill.skip.n_layer", 10**9),
        ("plan.prefill.skip.attention", [3]),
        ("plan.prefill.skip.attention", [-1]),
        ("plan.prefill.skip.ffn", {"0": 1}),
        ("plan.prefill.scale", [[1.0, -1.0]] * 3),
        ("plan.prefill.down", None),
        ("plan.prefill.up.shape", [3, 2, N_EMBD * RANK]),
        ("plan.prefill.up.shape", [3, 2, RANK, N_EMBD]),
        ("plan.prefill.up.rows", LOST),
        ("plan.prefill.up.start", -2),
        ("plan.prefill.up.start", 1 << 20),
        ("plan.prefill.up.bf16", False),
        ("frontier", {}),
    ],
)
def test_a_malformed_file_is_one_clear_line(path: str, value: Any, tmp_path: Path) -> None:
    assert_refused(PLAN, path, value, tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("frontier", {}),
        ("frontier", None),
        ("frontier.points", LOST),
        ("frontier.points.1.judged_at", LOST),
        ("frontier.points.1.judged_at", 0),
        ("frontier.points.1.judged_at", 10**400),
        ("frontier.points.1.speedups", [[0, 1.5]]),
        ("frontier.points.1.speedups", [[10**400, 1.5]]),
        ("frontier.points.1.continuation.divergence.value", None),
        ("frontier.points.1.continuation.divergence.value", NAN),
        ("frontier.points.1.copying.agreement.n", LOST),
        ("frontier.points.1.passkeys", [4, 4, 4]),
        ("frontier.settings.n_batch", "512"),
        ("frontier.machine", {}),
        ("frontier.tried.0.request_s", "fast"),
        ("frontier.speeds.0.of", "waiting"),
        ("frontier.speeds.0.seconds", [1.0]),
        ("frontier.about", {"a": [1]}),
        ("plan", 3),
        ("frontier.points.1.plan", LOST),
        ("frontier.points.1.plan.bulk", None),
        ("frontier.points.0.plan.bulk.skip", 7),
    ],
)
def test_a_malformed_frontier_is_one_clear_line(path: str, value: Any, tmp_path: Path) -> None:
    assert_refused(make_frontier(), path, value, tmp_path)


def assert_refused(plan: SkipPlan | Frontier, path: str, value: Any, folder: Path) -> None:
    save_plan(folder / "p.json", plan)
    change(folder / "p.json", path, value)
    with pytest.raises(PlanFileError, match=r"p\.json' cannot be used: .*; write it again with `adaskip-cpp tune`"):
        load_plan(folder / "p.json")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"a": 1e999}', b"[" * 100_000, b"\x80\x04N.", b"PK\x03\x04"),
        b'{"format": "adaskip-plan", "version": 6, "x": %s}' % (b"[" * 700 + b"]" * 700),
    ],
)
def test_what_is_no_plan_file_is_one_clear_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(PlanFileError, match=r"p\.json' cannot be used: .*; write it again"):
        load_plan(tmp_path / "p.json")


def test_missing_files_say_which(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"no plan file .*p\.json.*`adaskip-cpp tune`"):
        load_plan(tmp_path / "p.json")
    save_plan(tmp_path / "p.json", PLAN)
    (tmp_path / "p.bin").unlink()
    with pytest.raises(PlanFileError, match=r"p\.bin', is missing"):
        load_plan(tmp_path / "p.json")


def test_what_is_beside_a_model_tells_its_frontier_without_the_plans(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    assert frontier_beside(model) is None
    save_plan(plan_path(model), PLAN)
    assert frontier_beside(model) is None, "of one plan alone"
    save_plan(plan_path(model), make_frontier())
    Path(plan_path(model)).with_suffix(".bin").unlink()
    assert frontier_beside(model) == replace(make_frontier(), points=())


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff", b"[]", b'{"format": "adaskip-plan", "version": 5, "frontier": {}}']
)
def test_a_broken_file_beside_a_model_has_no_frontier(content: bytes, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    Path(plan_path(model)).write_bytes(content)
    assert frontier_beside(model) is None
    for path, value in itertools.product(("frontier", "frontier.settings"), (1, [1])):
        save_plan(plan_path(model), make_frontier())
        change(Path(plan_path(model)), path, value)
        assert frontier_beside(model) is None


def test_a_frontier_of_another_model_is_refused_before_the_model_is_opened(tiny: Tiny, tmp_path: Path) -> None:
    save_plan(tmp_path / "other.json", make_frontier())
    with pytest.raises(ProfileMismatchError, match=r"another model.*tune"):
        load_plan(tmp_path / "other.json", model=tiny())
