"""Measures how much faster the first token comes by settings, a plan and both, against stock. Used by ``tune.py``."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from ..benchmark.measure import Bench, BenchSettings
from ..benchmark.table import NO_PLAN, STOCK
from ..intervals import ratio_interval
from ..model.frontier import SpeedUp
from ..model.plan import SkipPlan
from ..model.settings import Settings
from ..progress import OnProgress

_PLAN = "plan"  # the contender with settings and plan


def measure_speed(
    model: str,
    settings: Settings,
    plan: SkipPlan | None,
    prompt: list[int],
    *,
    n_rounds: int,
    kwargs: Mapping[str, Any] | None = None,
    on_progress: OnProgress = lambda fraction, words="": None,
) -> tuple[SpeedUp, ...]:
    """Time a prompt as ``bench`` does: stock with its defaults, ours with settings, ours with a plan too.

    ``kwargs`` are arguments of ``llama_cpp.Llama`` for all of them, such as ``n_gpu_layers``. Raises NativeError if a
    process ends or fails.
    """
    n, stock = len(prompt), {**(kwargs or {})}
    options = BenchSettings(model, (n,), n_rounds, 0, {**stock, **settings.to_kwargs()}, stock)
    result = Bench(options, {} if plan is None else {_PLAN: plan}, prompt, on_progress=on_progress).run()
    if result.ended_by is not None:
        raise result.ended_by

    def speed_up(of: Any, before: str, after: str) -> SpeedUp:
        times = [result.times.seconds(name, n, "prefill") for name in (before, after)]
        return SpeedUp(of, n, ratio_interval(*times), (median(times[0]), median(times[1])))

    found = (speed_up("settings", STOCK, NO_PLAN),)
    return found if plan is None else (*found, speed_up("plan", NO_PLAN, _PLAN), speed_up("both", STOCK, _PLAN))
