"""Sequences of calls that Hypothesis draws, ten of up to twenty calls, and the number of calls."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import stateful

called: Counter[str] = Counter()
"""How often the calls of all state machines ran to their end in this process, by name."""


def rule(**arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Hypothesis's decorator for a call that a state machine may draw, which is counted."""

    def decorate(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)
            called[function.__name__] += 1

        return stateful.rule(**arguments)(counted)

    return decorate


def run_drawn_sequences(machine: Callable[[], stateful.RuleBasedStateMachine], *, shrinks: bool = True) -> None:
    """Run a state machine. ``shrinks``: whether a sequence that fails is reported in its shortest form."""
    phases = [hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * shrinks
    options = hypothesis.settings(
        max_examples=10,
        stateful_step_count=20,
        deadline=None,
        database=None,
        print_blob=True,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    stateful.run_state_machine_as_test(machine, settings=options)  # type: ignore[no-untyped-call]
