"""adaskip_cpp.model.plan_file: what is stored, and what is refused."""

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
from oracles.frontiers import frontier, point
from oracles.tiny_families import N_EMBD

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import PlanError, PlanFileError, ProfileMismatchError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.model.frontier import Frontier, SpeedUp
from adaskip_cpp.model.identity import ModelInfo, plan_path
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.plan_file import frontier_beside, load_plan, save_plan
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


PLAN = SkipPlan(
    skip_set(**MAPS), skip_set(**MAPS), model=OTHER_MODEL, strategy="tuned", compensation="linear", mode="e2e"
)
"""A plan of maps, for a model that is nowhere."""


def make_frontier() -> Frontier:
    """A frontier of two points, for that model."""
    settings, points = Settings(flash_attn="prompts", repack="all", n_threads=2), []
    for i, (of, windowed) in enumerate(((skip_set(**MAPS), ()), (one_map(), (0, 1))), start=1):
        plan = SkipPlan(NONE, NONE, bulk=Bulk(of, windowed=windowed), mode="prompt", model=OTHER_MODEL)
        points.append(point(plan, i / 32, {512: 1.125, 2048: 1.25 * i}))
    return frontier(
        points,
        settings=settings,
        machine=SETTINGS,
        tried=(
            Tried(Settings(), 0.5, 0.75, 0.125, 3.0, True),
            Tried(settings, 0.25, math.inf, math.inf, math.inf, False),
        ),
        speeds=tuple(SpeedUp("both", 2048, Interval(1.25, low, 1.5, 5), (2.5, 2.0)) for low in (1.125, NAN)),
        n_read=4321,
        about={"judged_on": "some text", "n": 4, "share": 0.5, "cpu": None},
    )


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        SkipPlan.manual(3),
        SkipPlan(skip_set(**BIAS, **MAPS), skip_set((0, 1, 2), (), **MAPS)),
        SkipPlan(NONE, skip_set(**MAPS), schedule=((0, skip_set(**MAPS)), (9, skip_set((1, 2), **MAPS)))),
        SkipPlan(
            NONE, skip_set((1,), **BIAS), bulk=Bulk(one_map(), head=0, tail=32), online=OnlineStage(7, 0.75, "median")
        ),
        SkipPlan(NONE, NONE, bulk=Bulk(NONE, windowed=(0, 2), window_size=764), mode="prompt"),
        SkipPlan(NONE, NONE, bulk=Bulk(one_map(), refit=64), mode="prompt"),
    ],
)
def test_every_plan_comes_back_as_it_was(plan: SkipPlan, tmp_path: Path) -> None:
    save_plan(tmp_path / "p.json", plan)
    found = load_plan(tmp_path / "p.json")
    assert found.plan == plan and found.frontier is None and found.plans == (plan,)
    assert json.loads((tmp_path / "p.json").read_text())["plan"] == json.loads(json.dumps(plan.to_dict()))
    assert (tmp_path / "p.bin").exists() == any(each.n_embd for each in plan.sets), "of vectors and maps"


@pytest.mark.parametrize("n_points", [2, 0])
def test_a_frontier_comes_back_as_it_was(n_points: int, tmp_path: Path) -> None:
    """By the representation of its figures, as NaN equals nothing; plans, whose maps that leaves out, by themselves."""
    before = replace(make_frontier(), points=make_frontier().points[:n_points])
    save_plan(tmp_path / "p.json", before)
    found = load_plan(tmp_path / "p.json")
    assert found.plan is None and found.frontier is not None and repr(found.frontier) == repr(before)
    assert found.plans == tuple(each.plan for each in before.points)


def test_plans_of_several_models_are_no_frontier(tmp_path: Path) -> None:
    first, second = make_frontier().points
    other = replace(second, plan=replace(second.plan, model=None))
    with pytest.raises(PlanError, match="of several models; tune again"):
        save_plan(tmp_path / "p.json", Frontier((first, other)))


def test_sets_and_vectors_lie_as_the_format_says(tmp_path: Path) -> None:
    chosen = skip_set((2,), (0,), **BIAS, **MAPS)
    save_plan(tmp_path / "p.json", SkipPlan(chosen, chosen, bulk=Bulk(chosen, head=0, tail=9, windowed=(1,))))
    assert chosen.bias is not None and chosen.down is not None and chosen.up is not None
    parts = [array[where].ravel() for array in (chosen.bias, chosen.down, chosen.up) for where in ((0, 1), (2, 0))]
    content, n = (tmp_path / "p.bin").read_bytes(), 2 * N_EMBD * 4
    np.testing.assert_array_equal(np.frombuffer(content[:n], "<f4"), np.concatenate(parts[:2]))
    halves = np.frombuffer(content[n:], np.uint8)
    np.testing.assert_array_equal(dequantize(halves, GGMLQuantizationType.BF16), np.concatenate(parts[2:]))
    text = (tmp_path / "p.json").read_text()
    assert '"attention": [2],' in text, "a list of plain values is on one line"
    plan, rows = json.loads(text)["plan"], {"rows": [1, 4], "nan": False}  # counted over layers and kinds
    expected = {
        "skip": {"attention": [2], "ffn": [0], "n_layer": 3},
        "scale": chosen.scale.tolist(),
        "bias": {"shape": [3, 2, N_EMBD], **rows, "bf16": False, "start": 0},
        "down": {"shape": [3, 2, RANK, N_EMBD], **rows, "bf16": True, "start": n},
        "up": {"shape": [3, 2, N_EMBD, RANK], **rows, "bf16": True, "start": n + 2 * RANK * N_EMBD * 2},
    }
    assert plan["prefill"] == plan["decode"] == expected
    assert plan["bulk"] == {"skip": expected, "head": 0, "tail": 9, "windowed": [1], "window_size": 252, "refit": 0}


