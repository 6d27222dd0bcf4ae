"""Types of the fixtures in conftest.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Open", "Tiny", "Tokens"]

Open = Callable[..., Any]
Tiny = Callable[..., Path]
Tokens = Callable[..., list[int]]
