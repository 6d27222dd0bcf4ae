"""Runs models; start with ``AdaSkipLlama`` in ``llama.py``. Importing it puts our libllama under ``llama_cpp``."""

from . import library as library
