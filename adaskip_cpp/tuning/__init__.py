"""Finds the fastest plan that keeps a promise about quality.

Imports ``calibration`` and what lies below it.
"""
