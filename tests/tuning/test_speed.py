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
    asked: ClassVar[list[tuple[str, int, Any]]] = []

    def __init__(self, name: str, side: str) -> None:
        self.name, self.side = name, side

    def __enter__(self) -> "InventedWorker":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def open(self, path: str, options: dict[str, Any]) -> None:
        self.opened.append((self.name, self.side, options))

    def time(self, prompt: Sequence[int], n_decode: int, *plan: Any) -> RequestTime:
        self.asked.append((self.name, len(prompt), *(plan or ("as before",))))  # type: ignore[arg-type]
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
    assert invented.asked[:3] == [("stock", 8, None), ("settings", 8, None), ("plan", 8, plan)], "nobody times these"
    timed = invented.asked[3:]
    assert all(each[1:] == (70, "as before") for each in timed)
    assert sorted(name for name, *_ in timed) == sorted(["stock", "settings", "plan"] * 2)


def test_stock_is_opened_with_its_own_defaults(invented: type[InventedWorker]) -> None:
    measure_speed("m.gguf", Settings(flash_attn=True), None, [1] * 70, n_rounds=2, kwargs={"n_gpu_layers": 0})
    (_, stock_side, stock), (_, our_side, ours) = invented.opened
    assert (stock_side, stock) == ("stock", {"n_ctx": 78, "n_gpu_layers": 0})
    assert our_side == "ours" and ours == {**stock, **Settings(flash_attn=True).to_kwargs()}


def test_without_a_plan_settings_alone_are_compared(invented: type[InventedWorker]) -> None:
    (only,) = measure_speed("m.gguf", Settings(), None, [1] * 70, n_rounds=2)
    assert only.of == "settings"
