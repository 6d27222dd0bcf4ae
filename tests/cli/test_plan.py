"""``adaskip-cpp plan``: what it prints of a profile and of a plan file."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles.command_line import fails, run
from oracles.costs import cost_model

from adaskip_cpp import Profile, load_plan, save_plan
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.planning.modes import MODES


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the table of sublayers, without empty ones."""
    return [cells for cells in map(str.split, text.splitlines()) if re.match(r"\d+ [\d-]+ ", " ".join(cells))]


def test_plan_ranks_every_sublayer(profile_path: Path) -> None:
    args = ("plan", profile_path, "--skip", 2, "--compensation", "median")
    text = run(*args, "--mode", "e2e").stdout
    # By hand: the profile's similarity rises from attention of layer 0 to FFN of layer 2.
    assert [" ".join(row) for row in rows(text)] == [
        "0 6 0.5000 5 0.5980",
        "1 4 0.6960 3 0.7940",
        "2 2 0.8920 pd 2.000 1 0.9900 pd 2.000",
    ]
    assert "simi-" in text and "No KV memory is needed for 1 layer: 2." in text and "No speed-up is predicted" in text
    assert f"at least {0.99 - 0.49 / 5:.4f}" in " ".join(text.split())
    text = run(*args).stdout
    # In the bulk the last layer comes first, and its attention before its FFN. The first layer is never skipped.
    assert [" ".join(row) for row in rows(text)] == [
        "0 - 0.5000 - 0.5980",
        "1 3 0.6960 4 0.7940",
        "2 1 0.8920 b 2.000 2 0.9900 b 2.000",
    ]
    assert "mode prompt" in text and "KV memory is needed for all layers" in text


def test_plan_tells_what_skipping_saves_and_shows_phases_apart_where_they_differ(profile_path: Path) -> None:
    # Decoding a token, an attention takes 2 ms, an FFN 1 ms, the rest 1 ms, so that 3 layers take 10 ms.
    replace(Profile.load(profile_path), cost=cost_model(0.1, [0.2] * 3, [0.1] * 3)).save(profile_path)
    text = run("plan", profile_path, "--skip", 2, "--mode", "decode").stdout
    assert [(row[3], row[6]) for row in rows(text)[:2]] == [("2.00", "1.00")] * 2 and "time saved in decode" in text
    assert "prefill 1.00 x, decode 1.43 x." in text
    assert "predicted from times of a CPU, 2 and 4 threads" in " ".join(text.split())
    assert "0 of 6 sublayers skipped in prefill, 2 in decode" in text and "after 20 tokens of an answer" in text
    assert "attention skipped in prefill in layers: none" in text and "skipped in decode in layers: 2" in text
    text = run("plan", profile_path, "--strategy", "skip_decode", "--skip", 4, "--mode", "e2e").stdout
    assert "from token 1 of an answer: 4 skipped" in text
    for mode in ("prompt", "e2e"):
        text = run("plan", profile_path, "--speedup", 1.25, "--mode", mode).stdout
        predicted = re.search(r"Predicted speed-up at 2,048 tokens: prefill (.*) x, decode", text)
        assert predicted and float(predicted[1]) >= 1.25 and f"mode {mode}" in text


