"""``adaskip-cpp tune``: on a model of which two sublayers do nothing, so that the best plan is known."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import adaskip_cpp
import adaskip_cpp.cli.tune
import adaskip_cpp.tuning.speed
from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.cli.main import main
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring import corpus
from adaskip_cpp.measuring.distribution import token_losses
from adaskip_cpp.measuring.text_quality import TextQuality
from adaskip_cpp.model.cost_model import CostModel, CostSettings, PhaseCost
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import PlanFile, load_plan
from adaskip_cpp.model.promise import SpeedUp, Tuning
from adaskip_cpp.tuning.hold_out import hold_out
from adaskip_cpp.tuning.passkeys import Retrieval

IDLE = ((0, "attention"), (2, "ffn"))
"""The sublayers that add nothing to the residual stream."""

WORDS = ["the", "of", "to", "an", "in", "error", "there", "other", "one", "ten"]


def text(seed: int, n_words: int = 400) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n_words).tolist())


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, its profile, and two texts."""
    folder = tmp_path_factory.mktemp("tune")
    shutil.copy(tiny(zero=IDLE), folder / "m.gguf")
    for i in range(2):
        (folder / f"{i}.txt").write_text(text(i))
    llm = adaskip_cpp.AdaSkipLlama(str(folder / "m.gguf"), n_ctx=64, verbose=False)
    requests = [[1, *range(3 + i, 30 + i)] for i in range(4)]
    adaskip_cpp.calibrate(llm, requests, n_decode=4, cost=False).save(folder / "p.json")
    llm.close()
    return folder


@pytest.fixture
def tune(folder: Path, tmp_path: Path) -> Callable[..., Result]:
    """``tune(...)``: the verb on a copy of that model, quick: short texts, one of them to search, one to check."""
    for name in os.listdir(folder):
        shutil.copy(folder / name, tmp_path)

    def run(*args: object, exchange: int = 4, mode: str = "e2e") -> Result:
        words = [
            *("tune", tmp_path / "m.gguf", "--profile", tmp_path / "p.json"),
            *("--text", tmp_path / "0.txt", "--text", tmp_path / "1.txt", "--texts", 4, "--tokens", 24),
            *("--context", 16, "--answer", 4, "--exchange", exchange, "--mode", mode, *args),
        ]
        return CliRunner().invoke(main, [str(word) for word in words], prog_name="adaskip-cpp")

    return run


def tuned(path: Path) -> PlanFile:
    return load_plan(plan_path(path / "m.gguf"))


def skipped(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    decode = tuned(path).plan.decode
    return decode.attention, decode.ffn


def tuning(path: Path) -> Tuning:
    found = tuned(path).tuning
    assert found is not None
    return found


@pytest.mark.parametrize("mode", ["prefill", "decode", "e2e"])
def test_where_nothing_may_be_lost_it_skips_what_does_nothing(
    tune: Callable[..., Result], tmp_path: Path, mode: str
) -> None:
    # By agreement: a model of random weights may by chance lose less on a text with more of it skipped.
    result = tune("--min-agreement", 1, "--mode", mode)
    assert result.exit_code == 0, result.output
    found = tuning(tmp_path)
    assert (skipped(tmp_path), tuned(tmp_path).plan.mode) == (((0,), (2,)), mode)
    assert abs(found.loss.value) < 1e-5 and found.agreement.value == 1.0
    assert "choice for at least 100% of the tokens" in result.stdout and "2 of 6 sublayers" in result.stdout
    assert "at most" in result.stderr and "Ctrl-C" in result.stderr


def test_agreement_is_kept_on_text_judged_anew(tune: Callable[..., Result], tmp_path: Path) -> None:
    assert tune("--min-agreement", 0.2, exchange=8).exit_code == 0
    found = tuning(tmp_path)
    assert tuned(tmp_path).plan.decode.n_skip >= 2 and found.unbiased
    llm = adaskip_cpp.AdaSkipLlama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False)
    texts = {f"{i}.txt": (tmp_path / f"{i}.txt").read_text() for i in range(2)}
    choices: list[list[np.ndarray]] = []
    for plan in (None, tuned(tmp_path).plan):
        llm.set_plan(plan)
        choices.append([])
        for item in hold_out(llm, texts, 4, 24).report:
            llm.reset()
            llm.eval(list(item.tokens))
            choices[-1].append(llm.scores[:23].argmax(axis=1))
    llm.close()
    agreement = float((np.array(choices[0]) == np.array(choices[1])).mean())
    assert agreement == pytest.approx(found.agreement.value)


