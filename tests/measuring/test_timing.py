"""Timing one request: what is called, in what order, and which tokens count."""

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest

from adaskip_cpp.engine import cores
from adaskip_cpp.engine.cores import physical_cores
from adaskip_cpp.measuring import timing
from adaskip_cpp.measuring.timing import RequestTime, in_turn, time_request


class Clocked:
    """A model of which the first token takes 5 s and every other one its number in ms, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.calls: list[Any] = []
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def reset(self) -> None:
        self.calls.append("reset")

    def generate(self, tokens: list[int], *, temp: float) -> Iterator[int]:
        self.calls.append(("generate", tokens, temp))
        self.now += 5.0
        yield 2
        for i in range(1, 1000):
            self.now += i / 1000
            yield 2  # the end of the text, which does not end it


def test_the_first_token_and_each_after_it_are_timed_on_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = Clocked(monkeypatch)
    result = time_request(llm, (1, 5, 6), 4)
    assert llm.calls == ["reset", ("generate", [1, 5, 6], 0.0)]
    assert result.first_token_s == pytest.approx(5.0)
    assert result.token_s == pytest.approx((0.001, 0.002, 0.003, 0.004))


def test_the_time_per_token_is_the_median_after_the_first_two_or_that_of_the_last() -> None:
    assert RequestTime(1.0, (9.0, 8.0, 1.0, 2.0, 4.0)).per_token_s() == 2.0
    assert RequestTime(1.0, (9.0, 8.0, 1.0, 2.0, 4.0)).per_token_s(3) == 3.0
    assert RequestTime(1.0, (9.0, 3.0)).per_token_s() == 3.0
    assert math.isnan(RequestTime(1.0, ()).per_token_s())


def test_every_second_round_is_reversed() -> None:
    assert [in_turn(3, n_round) for n_round in range(3)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def test_there_is_a_core_to_run_on() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def test_a_system_without_proc_tells_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(os, "getloadavg", fail)
    assert cores.load_average() is None
