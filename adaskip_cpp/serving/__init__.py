"""An OpenAI-compatible server: llama-cpp-python's own, with our model under it and a queue before it."""
