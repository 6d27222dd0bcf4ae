"""Fixtures that tests of native code share."""

from collections.abc import Iterator
from typing import Any

import pytest
from oracles.expected import history_of
from oracles.fixtures import Open, Tiny
from oracles.readable import Bare
from oracles.reference import ReferenceModel, ReferenceRun


@pytest.fixture
def bare(tiny: Tiny) -> Iterator[Open]:
    """``bare(n_seq=2, unified=True)``: a tiny model in a context for several sequences, closed after the test."""
    opened = []

    def open_(**options: Any) -> Bare:
        opened.append(Bare(tiny(), **options))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()


@pytest.fixture(scope="session")
def reference(numpy_model: Open) -> ReferenceModel:
    """The tiny llama in NumPy."""
    return numpy_model()  # type: ignore[no-any-return]


@pytest.fixture
def whole(reference: ReferenceModel) -> Open:
    """``whole(prompt)``: the logits of its last token in NumPy, of a prompt that is read by itself."""
    return lambda prompt: ReferenceRun(reference).eval(prompt).logits[-1]


@pytest.fixture
def both(open_tiny: Open, numpy_model: Open) -> Open:
    """``both(plan, name="llama", **options)``: a tiny model under a plan, and what it must hold."""
    return lambda plan, name="llama", **options: (
        open_tiny(name, under=plan, **options),
        history_of(numpy_model(name), plan),
    )
