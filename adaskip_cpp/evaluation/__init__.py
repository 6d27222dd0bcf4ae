"""Measures quality against speed, item by item, and reports it.

:func:`measure.evaluate` is the whole of it. ``items`` makes plans (``contenders``) and items of what is asked for;
``evaluate`` measures them and keeps each result in the ``store``; ``figures`` makes of these the one ``results`` that
stand behind every output: ``tables``, ``plots`` and ``report``, which writes the files.

Imports ``pictures`` and what lies below it.
"""
