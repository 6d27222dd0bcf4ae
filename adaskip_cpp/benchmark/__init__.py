"""Measures speed against the stock library, each contender in a process of its own.

Imports ``pictures`` and what lies below it.
"""
