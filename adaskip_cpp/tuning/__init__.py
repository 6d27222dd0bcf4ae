"""Finds the settings under which a model is fastest, and its frontier of plans.

Start at ``tune``. Imports ``benchmark`` and what lies below it.
"""
