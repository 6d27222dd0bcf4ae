"""Measures quality against speed, item by item, and reports it: :func:`measure.evaluate`."""
