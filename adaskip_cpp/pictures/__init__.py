"""Draws curves as PNG and SVG files. Start at ``plots.py``."""
