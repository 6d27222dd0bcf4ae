"""AdaSkip for llama.cpp: skips the least important sublayers of a GGUF model.

Importing this package puts its own libllama under llama-cpp-python, so it must be imported before ``llama_cpp``.
"""

from importlib.metadata import version as _version

from .calibration.calibrate import calibrate
from .engine.llama import AdaSkipLlama
from .errors import AdaSkipError
from .model.plan import SkipPlan
from .planning.profile import Profile

__all__ = ["AdaSkipError", "AdaSkipLlama", "Profile", "SkipPlan", "__version__", "calibrate"]

__version__: str = _version("adaskip-cpp")
