"""Types of the fixtures in conftest.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Open = Callable[..., Any]
Tiny = Callable[..., Path]
