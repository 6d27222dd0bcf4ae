"""The tuned plan of a profile: what is stored, what is refused, and who uses it without being told."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from stock import EXACT
from tiny_families import N_EMBD

import adaskip_cpp
from adaskip_cpp import Profile
from adaskip_cpp.cli.main import main
from adaskip_cpp.engine.auto import profile_path
from adaskip_cpp.errors import PlanError, ProfileFormatError, ProfileMismatchError, ProfileMissingError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.model.identity import ModelInfo, fingerprint
from adaskip_cpp.model.statistics import PhaseStatistics
from adaskip_cpp.model.tuned import Promise, SpeedUp, TunedPlan

NAN = float("nan")

TUNED = TunedPlan(
    attention=(2,),
    ffn=(0, 1),
    promise=Promise("max_loss", 0.25),
    loss=Interval(0.125, 0.0625, 0.25, 8),
    agreement=Interval(0.75, 0.5, 0.875, 8),
    n_texts=8,
    n_tokens=800,
    speedups=(SpeedUp("request", 2048, 128, Interval(1.25, NAN, NAN, 1)),),
    settings={"checked_on": "some text", "tokens_per_text": 100, "share": 0.5, "cpu": None},
)


def make(model: Path | None = None, tuned: TunedPlan | None = TUNED, **changes: Any) -> Profile:
    rng = np.random.default_rng(0)
    similarity = np.linspace(0.5, 0.99, 6).reshape(3, 2)
    ones, vectors = np.ones((3, 2)), rng.normal(size=(2, 3, 2, N_EMBD)).astype(np.float32)
    statistics = PhaseStatistics(similarity, ones, 2 * ones, np.ones(3), *vectors, 10)
    info = ModelInfo("ab" * 32 if model is None else fingerprint(model), "llama", 3)
    return Profile(statistics, statistics, 1, 10, info, tuned=tuned, **changes)


@pytest.fixture
def model(tiny: Any, tmp_path: Path) -> Path:
    """A copy of the tiny llama model in a folder of its own."""
    return Path(shutil.copy(tiny(), tmp_path / "model.Q4.gguf"))


@pytest.fixture
def open_auto() -> Any:
    """``open_auto(path, plan="auto")``: the model opened with that plan, closed after the test."""
    opened = []

    def open_(path: Path, plan: Any = "auto") -> Any:
        opened.append(adaskip_cpp.AdaSkipLlama(str(path), n_ctx=64, logits_all=True, plan=plan, verbose=False, **EXACT))
        return opened[-1]

    yield open_
    for llm in opened:
        llm.close()


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_a_profile_with_a_tuned_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    profile = make()
    profile.save(tmp_path / "p.json")
    loaded = Profile.load(tmp_path / "p.json")
    assert loaded.tuned is not None and loaded.tuned.to_dict() == TUNED.to_dict()
    assert loaded.tuned_plan() == profile.tuned_plan()


def test_the_plan_skips_what_is_listed_and_compensates_from_the_profile() -> None:
    plan = make().tuned_plan()
    assert (plan.prefill.attention, plan.prefill.ffn) == ((2,), (0, 1))
    assert plan.decode == plan.prefill and plan.online is None
    assert (plan.strategy, plan.compensation, plan.mode) == ("tuned", "affine", "e2e")
    assert plan.prefill.scale[2, 0] == 2.0 and plan.prefill.bias is not None
    decode = make(tuned=replace(TUNED, mode="decode", online=True)).tuned_plan()
    assert decode.prefill.n_skip == 0 and decode.decode.n_skip == 3 and decode.online is not None


def test_a_profile_without_a_tuned_plan_says_how_to_get_one() -> None:
    with pytest.raises(PlanError, match="adaskip-cpp tune"):
        make(tuned=None).tuned_plan()


def put(data: dict[str, Any], path: str, value: Any) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        data = data[folder]
    data[name] = value


LOST = object()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((name, LOST) for name in TUNED.to_dict()),
        *((name, 3) for name in ("promise", "measured", "attention", "speedups", "settings", "mode", "compensation")),
        ("attention", [3]),
        ("attention", [-1]),
        ("attention", [2, 1]),
        ("attention", [1, 1]),
        ("ffn", [True]),
        ("ffn", [0.0]),
        ("ffn", ["0"]),
        ("ffn", {"0": 1}),
        ("online", 1),
        ("mode", "both"),
        ("mode", []),
        ("compensation", "best"),
        ("promise.kind", "beauty"),
        ("promise.kind", []),
        ("promise.value", -0.1),
        ("promise.value", "0.1"),
        ("promise.value", None),
        ("promise.value", True),
        ("measured.loss", None),
        ("measured.loss", {"value": None, "low": 0, "high": 1, "n": 2}),
        ("measured.loss", {"value": 0.1, "low": "0", "high": 1, "n": 2}),
        ("measured.agreement", {"value": 0.1, "low": 0, "high": 1}),
        ("measured.n_texts", -1),
        ("measured.n_tokens", 1.5),
        ("speedups", [{"of": "waiting", "context": 1, "n_decode": 1, "ratio": {}}]),
        ("speedups", [3]),
        ("settings", {"a": [1]}),
    ],
)
def test_a_malformed_tuned_plan_is_refused(path: str, value: Any, tmp_path: Path) -> None:
    make().save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    if value is LOST:
        del data["tuned"][path]
    else:
        put(data["tuned"], path, value)
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(ProfileFormatError, match=r"p\.json.*(tune|calibrate)"):
        Profile.load(tmp_path / "p.json")


def test_a_tuned_plan_that_its_profile_cannot_make_is_refused() -> None:
    holes = copy.copy(make().prefill)
    similarity = holes.similarity.copy()
    similarity[0, 1] = NAN
    ratio = np.where(np.isnan(similarity), NAN, 1.0)
    statistics = PhaseStatistics(similarity, ratio, ratio, np.ones(3), n_tokens=10)
    info = ModelInfo("ab" * 32, "llama", 3)
    with pytest.raises(ProfileFormatError, match="cannot skip FFN of layer 0"):
        Profile(statistics, statistics, 1, 10, info, tuned=replace(TUNED, compensation="none"))
    with pytest.raises(ProfileFormatError, match="affine"):
        Profile(statistics, statistics, 1, 10, info, tuned=replace(TUNED, ffn=()))


@pytest.mark.parametrize(
    ("kind", "value"), [("max_loss", -1), ("max_loss", NAN), ("min_agreement", 1.1), ("speedup", 0.9), ("fun", 1)]
)
def test_an_impossible_promise_is_refused(kind: Any, value: float) -> None:
    with pytest.raises(PlanError, match="use"):
        Promise(kind, value)


# --- AdaSkipLlama(plan="auto") ----------------------------------------------------------------------------------------


def test_auto_uses_the_plan_beside_the_model(model: Path, open_auto: Any) -> None:
    make(model).save(profile_path(model))
    assert Path(profile_path(model)).name == "model.Q4.adaskip.json"
    llm, by_hand = open_auto(model), open_auto(model, make(model).tuned_plan())
    assert llm.plan == make(model).tuned_plan() and llm.elided_kv == (2,)
    for each in (llm, by_hand):
        each.eval([1, 5, 6, 7])
    np.testing.assert_array_equal(llm.scores[:4], by_hand.scores[:4])


def test_auto_runs_the_whole_model_where_tuning_left_it_whole(model: Path, open_auto: Any) -> None:
    make(model, replace(TUNED, attention=(), ffn=())).save(profile_path(model))
    assert open_auto(model).plan is None


def test_auto_without_a_profile_says_what_to_run(model: Path, open_auto: Any) -> None:
    with pytest.raises(ProfileMissingError, match=r"model\.Q4\.adaskip\.json.*`adaskip-cpp tune .*model\.Q4\.gguf`"):
        open_auto(model)


def test_auto_without_a_tuned_plan_says_what_to_run(model: Path, open_auto: Any) -> None:
    make(model, None).save(profile_path(model))
    with pytest.raises(PlanError, match=r"no tuned plan.*`adaskip-cpp tune .*model\.Q4\.gguf`"):
        open_auto(model)


def test_auto_refuses_the_plan_of_another_model(model: Path, open_auto: Any) -> None:
    make().save(profile_path(model))
    with pytest.raises(ProfileMismatchError, match=r"another model.*tune"):
        open_auto(model)


def test_another_word_than_auto_is_refused(model: Path, open_auto: Any) -> None:
    with pytest.raises(PlanError, match='"auto"'):
        open_auto(model, "fast")


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def generate(model: Path) -> Callable[..., Result]:
    """``generate(...)``: the verb on that model, with a short answer."""

    def run(*args: object) -> Result:
        words = ["generate", model, "-p", "the end", "--raw", "--ctx", 64, "--max-tokens", 4, "--temp", 0, *args]
        return CliRunner().invoke(main, [str(word) for word in words], prog_name="adaskip-cpp")

    return run


def test_generate_uses_the_plan_beside_the_model_and_says_so(generate: Any, model: Path) -> None:
    whole = generate()
    assert whole.exit_code == 0 and "skipped" not in whole.stderr
    make(model).save(profile_path(model))
    tuned = generate()
    assert tuned.exit_code == 0, tuned.output
    said = " ".join(tuned.stderr.split())
    assert "3 of 6 sublayers are skipped" in said and "model.Q4.adaskip.json; --full runs" in said
    assert tuned.stdout == generate("--profile", profile_path(model)).stdout


def test_full_runs_the_whole_model(generate: Any, model: Path) -> None:
    whole = generate()
    make(model).save(profile_path(model))
    full = generate("--full")
    assert full.exit_code == 0 and full.stdout == whole.stdout and "skipped" not in full.stderr
    assert generate("--full", "--skip", 2).exit_code == 2


def test_what_to_skip_is_taken_from_the_profile_beside_the_model(generate: Any, model: Path) -> None:
    assert generate("--skip", 2).exit_code == 2
    make(model, None).save(profile_path(model))
    result = generate("--skip", 2, "--no-online")
    assert result.exit_code == 0 and "2 of 6" in " ".join(result.stderr.split())


def test_a_profile_beside_the_model_that_cannot_be_used_is_told_and_not_used(generate: Any, model: Path) -> None:
    whole = generate()
    make().save(profile_path(model))
    result = generate()
    assert result.exit_code == 0 and result.stdout == whole.stdout
    assert "The whole model runs" in result.stderr and "another model" in " ".join(result.stderr.split())


def test_a_named_profile_of_another_model_is_refused(generate: Any, tmp_path: Path) -> None:
    make().save(tmp_path / "other.json")
    result = generate("--profile", tmp_path / "other.json")
    assert result.exit_code == 1 and "another model" in result.stderr and result.stdout == ""