NOTHING = {"skip": {"attention": [], "ffn": [], "n_layer": 3}, "scale": [[1.0, 1.0]] * 3}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "adaskip-profile"),
        ("version", 7),
        ("plan", []),
        ("plan.mode", "both"),
        ("plan.model.n_layer", 0),
        ("plan.bulk", {"head": 4, "tail": 64}),
        ("plan.bulk", {"skip": NOTHING, "tail": 0}),
        ("plan.prefill", LOST),
        ("plan.decode", NOTHING),
        ("plan.prefill.skip", [[0, 1], [0, 1]]),
        ("plan.prefill.skip.n_layer", 0),
        ("plan.prefill.skip.n_layer", 10**9),
        ("plan.prefill.skip.attention", [3]),
        ("frontier", None),
        ("frontier", {}),
        ("frontier.points.1.judged_at", 0),
        ("frontier.points.1.growth", 0.9),
        ("frontier.points.1.growth", 1e300),
        ("frontier.points.1.speedups", [[0, 1.5]]),
        ("frontier.points.1.continuation.divergence.value", NAN),
        ("frontier.points.1.copying.agreement.n", LOST),
        ("frontier.points.1.continuation.divergence.value", -1.0),
        ("frontier.points.1.continuation.error", -1.0),
        ("frontier.points.1.retrieval.excess", -1.0),
        ("frontier.points.1.passkeys.plan", 99),
        ("frontier.settings.n_batch", -1),
        ("frontier.settings.n_ubatch", 2**62),
        ("frontier.settings.n_threads", 0),
        ("frontier.settings.n_threads_batch", 513),
        ("frontier.machine", {}),
        ("frontier.speeds.0.of", "waiting"),
        ("frontier.about", {"a": [1]}),
        ("frontier.points.1.plan.bulk", None),
        ("frontier.points.0.plan.bulk.skip", 7),
    ],
)
def test_a_malformed_file_is_one_clear_line(path: str, value: Any, tmp_path: Path) -> None:
    save_plan(tmp_path / "p.json", make_frontier() if path.startswith("frontier") else PLAN)
    change(tmp_path / "p.json", path, value)
    with pytest.raises(PlanFileError, match=r"p\.json' cannot be used: .*; write it again with `adaskip-cpp tune`"):
        load_plan(tmp_path / "p.json")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe", b'{"a": 1e999}', b"[" * 100_000, b'{"x": %s}' % (b"[" * 700 + b"]" * 700)]
)
def test_what_is_no_plan_file_is_one_clear_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(PlanFileError, match=r"p\.json' cannot be used: .*; write it again"):
        load_plan(tmp_path / "p.json")
    Path(plan_path(tmp_path / "m.gguf")).write_bytes(content)
    assert frontier_beside(tmp_path / "m.gguf") is None
    with pytest.raises(PlanFileError, match=r"no plan file .*none\.json.*`adaskip-cpp tune`"):
        load_plan(tmp_path / "none.json")


def test_what_is_beside_a_model_tells_its_frontier_without_the_plans(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    assert frontier_beside(model) is None
    save_plan(plan_path(model), PLAN)
    assert frontier_beside(model) is None, "of one plan alone"
    save_plan(plan_path(model), make_frontier())
    Path(plan_path(model)).with_suffix(".bin").unlink()
    assert repr(frontier_beside(model)) == repr(replace(make_frontier(), points=()))
    for path, value in (("frontier.settings", 1), ("frontier", [1]), ("version", 7)):
        change(Path(plan_path(model)), path, value)
        assert frontier_beside(model) is None
        save_plan(plan_path(model), make_frontier())


def test_a_frontier_of_another_model_is_refused_before_the_model_is_opened(tiny: Tiny, tmp_path: Path) -> None:
    save_plan(tmp_path / "other.json", make_frontier())
    with pytest.raises(ProfileMismatchError, match=r"another model.*tune"):
        load_plan(tmp_path / "other.json", model=tiny())
