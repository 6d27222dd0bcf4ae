"""AdaSkip for llama.cpp: skips the least important sublayers of a GGUF model.

Importing this package puts its own libllama under llama-cpp-python, so it must be imported before ``llama_cpp``.
"""

from importlib.metadata import version as _version

from . import _library  # noqa: F401  (first: what follows imports llama_cpp)
from .calibrate import calibrate
from .errors import AdaSkipError
from .llama import AdaSkipLlama
from .plan import SkipPlan
from .profile import Profile

__all__ = ["AdaSkipError", "AdaSkipLlama", "Profile", "SkipPlan", "__version__", "calibrate"]

__version__: str = _version("adaskip-cpp")
