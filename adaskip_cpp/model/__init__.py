"""Plain data about a model, and its files, for all other packages: start with ``profile.py`` and ``plan.py``."""
