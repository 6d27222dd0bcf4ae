"""adaskip_cpp.tuning.speed: stock, settings and plan are timed in turn, in invented seconds."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.plan import SkipPlan
from adaskip_cpp.model.settings import Settings
from adaskip_cpp.tuning import speed
from adaskip_cpp.tuning.speed import measure_speed


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "unfinished.json")


def test_stock_settings_and_plan_are_timed_in_turn_and_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, asked = list[tuple[str, str, dict[str, Any]]](), list[tuple[str, int]]()

    class InventedWorker(contextlib.AbstractContextManager["InventedWorker"]):
        """Stands in for a process: stock takes 6 s for a prompt, ours 3, and 2 with a plan."""

        def __init__(self, name: str, side: str) -> None:
            self.name, self.side = name, side

        def __exit__(self, *exception: object) -> None: ...

        def open(self, path: str, options: dict[str, Any]) -> None:
            opened.append((self.name, self.side, options))

        def time(self, prompt: Sequence[int], n_decode: int) -> RequestTime:
            asked.append((self.name, len(prompt)))
            return RequestTime({"stock": 6.0, "settings": 3.0, "plan": 2.0}[self.name], ())

    monkeypatch.setattr(speed, "Worker", InventedWorker)
    plan, found = SkipPlan.manual(3, ffn=[1], phase="bulk"), Settings(flash_attn=True, n_threads=2)
    speeds = measure_speed("m.gguf", found, plan, [1] * 70, n_rounds=2, kwargs={"n_gpu_layers": 0})
    assert [(each.of, each.context, each.ratio.value, each.seconds) for each in speeds] == [
        ("settings", 70, pytest.approx(2.0), (6.0, 3.0)),
        ("plan", 70, pytest.approx(1.5), (3.0, 2.0)),
        ("both", 70, pytest.approx(3.0), (6.0, 2.0)),
    ]
    stock = {"n_ctx": 78, "n_gpu_layers": 0}
    ours = {**stock, **found.to_kwargs()}
    assert opened == [("stock", "stock", stock), ("settings", "ours", ours), ("plan", "ours", {**ours, "plan": plan})]
    assert asked[:3] == [("stock", 8), ("settings", 8), ("plan", 8)], "nobody times these"
    assert sorted(asked[3:]) == sorted([("stock", 70), ("settings", 70), ("plan", 70)] * 2)
    assert [each.of for each in measure_speed("m.gguf", found, None, [1] * 70, n_rounds=2)] == ["settings"]
