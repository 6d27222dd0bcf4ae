"""Measures speed, also against stock llama-cpp-python. Start at :func:`adaskip_cpp.bench`, in ``measure.py``."""
