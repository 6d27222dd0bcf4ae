"""Fixtures that tests of native code share."""

import pytest
from oracles.expected import history_of
from oracles.fixtures import Open
from oracles.reference import ReferenceModel, ReferenceRun


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
