"""Runs a model and learns a profile from it: similarity, linear maps, divergence, times; start in ``calibrate.py``."""
