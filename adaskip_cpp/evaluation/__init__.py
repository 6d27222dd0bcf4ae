"""Measures quality against speed, item by item, and reports it.

Imports ``pictures`` and what lies below it.
"""
