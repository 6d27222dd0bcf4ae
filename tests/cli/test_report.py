"""adaskip_cpp.cli.report: words about one request, of fixed figures."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from oracles.frontiers import point

from adaskip_cpp import SkipPlan
from adaskip_cpp.cli.report import first_token_line, layer_list, megabytes, seconds, skipped_lines
from adaskip_cpp.engine.generation import Timing
from adaskip_cpp.model.plan import OnlineStage

TIMING = Timing(n_prompt=2000, n_evaluated=2000, n_generated=29, first_token_s=0.25, decode_s=0.1, is_cut=False)


def test_why_nothing_was_skipped_is_told_if_there_are_plans() -> None:
    tuned: Any = SimpleNamespace(plan=None, frontier=object(), max_loss=0.01)
    assert skipped_lines(tuned, TIMING) == ["skipped: nothing, no plan keeps the promise of 0.01"]
    short = replace(TIMING, n_prompt=20)
    assert skipped_lines(tuned, short) == ["skipped: nothing, the prompt has fewer than 512 tokens"]
    assert skipped_lines(SimpleNamespace(plan=None, frontier=None, max_loss=None), TIMING) == []  # type: ignore[arg-type]


def test_ffns_that_were_added_online_are_counted() -> None:
    plan = replace(SkipPlan.manual(3, attention=[0]), online=OnlineStage(20, 0.75, "median"))
    for ffn, n_tokens, words in (
        ((0, 1, 2), 20, "online: FFN of layers 0-2 added"),
        ((), 20, "online: no FFN added: none as similar as 0.7500"),
        ((), 8, "online: no FFN added: 8 of 20 tokens observed"),
    ):
        llm: Any = SimpleNamespace(plan=plan, online=SimpleNamespace(ffn=ffn, n_tokens=n_tokens))
        told = " ".join(" ".join(skipped_lines(llm, TIMING)).split())
        assert told.startswith("skipped: 1 of 6 sublayers in prefill (1 attention, 0 FFN)") and told.endswith(words)
        assert f"{1 + len(ffn)} of 6 in decode (1 attention, 0 FFN" in told
        assert ("3 FFN added online" in told) == (len(ffn) == 3)


def test_what_tune_predicted_is_told_of_a_prompt_that_is_read_as_a_whole() -> None:
    found = point(SkipPlan.manual(3, ffn=[1], phase="bulk"), 0.01, {1024: 1.2, 2048: 1.6})
    tuned: Any = SimpleNamespace(point={2000: found}.get)
    assert first_token_line(tuned, TIMING) == "first token after 250 ms; predicted without the plan: 400 ms"
    assert first_token_line(tuned, replace(TIMING, n_evaluated=100)) == "first token after 250 ms"


def test_layers_decimal_bytes_and_times_of_three_digits_are_told_shortly() -> None:
    assert [*map(layer_list, [(), (3,), (0, 1, 4, 5, 6, 9)])] == ["none", "3", "0, 1, 4-6, 9"]
    assert [*map(megabytes, [32_768, 1_500_000, 188_743_680])] == ["33 kB", "1.5 MB", "189 MB"]
    assert [*map(seconds, [0.012345, 0.9, 1.234, 123.4])] == ["12.3 ms", "900 ms", "1.23 s", "123 s"]