def test_a_loss_is_kept_on_text_judged_anew_by_the_model_opened_with_auto(
    tune: Callable[..., Result], tmp_path: Path
) -> None:
    result = tune("--max-loss", 0.5)
    assert result.exit_code == 0 and "an added loss of at most 0.5 nats per token" in result.stdout
    found = tuning(tmp_path)
    texts = {f"{i}.txt": (tmp_path / f"{i}.txt").read_text() for i in range(2)}
    means = []
    for plan in (None, "auto"):
        llm = adaskip_cpp.AdaSkipLlama(str(tmp_path / "m.gguf"), plan=plan, n_ctx=64, logits_all=True, verbose=False)
        means.append([token_losses(llm, item.tokens).mean() for item in hold_out(llm, texts, 4, 24).report])
        llm.close()
    added = float(np.mean(np.array(means[1]) - means[0]))
    assert added == pytest.approx(found.loss.value, abs=1e-4)


def test_where_no_skipping_keeps_the_promise_the_model_is_left_whole(
    tiny: Any, tune: Callable[..., Result], tmp_path: Path
) -> None:
    profile = Profile.load(tmp_path / "p.json")
    shutil.copy(tiny(), tmp_path / "m.gguf")  # every sublayer does something
    llm = adaskip_cpp.AdaSkipLlama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)
    profile = adaskip_cpp.calibrate(llm, [[1, *range(3, 40)]], n_decode=4, cost=False)
    llm.close()
    profile.save(tmp_path / "p.json")
    result = tune("--min-agreement", 1)
    assert result.exit_code == 0, result.output
    assert "No skipping keeps this promise" in result.stdout
    assert skipped(tmp_path) == ((), ()) and tuning(tmp_path).speedups == ()


def test_json_says_what_is_stored(tune: Callable[..., Result], tmp_path: Path) -> None:
    data = json.loads(tune("--max-loss", 1e-5, "--json").stdout)
    assert data.pop("path") == plan_path(tmp_path / "m.gguf")
    assert data["plan"] == json.loads(json.dumps(tuned(tmp_path).plan.to_dict()))
    assert [each["of"] for each in data["tuning"]["speedups"]] == ["first token", "decode", "request"]
    assert data["tuning"]["settings"] == tuning(tmp_path).settings
    for i, part in enumerate(("searched_on", "confirmed_on", "reported_on")):
        assert tuning(tmp_path).settings[part] == f"0.txt, part {i + 1} of 3, 1.txt, part {i + 1} of 3"


@pytest.mark.parametrize("n_texts", [30, 40])
def test_too_little_text_for_a_third_part_is_told_and_stored(
    tune: Callable[..., Result], tmp_path: Path, n_texts: int
) -> None:
    result = tune("--min-agreement", 1, "--texts", n_texts, exchange=0)
    assert result.exit_code == 0, result.output
    few = n_texts == 40
    assert tuning(tmp_path).unbiased is not few
    assert ("too little text for a part that decides nothing" in " ".join(result.stdout.split())) is few


def test_the_output_can_be_elsewhere(tune: Callable[..., Result], tmp_path: Path) -> None:
    result = tune("--max-loss", 1e-5, "-o", tmp_path / "other.json")
    assert result.exit_code == 0 and load_plan(tmp_path / "other.json").tuning is not None
    assert not Path(plan_path(tmp_path / "m.gguf")).exists()
    assert "--plan" in result.stdout


