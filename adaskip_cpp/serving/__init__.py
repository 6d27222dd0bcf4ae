"""An OpenAI-compatible server: llama-cpp-python's own, with our model under it and a queue before it.

``app.py`` puts it together, ``middleware.py`` is what every request passes, ``llama.py`` is the model, which keeps what
it has read in ``prefix_cache.py``. May import everything below the command line; nothing but that imports it.
"""
