"""Programs of the tests: Python starts each by its path, in a process of its own."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """The environment of this process, with the folder in which such a program finds ``oracles`` and ``faults``."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
