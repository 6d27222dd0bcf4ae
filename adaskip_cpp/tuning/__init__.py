"""Finds the fastest plan that keeps a promise about quality.

``tuner`` puts together the parts of the text (``hold_out``), the search over sets (``search``) and speed (``speed``).
``exact`` skips nothing: it finds the settings under which the whole model is fastest.
Imports ``measuring`` and what lies below it.
"""
