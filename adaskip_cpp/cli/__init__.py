"""The command line, ``adaskip-cpp``: one module per verb, which reads options, calls and prints."""