@pytest.mark.parametrize("when", [1, 3, 5])
def test_ctrl_c_leaves_all_files_as_they_were(
    tune: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []
    real = TextQuality._evaluate

    def interrupted(self: TextQuality, plan: SkipPlan | None, *texts: Any) -> Any:
        calls.append(plan)
        if len(calls) == when:
            raise KeyboardInterrupt
        return real(self, plan, *texts)

    monkeypatch.setattr(TextQuality, "_evaluate", interrupted)
    result = tune("--max-loss", 0.5)
    assert len(calls) == when and result.exit_code == 130 and "interrupted" in result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_speedup_needs_a_cost_model(tune: Callable[..., Result]) -> None:
    result = tune("--speedup", 1.2)
    assert result.exit_code == 1 and "no cost model" in result.stderr


@pytest.fixture
def costed(tune: Callable[..., Result], tmp_path: Path) -> Callable[..., Result]:
    """``tune``, with a profile that says how long sublayers take: FFNs three times as long as attentions."""
    cost = PhaseCost(1, 2.0, 0.0, np.tile([1.0, 3.0], (3, 1)), np.zeros(3), np.zeros(3))
    settings = CostSettings("a CPU", ("CPU",), 0, 2, 4, 512, 512, True, "F16", "F16", True, "0.3.36")
    prompt = replace(cost, n_tokens=16, fixed=0.0)  # its one ubatch has an output, which costs what a token's rest does
    model = CostModel(settings, prompt, cost, np.full(3, math.inf), 3, 16)
    replace(Profile.load(tmp_path / "p.json"), cost=model).save(tmp_path / "p.json")
    return tune


def measured(monkeypatch: pytest.MonkeyPatch, factor: float) -> list[int]:
    """Let a plan be measured as ``factor`` times its predicted speed; returns what was measured, by sublayers."""
    asked = []

    def measure(llm: Any, plan: SkipPlan, prompt: list[int], n_answer: int, **_: Any) -> tuple[SpeedUp, ...]:
        asked.append(plan.prefill.n_skip)
        saved = len(plan.prefill.attention) + 3 * len(plan.prefill.ffn)
        assert len(prompt) == 16 and n_answer == 4
        return (SpeedUp("request", 16, 4, Interval(factor * 14 / (14 - saved), 1.0, 9.0, 5)),)

    monkeypatch.setattr(adaskip_cpp.tuning.speed, "measure_speed", measure)
    return asked


def test_a_speedup_is_reached_with_what_harms_least(
    costed: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch, 1.0)
    result = costed("--speedup", 14 / 11)
    assert result.exit_code == 0, result.output
    attention, ffn = skipped(tmp_path)
    assert (attention, len(ffn)) == ((), 1) and asked == [1]
    texts = {f"{i}.txt": (tmp_path / f"{i}.txt").read_text() for i in range(2)}
    llm = adaskip_cpp.AdaSkipLlama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False)
    means = []
    for layer in range(3):
        llm.set_plan(Profile.load(tmp_path / "p.json").plan(strategy="manual", ffn=(layer,), mode="e2e"))
        means.append(np.mean([token_losses(llm, item.tokens).mean() for item in hold_out(llm, texts, 4, 24).search]))
    llm.close()
    assert ffn == (int(np.argmin(means)),)


def test_a_speedup_that_is_predicted_but_not_measured_is_aimed_at_anew(
    costed: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch, 0.9)
    assert costed("--speedup", 14 / 11).exit_code == 0
    assert len(asked) == 2 and tuning(tmp_path).speedups[0].ratio.value >= 14 / 11


def test_a_speedup_that_is_never_measured_is_told(
    costed: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, 0.1)
    result = costed("--speedup", 14 / 11)
    assert result.exit_code == 0 and "predicted but not measured" in result.stdout


def test_a_speedup_out_of_reach_says_how_far_one_can_go(costed: Callable[..., Result], tmp_path: Path) -> None:
    result = costed("--speedup", 8)  # without any sublayer 2 of 14 remain
    assert result.exit_code == 1 and "ask for at most 7.00" in result.stderr
    assert not Path(plan_path(tmp_path / "m.gguf")).exists()


def test_with_costs_the_plan_that_saves_more_is_found(costed: Callable[..., Result], tmp_path: Path) -> None:
    assert costed("--min-agreement", 1).exit_code == 0
    assert skipped(tmp_path) == ((0,), (2,))


# --- the prompt mode --------------------------------------------------------------------------------------------------


