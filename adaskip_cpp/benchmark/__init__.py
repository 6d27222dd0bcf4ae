"""Measures speed against the stock library, each contender in a process of its own: :func:`measure.bench`."""
