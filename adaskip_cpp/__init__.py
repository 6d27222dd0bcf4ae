"""Skips the least important sublayers of a GGUF model in llama.cpp. Start at ``tune`` and ``AdaSkipLlama``.

Import this package before ``llama_cpp``, because it replaces the libllama that llama-cpp-python loads.
"""

import signal as _signal  # isort: skip  # see below
import os as _os
import sys as _sys

_is_script = (getattr(_sys, "argv", None) or [""])[0].removesuffix(".exe").endswith("adaskip-cpp")


def _end(number: int, frame: object) -> None:
    _os.write(2, b"Error: interrupted\n")
    _os._exit(130)


# Before and after a verb's work, Ctrl-C ends the script at once. A KeyboardInterrupt during imports would print a
# traceback, or get lost in a callback of the import system.
if _is_script and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _end)

from importlib import import_module as _import_module  # noqa: E402
from importlib.metadata import version as _version  # noqa: E402
from typing import TYPE_CHECKING as _TYPE_CHECKING  # noqa: E402

from .errors import AdaSkipError, LibraryError, PlanFileError  # noqa: E402

try:
    from .calibration.calibrate import calibrate
    from .engine.dropin import replace_llama
    from .engine.llama import AdaSkipLlama
    from .measuring.running import Running
    from .model.edits import Edits
    from .model.frontier import Frontier
    from .model.identity import plan_path
    from .model.plan import Bulk, SkipPlan
    from .model.plan_file import load_plan, save_plan
    from .planning.profile import Profile
    from .planning.request import PlanRequest
except (LibraryError, ModuleNotFoundError) as _error:
    # The script `adaskip-cpp` imports this package before code of the command line could report the error in one line.
    if not _is_script or (_error.name or "").startswith(__name__):
        raise
    _way_out = "" if isinstance(_error, LibraryError) else "; run 'pip install --force-reinstall adaskip-cpp'"
    _sys.exit(f"Error: {_error}{_way_out}")

if _TYPE_CHECKING:
    from .benchmark.measure import bench
    from .evaluation.items import EvaluationOptions
    from .evaluation.measure import evaluate
    from .tuning.tune import tune

_MEASURING = {  # imported on first use, because they make the import of the package a fifth longer
    "bench": "benchmark.measure",
    "evaluate": "evaluation.measure",
    "EvaluationOptions": "evaluation.items",
    "tune": "tuning.tune",
}


def __getattr__(name: str) -> object:
    if name not in _MEASURING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_MEASURING[name]}", __name__), name)


__all__ = [
    "AdaSkipError",
    "AdaSkipLlama",
    "Bulk",
    "Edits",
    "EvaluationOptions",
    "Frontier",
    "PlanFileError",
    "PlanRequest",
    "Profile",
    "Running",
    "SkipPlan",
    "__version__",
    "bench",
    "calibrate",
    "evaluate",
    "load_plan",
    "plan_path",
    "replace_llama",
    "save_plan",
    "tune",
]

__version__: str = _version("adaskip-cpp")
"""Version of the package."""