@pytest.fixture
def in_prompts(tune: Callable[..., Result]) -> Callable[..., Result]:
    """``tune`` in the mode that is the default."""

    def run(*args: object) -> Result:
        return tune(*args, exchange=0, mode="prompt")

    return run


def test_without_a_promise_a_loss_of_two_hundredths_behind_prompts_is_kept(
    in_prompts: Callable[..., Result], tmp_path: Path
) -> None:
    result = in_prompts()
    assert result.exit_code == 0, result.output
    found, plan = tuning(tmp_path), tuned(tmp_path).plan
    assert (found.promise.kind, found.promise.value) == ("max_loss", 0.02)
    assert plan.mode == "prompt" and plan.bulk is not None and plan.bulk.skip.attention[:1] == (0,)
    assert (
        plan.prefill.n_skip == plan.decode.n_skip == 0 and plan.bulk.skip.n_skip < 5
    )  # of the last layer nothing is saved
    assert found.divergence is not None and found.passkeys is None
    assert [(each.of, each.n_decode) for each in found.speedups] == [("first token", 0)]
    assert "in the bulk of prompts" in result.stdout and "divergence" in result.stdout
    assert 'plan="auto"' in result.stdout and "at most 5 plans" in result.stderr


def test_the_loss_behind_prompts_is_that_of_the_model_opened_with_auto(
    in_prompts: Callable[..., Result], tmp_path: Path
) -> None:
    assert in_prompts("--max-loss", 0.5).exit_code == 0
    found = tuning(tmp_path)
    texts = {f"{i}.txt": (tmp_path / f"{i}.txt").read_text() for i in range(2)}
    logits: list[list[np.ndarray]] = []
    for plan in (None, "auto"):
        llm = adaskip_cpp.AdaSkipLlama(str(tmp_path / "m.gguf"), plan=plan, n_ctx=64, verbose=False)
        items = [list(item.tokens) for item in hold_out(llm, texts, 4, 24).report]
        logits.append([])
        for item in items:
            llm.reset()
            llm.eval(item[:18])  # a quarter is judged
            rows = []
            for token in item[18:-1]:
                llm.eval_decode([token])
                rows.append(np.array(llm._ctx.get_logits()[: llm.n_vocab()], np.float64))
            logits[-1].append(np.array(rows))
        llm.close()
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in map(np.array, logits))
    targets = np.array([item[19:] for item in items])[..., None]
    added = (np.take_along_axis(log_p, targets, -1) - np.take_along_axis(log_q, targets, -1)).mean()
    assert found.loss.value == pytest.approx(float(added), abs=1e-4)
    assert found.divergence is not None
    assert found.divergence.value == pytest.approx(float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()), abs=1e-4)


def test_a_profile_without_divergence_serves_too(tune: Callable[..., Result], tmp_path: Path) -> None:
    profile = Profile.load(tmp_path / "p.json")
    replace(profile, divergence=None).save(tmp_path / "p.json")
    assert tune("--min-agreement", 1, mode="prompt").exit_code == 0
    assert tuned(tmp_path).plan.mode == "prompt"


def test_pass_keys_at_five_depths_are_asked_for_where_prompts_are_long_enough(
    in_prompts: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float | None, int]] = []

    def finds(self: Retrieval, plan: SkipPlan | None, item: Any) -> bool:
        n_skip = 0 if plan is None or plan.bulk is None else plan.bulk.skip.n_skip
        asked.append((item.depth, n_skip))
        return n_skip < 2

    monkeypatch.setattr(Retrieval, "_finds", finds)
    args = "--tokens", 200, "--texts", 2, "--max-loss", 10
    result = in_prompts(*args)
    assert result.exit_code == 0, result.output
    assert {depth for depth, _ in asked} == {0.1, 0.3, 0.5, 0.7, 0.9}
    bulk, keys = tuned(tmp_path).plan.bulk, tuning(tmp_path).passkeys
    assert (
        bulk is not None and bulk.skip.n_skip == 1 and keys is not None and (keys.n, keys.full, keys.plan) == (5, 5, 5)
    )
    assert "the plan 5 of these" in result.stdout
    assert in_prompts(*args, "--allow-lost-passkeys").exit_code == 0
    bulk, keys = tuned(tmp_path).plan.bulk, tuning(tmp_path).passkeys
    assert bulk is not None and bulk.skip.n_skip > 1 and keys is not None and (keys.full, keys.plan) == (5, 0)


