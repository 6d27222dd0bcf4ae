"""Plain data about a model: identity, statistics, maps, costs, profiles and plans, and their files.

Imports only the top level's ``errors``, ``files`` and ``intervals``.
"""
