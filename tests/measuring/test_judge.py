"""adaskip_cpp.measuring.judge: what a plan changes in known answers, against NumPy passes and plain evaluations."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracles.expected import log_probabilities
from oracles.fixtures import Open
from oracles.reference import OnlineReference, ReferenceRun
from oracles.skip_sets import filled
from oracles.tiny_families import N_VOCAB, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import DataError
from adaskip_cpp.measuring.judge import Judge, Scores
from adaskip_cpp.measuring.probes import Probe, probes_of
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.skip_set import SkipSet

NONE = SkipSet.none(3)
FIXED = SkipPlan.manual(3, attention=[1], ffn=[0], scale=0.9).prefill
BULK = SkipPlan(NONE, NONE, bulk=Bulk(FIXED, head=2, tail=3))
NO_LLM: Any = None

PROBES = [
    probe
    for i in range(2)
    for probe in probes_of(NO_LLM, f"text {i}", tokens(70, i), (40, 60), n_continued=6, n_copied=20)
]
"""Of two texts, at two lengths each, one answer that continues and one that copies."""


def by_definition(whole: Any, own: Any, targets: Sequence[int]) -> Scores:
    """The figures in float64, of one row of logits in front of each target."""
    log_p, log_q = log_probabilities(whole), log_probabilities(own)
    at = np.arange(len(targets))
    others = np.where(np.arange(log_p.shape[1]) == np.array(targets)[:, None], -np.inf, log_p)
    best, found = log_q.argmax(axis=1), log_p.argmax(axis=1)
    return Scores(
        (np.exp(log_p) * (log_p - log_q)).sum(axis=1),
        log_p[at, targets] - log_q[at, targets],
        best == found,
        best == np.array(targets),
        log_p[at, targets] - others.max(axis=1),
    )


def assert_scores(found: Scores, wanted: Scores, atol: float = 1e-5) -> None:
    """Logits of F32 models are right to about 1e-6 of the largest, which is near 10."""
    for name in ("divergence", "loss", "whole_margin"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=atol, err_msg=name)
    assert found.agrees.tolist() == wanted.agrees.tolist() and found.right.tolist() == wanted.right.tolist()


def skipping(llm: Any) -> SkipPlan:
    """A plan whose bulk skips all that it can, but for the last layer, which nobody reads."""
    none, skip = SkipSet.none(llm.n_layer), np.reshape([row.in_bulk for row in llm.sublayers], (llm.n_layer, 2))
    skip[-1] = False
    return SkipPlan(none, none, bulk=Bulk(SkipSet(skip, np.full(skip.shape, 0.9)), head=2, tail=3))


def test_the_figures_and_the_whole_models_losses_are_those_of_a_numpy_pass(open_tiny: Open, numpy_model: Open) -> None:
    model, judge = numpy_model(), Judge(open_tiny(), PROBES)
    for probe, whole_loss, found in zip(PROBES, judge.whole_losses, judge(BULK), strict=True):
        whole, own, begin = ReferenceRun(model), ReferenceRun(model), probe.n_prompt - 3
        whole.eval(probe.tokens[: probe.n_prompt])
        own.eval(probe.tokens[:2])
        own.eval(probe.tokens[2:begin], FIXED.skip, FIXED.scale, keeps_kv=True)
        own.eval(probe.tokens[begin : probe.n_prompt])
        rows = [run.eval(probe.answer[:-1]).logits[probe.n_cue - 1 :] for run in (whole, own)]
        targets = probe.answer[probe.n_cue :]
        assert_scores(found, by_definition(*rows, targets))
        assert found.divergence.max() > 1e-3
        np.testing.assert_allclose(whole_loss, -log_probabilities(rows[0])[np.arange(len(targets)), targets], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "jamba", "lfm2", "mamba", "gemma4-per-layer"])
@pytest.mark.parametrize("logits_all", [False, True])
def test_the_figures_are_those_of_plain_evaluations_of_each_prompt(
    name: str, logits_all: bool, open_tiny: Open
) -> None:
    llm = open_tiny(name, logits_all=logits_all)
    plan = skipping(llm)

    def rows(probe: Probe, of: SkipPlan | None) -> npt.NDArray[np.float32]:
        llm.reset()
        llm.set_plan(of)
        llm.eval(probe.tokens[: probe.n_prompt])
        return np.asarray(llm.logits_after(probe.answer[:-1])[probe.n_cue - 1 :])

    for probe, found in zip(PROBES, Judge(llm, PROBES)(plan), strict=True):
        # GELU is a table in F16 on CPUs, whose rounding depends on the batch a little.
        assert_scores(found, by_definition(rows(probe, None), rows(probe, plan), probe.answer[probe.n_cue :]), 1e-4)


@pytest.mark.parametrize("name", ["jamba", "mamba"])
def test_a_model_that_cannot_go_back_reads_each_prompt_once(name: str, open_tiny: Open) -> None:
    llm = open_tiny(name)
    plan, before = skipping(llm), llm.n_evaluated
    assert llm.has_state
    Judge(llm, PROBES)(plan)
    prompts = {(probe.text, probe.n_prompt) for probe in PROBES}
    n_answers = sum(len(probe.answer) - 1 for probe in PROBES)
    assert llm.n_evaluated - before <= 2 * (sum(n for _, n in prompts) + n_answers), (
        "by the whole model and by the plan"
    )


def test_a_plan_that_skips_nothing_changes_nothing_and_the_last_answer_is_in_the_cache(open_tiny: Open) -> None:
    llm, last = open_tiny(), PROBES[-1]
    for each in Judge(llm, PROBES)(SkipPlan(NONE, NONE, bulk=Bulk(NONE))):
        assert not each.divergence.any() and not each.loss.any() and each.agrees.all()
    assert llm.input_ids[: llm.n_tokens].tolist() == [*last.tokens[: last.n_prompt], *last.answer[:-1]]


def test_what_is_lumped_together_hides_a_part_of_the_divergence(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than there is, as two sets of events have no greater divergence than their finest parts."""
    llm, found = open_tiny(), []
    for kept in (1, 64, 1 << 30):
        monkeypatch.setattr("adaskip_cpp.measuring.judge._MOST_KEPT", kept)
        found.append(np.concatenate([each.divergence for each in Judge(llm, PROBES)(BULK)]))
    assert (found[0] <= found[1] + 1e-6).all() and (found[1] <= found[2] + 1e-6).all()
    assert 0 < found[0].mean() < found[1].mean() < found[2].mean()


