"""adaskip_cpp.tuning.speed: stock, settings and plan are timed in turn, in invented seconds."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest

from adaskip_cpp.benchmark import measure
from adaskip_cpp.benchmark.table import NO_PLAN, STOCK
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.plan import SkipPlan
from adaskip_cpp.model.settings import Settings
from adaskip_cpp.tuning.speed import measure_speed


def test_stock_settings_and_plan_are_timed_in_turn_and_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, asked, failure = list[tuple[str, str, dict[str, Any]]](), list[tuple[str, int]](), dict[int, Any]()

    class InventedWorker(contextlib.AbstractContextManager["InventedWorker"]):
        """Stands in for a process: stock takes 6 s for a prompt, ours 3, and 2 with a plan."""

        def __init__(self, name: str, side: str) -> None:
            self.name, self.side = name, side

        def __exit__(self, *exception: object) -> None: ...

        def open(self, path: str, options: dict[str, Any]) -> dict[str, Any]:
            opened.append((self.name, self.side, options))
            return {"settings": None}

        def time(self, prompt: Sequence[int], n_decode: int) -> RequestTime:
            asked.append((self.name, len(prompt)))
            if len(asked) in failure:
                raise failure[len(asked)]
            return RequestTime({STOCK: 6.0, NO_PLAN: 3.0, "plan": 2.0}[self.name], ())

    monkeypatch.setattr(measure, "Worker", InventedWorker)
    plan, found = SkipPlan.manual(3, ffn=[1], phase="bulk"), Settings(flash_attn=True, n_threads=2)
    speeds = measure_speed("m.gguf", found, plan, [1] * 700, n_rounds=2, kwargs={"n_gpu_layers": 0})
    assert [(each.of, each.context, each.ratio.value, each.seconds) for each in speeds] == [
        ("settings", 700, pytest.approx(2.0), (6.0, 3.0)),
        ("plan", 700, pytest.approx(1.5), (3.0, 2.0)),
        ("both", 700, pytest.approx(3.0), (6.0, 2.0)),
    ]
    stock = {"n_ctx": 700, "n_gpu_layers": 0}
    ours = {**stock, **found.to_kwargs()}
    sides = [(STOCK, "stock", stock), (NO_PLAN, "ours", ours), ("plan", "ours", {**ours, "plan": plan})]
    assert opened == sides * 2, "in new processes each round"
    names, warm = [name for name, *_ in sides], [(name, 512) for name, *_ in sides]
    assert asked == [*warm, *((name, 700) for name in names), *warm, *((name, 700) for name in names[::-1])]
    assert [each.of for each in measure_speed("m.gguf", found, None, [1] * 70, n_rounds=2)] == ["settings"]
    failure = {len(asked) + 11: KeyboardInterrupt}
    with pytest.raises(KeyboardInterrupt):
        measure_speed("m.gguf", found, plan, [1] * 70, n_rounds=2)
