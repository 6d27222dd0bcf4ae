"""Finds a model's fastest settings and its frontier of plans, for :func:`adaskip_cpp.tune`. Start at ``tune.py``."""