def test_plan_tells_the_bulk_and_the_time_to_the_first_token(profile_path: Path, tmp_path: Path) -> None:
    cost = cost_model(1, [1] * 3, [1] * 3, size=64, kept=[0.25] * 3)
    replace(Profile.load(profile_path), cost=cost).save(profile_path)
    args = ["plan", profile_path, "--mode", "prompt", "--strategy", "early_exit", "--skip", 4]
    args += ["--context", 65 + 64, "--head", 0, "--tail", 1, "-o", tmp_path / "plan.json"]
    text = run(*args).stdout
    counts = "4 of 6 sublayers skipped in the bulk of a prompt, 0 in decode"
    assert f"{counts}: strategy early_exit" in " ".join(text.split())
    assert "attention skipped in the bulk in layers: 1, 2" in text and "FFN skipped in the bulk in layers: 1, 2" in text
    assert [row.count("b") for row in rows(text)] == [0, 2, 2] and "time saved in a prompt" in text
    # By hand, two ubatches of the bulk and a token: of the whole model 1 + 4 + 0.25 s, of the plan 1 + 2 + 2 * 0.25.
    whole, plan = 2 * (1 + 4 + 0.25) + 0.07, 2 * (1 + 2 + 0.5) + 0.07
    assert f"prefill {whole / plan:.2f} x, decode 1.00 x." in text
    assert "The bulk is the prompt without its first 0 and its last 1 tokens." in text
    assert "Predicted first token: after 7.07 s, whole model 10.57 s." in text
    assert "needed for all layers: the bulk keeps its K and V" in text
    shown = run("plan", tmp_path / "plan.json").stdout
    assert counts in shown and "its last 1 tokens." in shown


def test_windows_are_chosen_by_hand_and_told(tiny: Any, profile_path: Path, tmp_path: Path) -> None:
    replace(Profile.load(profile_path), windowable=(0, 1, 2)).save(profile_path)
    for n_skip, n_windowed, words in ((1, 3, "2 attentions"), (0, 1, "1 attention")):  # one of the three is skipped
        args = ["--skip", n_skip, "--windowed", n_windowed, "--head", 0, "--tail", 4, "-o", tmp_path / "plan.json"]
        shown = " ".join(run("plan", profile_path, *args).stdout.split())
        assert f"{n_skip} of 6 sublayers skipped in the bulk of a prompt, {words} windowed to 252 tokens" in shown
        looks = f"attention in the bulk looks back at 252 tokens in layers: {'0, 1' if n_skip else '2'}"
        assert looks in shown and looks in run("plan", tmp_path / "plan.json").stdout
        told = run("generate", tiny(), "-p", "hello", "--plan", tmp_path / "plan.json", "--max-tokens", 2).stderr
        assert f"{words} windowed to 252 tokens" in " ".join(told.split())


def test_a_plan_file_is_shown_as_it_is_with_its_frontier_within_80_columns(tuned_model: Path) -> None:
    result = run("plan", plan_path(tuned_model))
    told = " ".join(result.stdout.split())
    assert "A promise of 0.02 nats per token gives 1.30 times the speed at 2,048 tokens." in told
    assert "A promise of 0.05 nats per token (the default) gives 2.60 times the speed" in told
    assert max(map(len, result.stdout.splitlines())) <= 80
    for option in ("--skip", "--context"):
        assert "leave out other options" in fails("plan", plan_path(tuned_model), option, 2048, code=2)


def test_a_promise_that_no_plan_keeps_is_told_what_the_most_careful_plan_needs(tuned_model: Path) -> None:
    found = load_plan(plan_path(tuned_model)).frontier
    assert found is not None
    careful = [point for point in found.points if point.needs(2048) > 0.02]
    save_plan(plan_path(tuned_model), replace(found, points=tuple(careful)))
    told = " ".join(run("plan", plan_path(tuned_model)).stdout.split())
    needs = min(point.needs(2048) for point in careful)
    assert (
        f"A promise of 0.02 nats per token gives the whole model, as the most careful plan needs {needs:.3f}." in told
    )


@pytest.mark.parametrize("strategy", ["adaskip", "early_exit", "skip_decode", "unified_skipping"])
def test_every_strategy_can_be_planned_within_80_columns(profile_path: Path, strategy: str) -> None:
    replace(Profile.load(profile_path), cost=cost_model(0.1, [0.2] * 3, [0.1] * 3)).save(profile_path)
    for mode in MODES:
        text = run("plan", profile_path, "--strategy", strategy, "--skip", 2, "--mode", mode).stdout
        assert f"strategy {strategy}, mode {mode}" in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 80