def test_a_token_that_cannot_follow_adds_nothing(open_tiny: Open) -> None:
    llm, others = open_tiny(), np.setdiff1d(np.arange(N_VOCAB), PROBES[0].answer)
    real, banned = llm.logits_after, np.isin(np.arange(N_VOCAB), others[:9])  # one of all tokens is never kept
    llm.logits_after = lambda tokens: np.where(banned, -np.inf, real(tokens))
    [found] = Judge(llm, PROBES[:1])(BULK)
    assert np.isfinite(found.divergence).all() and np.isfinite(found.loss).all()


ANSWERING = [Probe(str(i), "continuation", text, 12, text[12:]) for i in range(4) for text in [tuple(tokens(24, i))]]


def test_a_schedule_changes_the_set_within_an_answer(open_tiny: Open, numpy_model: Open) -> None:
    more = SkipPlan.manual(3, attention=[1], ffn=[0, 2], scale=0.9).prefill
    plan, model = SkipPlan(NONE, FIXED, schedule=((0, FIXED), (5, more))), numpy_model()
    for probe, found in zip(ANSWERING, Judge(open_tiny(), ANSWERING)(plan), strict=True):
        run, text = ReferenceRun(model), probe.tokens
        whole = ReferenceRun(model).eval(text).logits[12:-1]
        run.eval(text[:12])
        own = [run.eval(text[12:17], FIXED.skip, FIXED.scale), run.eval(text[17:-1], more.skip, more.scale)]
        assert_scores(found, by_definition(whole, np.concatenate([each.logits for each in own]), text[13:]))


