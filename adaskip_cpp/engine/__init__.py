"""The model that runs: libllama under llama-cpp-python, the cffi layer over it, and ``AdaSkipLlama``.

Importing it puts our libllama in place, before anything imports ``llama_cpp``.
"""

from . import library as library
