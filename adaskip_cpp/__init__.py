"""AdaSkip for llama.cpp: skips the least important sublayers of a GGUF model.

Importing this package puts its own libllama under llama-cpp-python, so it must be imported before ``llama_cpp``.
"""

import sys as _sys
from importlib.metadata import version as _version

from .errors import AdaSkipError, LibraryError

try:
    from .calibration.calibrate import calibrate
    from .engine.llama import AdaSkipLlama
    from .model.plan import SkipPlan
    from .model.plan_file import load_plan, save_plan
    from .planning.profile import Profile
except (LibraryError, ModuleNotFoundError) as _error:
    # The script `adaskip-cpp` imports this package before any code of the command line could tell it in one line.
    if not _sys.argv[0].endswith("adaskip-cpp") or (_error.name or "").startswith(__name__):
        raise
    _way_out = "" if isinstance(_error, LibraryError) else "; run 'pip install --force-reinstall adaskip-cpp'"
    _sys.exit(f"Error: {_error}{_way_out}")

__all__ = [
    "AdaSkipError",
    "AdaSkipLlama",
    "Profile",
    "SkipPlan",
    "__version__",
    "calibrate",
    "load_plan",
    "save_plan",
]

__version__: str = _version("adaskip-cpp")