def test_each_answer_makes_an_online_choice_of_its_own(open_tiny: Open, numpy_model: Open) -> None:
    model, skip = numpy_model(), SkipPlan.manual(3, attention=[1], scale=0.9).prefill

    def run(probe: Probe, threshold: float) -> tuple[OnlineReference, Any]:
        whole, decode = ReferenceRun(model), OnlineReference(4, threshold, "paper", skip.skip, skip.scale)
        whole.eval(probe.tokens[:12])
        rows = []
        for token in probe.tokens[12:-1]:
            trace = whole.eval([token], decode.skip, decode.factor)
            decode.observe(trace)
            rows.append(trace.logits[-1])
        return decode, np.array(rows)

    threshold = float(np.median([run(probe, 2.0)[0].similarity for probe in ANSWERING]))
    plan = SkipPlan(NONE, skip, online=OnlineStage(window=4, threshold=threshold), mode="decode")
    chosen = set()
    for probe, found in zip(ANSWERING, Judge(open_tiny(), ANSWERING)(plan), strict=True):
        decode, rows = run(probe, threshold)
        chosen.add(decode.skip.tobytes())
        whole = ReferenceRun(model).eval(probe.tokens).logits[12:-1]
        assert_scores(found, by_definition(whole, rows, probe.tokens[13:]))
    assert len(chosen) > 1


def test_the_whole_model_reads_once_and_a_plan_the_bulk_of_a_text_once(open_tiny: Open) -> None:
    """The whole model reads again for another head or tail, in the same batches."""
    judge, scores, n_read = Judge(open_tiny(), PROBES), [], []
    others = [SkipPlan(NONE, NONE, bulk=Bulk(each, head=2, tail=tail)) for each, tail in ((NONE, 3), (FIXED, 5))]
    for plan in (BULK, BULK, *others, BULK):
        scores.append(judge(plan))
        n_read.append(judge.n_evaluated)  # 1 before the first token
    # Of each text the shorter prompt, an answer, and a copy; the longer prompt without the bulk of the shorter one.
    once, other = (2 * (40 + 5 + 19 + 60 - (40 - tail) + 5 + 19) for tail in (3, 5))
    assert np.diff([1, *n_read]).tolist() == [2 * once, once, once, 2 * other, 2 * once]
    for first, again in zip(scores[0], scores[-1], strict=True):
        np.testing.assert_equal(vars(again), vars(first))


def test_a_text_that_is_put_first_keeps_its_scores_and_is_not_read_again_by_the_whole_model(open_tiny: Open) -> None:
    judge = Judge(open_tiny(), PROBES)
    judge.put_first("text 1")
    judge.put_first("text 0")  # as before, also if nothing was read
    before, n_before = judge(BULK), judge.n_evaluated
    judge.put_first("text 1")
    after, n_after = judge(BULK), judge.n_evaluated
    assert [each.text for each in judge.probes] == ["text 1"] * 4 + ["text 0"] * 4
    for first, again in zip(before, after[4:] + after[:4], strict=True):
        np.testing.assert_equal(vars(again), vars(first))
    assert n_after - n_before == n_before // 2, "the plan alone"


def test_the_whole_model_and_a_plan_that_fits_its_maps_read_the_batches_of_any_prompt(open_tiny: Open) -> None:
    llm, read = open_tiny(), list[list[int]]()
    judge, maps = Judge(llm, PROBES), filled(FIXED.skip, parts=("down", "up"))
    plan = SkipPlan(NONE, NONE, bulk=Bulk(maps, head=2, tail=3, refit=16))
    for read_them in (judge, judge, lambda plan: (llm.reset(), llm.set_plan(plan), llm.eval(PROBES[0].tokens[:40]))):
        llm.on_batch = (ends := list[int]()).append
        read_them(plan)
        read.append([*dict.fromkeys(ends)])
    assert read[0] == read[1] and read[1][:4] == read[2] == [0, 16, 37, 40]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_cue": 0}, "no prompt or no answer"),
        ({"n_cue": 5}, "no prompt or no answer"),
        ({"n_prompt": 0}, "no prompt or no answer"),
        ({"n_prompt": 124}, "'x' has 129 tokens, the context 128; use a larger context"),
    ],
)
def test_what_cannot_be_judged_is_refused(changes: Any, message: str, open_tiny: Open) -> None:
    probe = Probe("x", "continuation", (5,) * 200, 20, (3, 4, 5, 6, 7))
    llm = open_tiny()
    assert Judge(llm, [probe]).probes == (probe,)
    with pytest.raises(DataError, match=message):
        Judge(llm, [replace(probe, **changes)])
    with pytest.raises(DataError, match="nothing to judge"):
        Judge(llm, [])
