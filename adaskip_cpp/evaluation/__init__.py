"""Measures plans' quality and speed, and writes reports. Start at :func:`adaskip_cpp.evaluate`, in ``measure.py``."""
