"""Draws heat maps in the terminal (``heatmap.py``), and curves and strips as files (start at ``plots.py``)."""
