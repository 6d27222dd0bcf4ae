"""Measures speed (start at ``timing.py``) and quality (``judge.py``), on texts (``corpus.py``) and ``tasks.py``."""
