"""adaskip_cpp.tuning.speed: how speed is measured at the end."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from adaskip_cpp import SkipPlan
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.settings import Settings
from adaskip_cpp.tuning import speed
from adaskip_cpp.tuning.speed import measure_speed


class InventedWorker:
    """Stands in for a process: stock takes 6 s for a prompt, ours 3, and 2 with a plan. Notes what is asked of whom."""

    opened: ClassVar[list[tuple[str, str, dict[str, Any]]]] = []
    asked: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, name: str, side: str) -> None:
        self.name, self.side = name, side

    def __enter__(self) -> "InventedWorker":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def open(self, path: str, options: dict[str, Any]) -> None:
        self.opened.append((self.name, self.side, options))

    def time(self, prompt: Sequence[int], n_decode: int) -> RequestTime:
        self.asked.append((self.name, len(prompt)))
        return RequestTime({"stock": 6.0, "settings": 3.0, "plan": 2.0}[self.name], ())


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> type[InventedWorker]:
    monkeypatch.setattr(speed, "Worker", InventedWorker)
    InventedWorker.opened.clear()
    InventedWorker.asked.clear()
    return InventedWorker


def test_stock_settings_and_plan_are_timed_in_turn_and_compared_pair_by_pair(invented: type[InventedWorker]) -> None:
    plan, found = SkipPlan.manual(3, ffn=[1], phase="bulk"), Settings(flash_attn=True, n_threads=2)
    speeds = measure_speed("m.gguf", found, plan, [1] * 70, n_rounds=2, kwargs={"n_gpu_layers": 0})
    assert [(each.of, each.context, each.ratio.value, each.seconds) for each in speeds] == [
        ("settings", 70, pytest.approx(2.0), (6.0, 3.0)),
        ("plan", 70, pytest.approx(1.5), (3.0, 2.0)),
        ("both", 70, pytest.approx(3.0), (6.0, 2.0)),
    ]
    assert [options.get("plan") for *_, options in invented.opened] == [None, None, plan]
    assert invented.asked[:3] == [("stock", 8), ("settings", 8), ("plan", 8)], "nobody times these"
    assert sorted(invented.asked[3:]) == sorted([("stock", 70), ("settings", 70), ("plan", 70)] * 2)


def test_without_a_plan_settings_alone_are_compared_with_stock_and_its_defaults(invented: type[InventedWorker]) -> None:
    found, kwargs = Settings(flash_attn=True), {"n_gpu_layers": 0}
    (only,) = measure_speed("m.gguf", found, None, [1] * 70, n_rounds=2, kwargs=kwargs)
    assert only.of == "settings"
    (_, stock_side, stock), (_, our_side, ours) = invented.opened
    assert (stock_side, stock) == ("stock", {"n_ctx": 78, "n_gpu_layers": 0})
    assert our_side == "ours" and ours == {**stock, **found.to_kwargs()}
