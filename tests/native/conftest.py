"""A fixture for tests of several sequences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracles.readable import Bare

Tiny = Callable[..., Path]


@pytest.fixture
def bare(tiny: Tiny) -> Any:
    opened = []

    def open_(**options: Any) -> Bare:
        opened.append(Bare(tiny(), **options))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()