def test_a_model_is_calibrated_and_how_long_it_takes_is_told_before(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tiny(), tmp_path / "m.gguf")
    (tmp_path / "0.txt").write_text(text(0, 2000))
    (tmp_path / "1.txt").write_text(text(1, 2000))
    monkeypatch.setattr(adaskip_cpp.cli.tune, "_CTX_TIMED", 600)
    words = ["tune", tmp_path / "m.gguf", "--data", tmp_path / "0.txt", "--text", tmp_path / "1.txt", "--texts", 2,
             "--tokens", 48, "--context", 32]  # fmt: skip
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "tokens per second, so calibration will take about" in " ".join(result.stderr.split())
    assert tuned(tmp_path).plan.mode == "prompt" and Profile.load(tmp_path / "m.adaskip.json").divergence is not None


@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_is_calibrated_and_tuned_with_the_built_in_text(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaskip_cpp.cli.tune, "_SLOW", math.inf)  # as a slow model, a minute and a half less
    words = ["tune", smollm2_path, "--max-loss", 0.2, "-o", tmp_path / "p.json", "--texts", 4, "--tokens", 320,
             "--context", 320, "--json"]  # fmt: skip
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    found = load_plan(tmp_path / "p.json")
    assert found.plan.bulk is not None and found.plan.bulk.skip.n_skip > 2 and found.plan.decode.n_skip == 0
    assert found.tuning is not None and found.tuning.unbiased and found.tuning.divergence is not None
    assert [each.of for each in found.tuning.speedups] == ["first token"]
    keys = found.tuning.passkeys
    assert keys is not None and keys.n == 3 and keys.plan == keys.full
    settings = json.loads(result.stdout)["tuning"]["settings"]
    assert settings["calibrated_on"].startswith("pages of pydoc_data")
    pages = [settings[part].split(", ") for part in ("searched_on", "confirmed_on", "reported_on")]
    assert len(set().union(*pages)) == sum(map(len, pages)) and set().union(*pages) <= {
        *corpus.HELD_OUT,
        *corpus.SOURCES.split(),
    }
    assert Profile.load(tmp_path / "p.adaskip.json").plan(4, mode="e2e").prefill.n_skip == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-loss", 1, "--speedup", 1.1], "give one of --max-loss"),
        (["--max-loss", 1, "--data", "x.txt"], "leave out --profile"),
        (["--max-loss", -1], "--max-loss"),
    ],
)
def test_options_that_contradict_each_other_are_a_usage_error(
    tune: Callable[..., Result], args: list[object], message: str
) -> None:
    result = tune(*args)
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "nope.txt"], "nope.txt"),
        (["--texts", 400], "more text"),
        (["--tokens", 5000], "text"),
        (["-o", "/nowhere/p.json"], "no folder '/nowhere'"),
    ],
)
def test_what_cannot_be_judged_or_written_is_told_before_the_work(
    tune: Callable[..., Result], args: list[object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("evaluated")

    monkeypatch.setattr(TextQuality, "_evaluate", refuse)
    result = tune("--max-loss", 1, *args)
    assert result.exit_code == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(
    tune: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    result = tune("--max-loss", 1)
    assert result.exit_code == 1 and "cannot write" in result.stderr and "-o FILE" in result.stderr


def test_a_profile_of_another_model_is_refused(tune: Callable[..., Result], tiny: Any, tmp_path: Path) -> None:
    shutil.copy(tiny(), tmp_path / "m.gguf")
    result = tune("--max-loss", 1)
    assert result.exit_code == 1 and "another model" in result.stderr


def test_text_that_taught_may_not_judge(folder: Path, tmp_path: Path) -> None:
    words = ["tune", folder / "m.gguf", "--max-loss", 1, "--data", folder / "0.txt", "--text", folder / "0.txt",
             "-o", tmp_path / "p.json"]  # fmt: skip
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 1 and "cannot both teach and judge" in result.stderr
