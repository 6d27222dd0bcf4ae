"""Import this before ``oracles``: benchmarks share models, servers and the stock library's process with the tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
