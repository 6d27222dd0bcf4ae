"""The command line, ``adaskip-cpp``: a module per verb reads options, calls the package, prints. Start at main.py."""
