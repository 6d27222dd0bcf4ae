"""adaskip_cpp.measuring.text_quality: what a plan costs on texts, against the NumPy float64 pass."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from reference import OnlineReference, ReferenceModel, ReferenceRun
from tiny_models import write_model

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import DataError, RequestError
from adaskip_cpp.measuring.text_quality import TextQuality
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.skip_set import SkipSet

N_LAYER = 5
FIXED = SkipPlan.manual(N_LAYER, attention=[1], ffn=[2], scale=0.9).prefill


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of five layers."""
    return write_model(tmp_path_factory.mktemp("quality") / "five.gguf", n_layer=N_LAYER)


@pytest.fixture(scope="module")
def model(path: Path) -> ReferenceModel:
    return ReferenceModel(path)


@pytest.fixture
def texts(tokens: Any) -> list[list[int]]:
    return [tokens(24, seed) for seed in range(4)]


def figures(full: npt.NDArray[Any], own: npt.NDArray[Any], targets: Sequence[int]) -> tuple[float, float]:
    """Added loss and agreement of logits, one row in front of each target."""

    def losses(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        rows = logits.astype(np.float64)
        log_p = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        return -log_p[np.arange(len(targets)), list(targets)]

    return float((losses(own) - losses(full)).mean()), float((own.argmax(axis=1) == full.argmax(axis=1)).mean())


def answer_logits(model: ReferenceModel, text: list[int], plan: SkipPlan) -> npt.NDArray[Any]:
    """Of a request whose prompt is the text's first half, read by the whole model, and whose answer is the rest."""
    begin, run = len(text) // 2, ReferenceRun(model)
    run.eval(text[:begin])
    stage = plan.online or OnlineStage(window=1, threshold=2.0)
    decode = OnlineReference(stage.window, stage.threshold, stage.scale, plan.decode.skip, plan.decode.scale)
    rows = []
    for token in text[begin:-1]:
        trace = run.eval([token], decode.skip, decode.factor)
        decode.observe(trace)
        rows.append(trace.logits[-1])
    return np.array(rows)


def expected(model: ReferenceModel, text: list[int], plan: SkipPlan) -> tuple[float, float]:
    whole = ReferenceRun(model).eval(text).logits
    return figures(whole[len(text) // 2 : -1], answer_logits(model, text, plan), text[len(text) // 2 + 1 :])


def test_a_text_is_judged_as_one_prompt(path: Path, model: ReferenceModel, texts: Any, open_model: Any) -> None:
    plan = SkipPlan(FIXED, FIXED)
    scores = TextQuality(open_model(path), texts).scores(plan)
    for i, text in enumerate(texts):
        whole = ReferenceRun(model).eval(text).logits
        own = ReferenceRun(model).eval(text, FIXED.skip, FIXED.scale).logits
        loss, agreement = figures(whole[:-1], own[:-1], text[1:])
        assert scores.loss[i] == pytest.approx(loss, abs=1e-5) and scores.agreement[i] == agreement


def test_in_decode_mode_the_full_model_reads_the_first_half(
    path: Path, model: ReferenceModel, texts: Any, open_model: Any
) -> None:
    plan = SkipPlan(SkipSet.none(N_LAYER), FIXED)
    quality = TextQuality(open_model(path), texts, "decode")
    scores = quality.scores(plan)
    assert quality.n_tokens == 4 * 11
    for i, text in enumerate(texts):
        loss, agreement = expected(model, text, plan)
        assert scores.loss[i] == pytest.approx(loss, abs=1e-5) and scores.agreement[i] == agreement


def test_a_schedule_changes_the_set_within_a_text(
    path: Path, model: ReferenceModel, texts: Any, open_model: Any
) -> None:
    more = SkipPlan.manual(N_LAYER, attention=[1], ffn=[2, 3], scale=0.9).prefill
    plan = SkipPlan(SkipSet.none(N_LAYER), FIXED, schedule=((0, FIXED), (5, more)))
    scores = TextQuality(open_model(path), texts, "decode").scores(plan)
    for i, text in enumerate(texts):
        run = ReferenceRun(model)
        whole = ReferenceRun(model).eval(text).logits
        run.eval(text[:12])
        first = run.eval(text[12:17], FIXED.skip, FIXED.scale).logits
        rest = run.eval(text[17:-1], more.skip, more.scale).logits
        loss, agreement = figures(whole[12:-1], np.concatenate([first, rest]), text[13:])
        assert scores.loss[i] == pytest.approx(loss, abs=1e-5) and scores.agreement[i] == agreement


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    rows = logits.astype(np.float64)
    return np.asarray(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))


@pytest.mark.parametrize(("divergence", "most_kept"), [(False, 1 << 30), (True, 1 << 30), (True, 0)])
def test_in_prompt_mode_the_tokens_behind_a_bulk_are_judged(
    path: Path, model: ReferenceModel, texts: Any, open_model: Any, divergence: bool, most_kept: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr("adaskip_cpp.measuring.text_quality._MOST_KEPT", most_kept)
    bulk = SkipPlan.manual(N_LAYER, attention=[1], ffn=[2, 3], scale=0.9).prefill
    none = SkipSet.none(N_LAYER)
    plan = SkipPlan(none, none, bulk=Bulk(bulk, head=2, tail=3))
    quality = TextQuality(open_model(path, logits_all=False), texts, "prompt", n_behind=6)
    assert quality.n_tokens == 4 * 5
    scores = quality.scores(plan, divergence=divergence)
    assert (scores.divergence is not None) is divergence
    for i, text in enumerate(texts):  # 18 tokens of a prompt, of which 13 are its bulk
        run = ReferenceRun(model)
        run.eval(text[:2])
        run.eval(text[2:15], bulk.skip, bulk.scale, keeps_kv=True)
        own = run.eval(text[15:]).logits[3:-1]
        whole = ReferenceRun(model).eval(text).logits[18:-1]
        loss, agreement = figures(whole, own, text[19:])
        assert loss != pytest.approx(0.0, abs=1e-4)
        assert scores.loss[i] == pytest.approx(loss, abs=1e-5) and scores.agreement[i] == agreement
        if scores.divergence is not None:
            log_p, log_q = log_softmax(whole), log_softmax(own)
            kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
            assert scores.divergence[i] == pytest.approx(kl, rel=1e-3, abs=1e-6)


def test_of_a_short_text_a_quarter_is_judged_behind_its_prompt(path: Path, texts: Any, open_model: Any) -> None:
    quality = TextQuality(
        open_model(path, logits_all=False), [text[:n] for text, n in zip(texts, (24, 8, 4), strict=False)], "prompt"
    )
    assert quality.n_tokens == 5 + 1 + 1


def test_the_full_model_is_evaluated_once_however_many_plans_are_judged(
    path: Path, texts: Any, open_model: Any
) -> None:
    n_read: list[int] = []
    llm = open_model(path, logits_all=False)
    quality = TextQuality(llm, texts, "prompt", advance=n_read.append)
    for layer in (1, 2, 3):
        none, bulk = SkipSet.none(N_LAYER), SkipPlan.manual(N_LAYER, ffn=[layer]).prefill
        quality.scores(SkipPlan(none, none, bulk=Bulk(bulk)))
    assert n_read == [24] * 4 * 4


# --- the online stage -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def online(model: ReferenceModel, tokens: Any) -> SkipPlan:
    """A plan whose online stage adds other FFNs to one text than to another."""
    found: list[OnlineReference] = []
    for seed in range(4):
        text, run = tokens(24, seed), ReferenceRun(model)
        run.eval(text[:12])
        found.append(OnlineReference(4, 2.0, "paper", FIXED.skip, FIXED.scale))
        for token in text[12:17]:
            found[-1].observe(run.eval([token], FIXED.skip, FIXED.scale))
    similarity = np.array([each.similarity for each in found])[:, [0, 1, 3, 4]]
    threshold = float(np.median(similarity))
    assert len({tuple(row >= threshold) for row in similarity}) > 1
    stage = OnlineStage(window=4, threshold=threshold)
    return SkipPlan(SkipSet.none(N_LAYER), FIXED, online=stage, mode="decode")


def test_each_text_makes_an_online_choice_of_its_own(
    path: Path, model: ReferenceModel, texts: Any, online: SkipPlan, open_model: Any
) -> None:
    scores = TextQuality(open_model(path), texts, "decode").scores(online)
    for i, text in enumerate(texts):
        loss, agreement = expected(model, text, online)
        assert scores.loss[i] == pytest.approx(loss, abs=1e-5) and scores.agreement[i] == agreement


def test_scores_do_not_depend_on_the_order_of_the_texts(
    path: Path, texts: Any, online: SkipPlan, open_model: Any
) -> None:
    forward = TextQuality(open_model(path), texts, "decode").scores(online)
    backward = TextQuality(open_model(path), texts[::-1], "decode").scores(online)
    np.testing.assert_array_equal(forward.loss, backward.loss[::-1])
    np.testing.assert_array_equal(forward.agreement, backward.agreement[::-1])


def test_scores_are_those_of_each_text_in_a_fresh_model(
    path: Path, texts: Any, online: SkipPlan, open_model: Any
) -> None:
    together = TextQuality(open_model(path), texts, "decode").scores(online)
    alone = [TextQuality(open_model(path), [text] * 2, "decode").scores(online).loss[0] for text in texts]
    np.testing.assert_array_equal(together.loss, alone)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_one_text_or_logits_of_the_last_token_alone_are_refused(tiny: Any, tokens: Any, open_model: Any) -> None:
    llm = open_model(tiny())
    with pytest.raises(DataError, match="at least 2"):
        TextQuality(llm, [tokens(20)])
    with pytest.raises(RequestError, match="from 4 to 128"):
        TextQuality(llm, [tokens(20), tokens(129)])
    with pytest.raises(RequestError, match="logits_all"):
        TextQuality(open_model(tiny(), logits_all=False), [tokens(20)] * 2)
    assert TextQuality(open_model(tiny(), logits_all=False), [tokens(20)] * 2, "decode").n_texts == 2
