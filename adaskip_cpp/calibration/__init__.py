"""Runs a model and learns a profile from it: similarity, linear maps, and what each sublayer costs."""
