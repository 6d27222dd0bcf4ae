"""Finds the fastest plan that keeps a promise about quality.

``tuner`` puts together the parts of the text (``hold_out``), the search over sets (``search``) and speed (``speed``).
Imports ``measuring`` and what lies below it.
"""
