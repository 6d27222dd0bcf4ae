"""adaskip_cpp.cli.report: what verbs tell of an answer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from oracles.frontiers import point

from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.cli.report import first_token_line, layer_list, megabytes, seconds, skipped_counts, skipped_lines
from adaskip_cpp.engine.generation import Generation, Timing
from adaskip_cpp.measuring import running
from adaskip_cpp.model.plan import OnlineStage


def test_ffns_added_online_are_counted(tiny: Any, profile_path: Path) -> None:
    # The sixth of six similarities, 0.5, is the threshold; nothing but attentions is in the fixed set.
    profile = Profile.load(profile_path)
    plan = profile.plan(strategy="manual", attention=[0], mode="e2e")
    stage = OnlineStage(threshold=-1.0, scale="median")
    plan = replace(plan, online=stage)
    llm = running.open_quietly(str(tiny()), 64, running.Running(1, 0, False), plan=plan)
    answer = Generation(llm, llm.tokenize(b"hello"), max_tokens=30)
    list(answer)
    assert answer.timing is not None
    if answer.timing.n_generated > stage.window + 1:
        assert skipped_counts(llm, answer.timing.n_generated) == (1, 1, 3)
        assert any("layers 0-2 added" in text for text in skipped_lines(llm, 29))
    llm.close()


def test_what_tune_predicted_is_told_of_a_prompt_that_is_read_as_a_whole() -> None:
    timing = Timing(n_prompt=2000, n_evaluated=2000, n_generated=2, first_token_s=0.25, decode_s=0.1, is_cut=False)
    found = point(SkipPlan.manual(3, ffn=[1], phase="bulk"), 0.01, {1024: 1.2, 2048: 1.6})
    tuned: Any = SimpleNamespace(point={2000: found}.get)
    whole: Any = SimpleNamespace(point={}.get)
    assert first_token_line(tuned, timing) == "first token after 250 ms; predicted without the plan: 400 ms"
    assert first_token_line(whole, timing) == "first token after 250 ms"
    partly_cached = replace(timing, n_evaluated=100)
    assert first_token_line(tuned, partly_cached) == "first token after 250 ms", "that was not predicted"


@pytest.mark.parametrize(
    ("say", "values", "words"),
    [
        (layer_list, [(), (3,), (0, 1, 4, 5, 6, 9)], ["none", "3", "0, 1, 4-6, 9"]),
        (megabytes, [32_768, 1_500_000, 188_743_680], ["33 kB", "1.5 MB", "189 MB"]),
        (seconds, [0.012345, 0.9, 1.234, 123.4], ["12.3 ms", "900 ms", "1.23 s", "123 s"]),
    ],
)
def test_layers_decimal_bytes_and_times_of_three_digits_are_told_shortly(
    say: Callable[[Any], str], values: list[Any], words: list[str]
) -> None:
    assert [say(each) for each in values] == words
