"""Makes plans from a profile and a request; start with ``make_plan`` in ``strategies.py``."""
