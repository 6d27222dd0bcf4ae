"""Measures how much faster the first token comes by settings, a plan and both, against stock. Used by ``tune.py``."""

from collections.abc import Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

from ..benchmark.process import Worker
from ..intervals import ratio_interval
from ..measuring.timing import in_turn
from ..model.frontier import SpeedUp
from ..model.plan import SkipPlan
from ..model.settings import Settings
from ..progress import OnProgress

_WARM_UP = 8  # untimed tokens that each process reads first: they read the weights into memory


def measure_speed(
    model_path: str,
    settings: Settings,
    plan: SkipPlan | None,
    prompt: list[int],
    *,
    n_rounds: int,
    kwargs: Mapping[str, Any] | None = None,
    on_progress: OnProgress = lambda fraction, words="": None,
) -> tuple[SpeedUp, ...]:
    """Time a prompt in processes that take turns: stock with its defaults, ours with settings, ours with a plan too.

    Each process reads the prompt ``n_rounds`` times. ``kwargs`` are arguments of ``llama_cpp.Llama`` for all of them,
    such as ``n_gpu_layers``. Raises NativeError if a process ends or fails.
    """
    options = {"n_ctx": len(prompt) + 8, **(kwargs or {})}
    names = ("stock", "settings", *(["plan"] if plan is not None else []))
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {}
        for name in names:
            workers[name] = stack.enter_context(Worker(name, "stock" if name == "stock" else "ours"))
            ours = {} if name == "stock" else settings.to_kwargs()
            workers[name].open(model_path, {**options, **ours, **({"plan": plan} if name == "plan" else {})})
            workers[name].time(prompt[:_WARM_UP], 0)
        for n_round in range(n_rounds):
            for index in in_turn(len(names), n_round):
                name = names[index]
                times[name].append(workers[name].time(prompt, 0).first_token_s)
                on_progress(sum(map(len, times.values())) / (len(names) * n_rounds))

    def speed_up(of: Any, before: str, after: str) -> SpeedUp:
        ratio = ratio_interval(times[before], times[after])
        return SpeedUp(of, len(prompt), ratio, (median(times[before]), median(times[after])))

    found = [speed_up("settings", "stock", "settings")]
    if plan is not None:
        found += [speed_up("plan", "settings", "plan"), speed_up("both", "stock", "plan")]
    return tuple(found)
