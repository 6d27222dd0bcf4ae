"""adaskip_cpp.tuning.edited: what edited prompts are measured on, and when nothing is measured."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles.fixtures import Open
from oracles.tiny_families import N_LAYER, tokens
from oracles.tiny_models import write_model

from adaskip_cpp.measuring.judge import Judge
from adaskip_cpp.measuring.memo import Memo
from adaskip_cpp.measuring.probes import passkey_lines, probes_of
from adaskip_cpp.model.edits import FEW, MANY, TOGETHER, WIDE
from adaskip_cpp.model.quality import Passkeys
from adaskip_cpp.tuning import edited
from adaskip_cpp.tuning.edited import edit_points
from adaskip_cpp.tuning.figures import Judged

N_PROMPT = 1600
OPTIONS: dict[str, Any] = {"n_ctx": 2048, "type_k": 0, "type_v": 0, "logits_all": False}


def judge_of(llm: Any, n_prompt: int = N_PROMPT, n_texts: int = 2) -> Judge:
    """Texts with pass keys; the second one has some of them near its beginning."""
    depths = (0.5, 0.35, 0.5, 0.5)[:n_texts]
    texts = [(f"text {i}", tokens(n_prompt + 20, seed=i), (i, depth)) for i, depth in enumerate(depths)]
    cuts = n_prompt // 2, n_prompt  # the longest prompts are edited
    found = (probes_of(llm, text, ids, cuts, n_continued=16, n_copied=24, key=key) for text, ids, key in texts)
    return Judge(llm, [probe for probes in found for probe in probes])


def measured(llm: Any, judge: Judge, memo: Memo | None = None) -> list[Any]:
    return edit_points(llm, judge, memo or Memo(), lambda share: None)


def test_three_kinds_of_edits_are_measured(monkeypatch: pytest.MonkeyPatch, open_tiny: Open) -> None:
    monkeypatch.setattr(edited, "DEFAULT_LOSS", 9.0)  # it allows whatever new orders lose
    llm = open_tiny(**OPTIONS, reuse="prefix")
    judge, prompts, together = judge_of(llm), list[Any](), list[Any]()
    generate = llm.generate

    def read(prompt: Any, **kwargs: Any) -> Any:
        first = next(generate(prompt, **kwargs))
        prompts.append(list(prompt))
        if llm.saved_prompts:
            together.append((list(prompt), [each.tokens.tolist() for each in llm.saved_prompts], llm.n_moved))
        yield first

    llm.generate = read
    found = measured(llm, judge)
    assert [each.edits.most_moves for each in found] == [FEW, MANY, TOGETHER]
    assert llm.reuse == "prefix" and llm.saved_prompts == ()
    for each in found:
        assert each.judged_at == N_PROMPT and each.continuation.n_texts == 2 and each.passkeys.n == 12
        assert each.continuation.divergence.value > 1e-4 and each.copying.divergence.value > 1e-4
    # Every prompt is an edit away from the next, and the last one of each text is that which is judged.
    first, second = (list(probe.tokens[:N_PROMPT]) for probe in judge.probes[::10])
    ends = [i for i, prompt in enumerate(prompts) if prompt in (first, second)]
    n_orders = (MANY - FEW) // WIDE
    lengths = FEW, FEW, n_orders, n_orders, 1, 1
    assert ends == [sum(lengths[: i + 1]) + i for i in range(6)]
    before = prompts[: ends[3] + 1]  # without documents that were read alone, whose order may be one of these
    assert len({tuple(prompt) for prompt in before}) == len(before) - 2
    orders = prompts[2 * FEW + 2 : 2 * FEW + 2 + n_orders]
    assert all(sorted(prompt[:-200]) != sorted(first[:-200]) for prompt in orders), "the pass key is another"
    assert all(sorted(prompt) == sorted(orders[0]) and prompt[:64] == first[:64] for prompt in orders)
    (old, _, _), (new, *others) = ([str(each)[1:-1] for each in passkey_lines(llm, number)] for number in (-1, 0))
    before_last = str(prompts[FEW - 1])
    assert old in before_last and new not in before_last and new in str(first)
    assert all(each in before_last for each in others), "the edit changes the first place alone"
    alien = str(passkey_lines(llm, 1)[2][:100])[1:-1]
    assert alien in str(second) and all(alien not in str(prompt) for prompt in prompts[: FEW + 1]), "of another text"
    # Of documents that were read alone all move but the first, a prefix. The first 32 tokens of each are read again.
    prompt, saved, n_moved = together[0]
    assert len(saved) == 5 and all(each[:64] == prompt[:64] for each in saved)
    assert [token for each in saved for token in each[64:]] == prompt[64:-128]
    assert n_moved == sum(len(each) - 64 - 32 for each in saved[1:])


def test_earlier_prompts_need_not_read_their_tail(monkeypatch: pytest.MonkeyPatch, open_tiny: Open) -> None:
    """Nothing but the tail sees the tail, and the last prompt reads its own. So the figures are the same."""
    found = []
    for without_tail in (replace, lambda edits, tail: edits):
        monkeypatch.setattr(edited, "replace", without_tail)
        llm = open_tiny(**OPTIONS)
        (small, *_), n_read = measured(llm, judge_of(llm)), llm.n_evaluated
        found.append((small.continuation.divergence.value, small.copying.divergence.value, n_read))
    (*fewer, n_fewer), (*more, n_more) = found
    assert fewer == pytest.approx(more, rel=1e-3) and n_more - n_fewer > FEW * 2 * 50


def test_edits_cost_nothing_where_tokens_see_nothing_of_each_other(tmp_path: Path, open_model: Open) -> None:
    """A model whose attentions add nothing computes K and V of a token alike after whatever text."""
    silent = [(layer, "attention") for layer in range(N_LAYER)]
    llm = open_model(write_model(tmp_path / "silent.gguf", zero=silent), **OPTIONS)
    for each in measured(llm, judge_of(llm)):
        assert each.continuation.divergence.value < 1e-6 and each.copying.divergence.value < 1e-6


def test_the_prompts_of_all_texts_are_edited_and_a_run_that_was_stopped_measures_none_again(open_tiny: Open) -> None:
    """Two of four texts hid that copies failed in a third one."""
    llm, memo = open_tiny(**OPTIONS), Memo()
    judge = judge_of(llm, n_texts=4)
    found, n_read = measured(llm, judge, memo), llm.n_evaluated
    for each in found:
        assert each.continuation.n_texts == each.copying.n_texts == 4 and each.passkeys.n == 24
    assert measured(llm, judge, memo) == found and llm.n_evaluated == n_read


@pytest.mark.parametrize(
    ("family", "options", "n_prompt"),
    [("mamba", {}, N_PROMPT), ("gemma3", {"swa_full": False}, N_PROMPT), ("llama", {}, 500)],
    ids=["a state", "a window that is lost", "a short prompt"],
)
def test_nothing_is_measured_where_nothing_moves(family: str, options: Any, n_prompt: int, open_tiny: Open) -> None:
    """Edits that were never made would seem to lose nothing."""
    llm = open_tiny(family, **{**OPTIONS, **options})
    assert measured(llm, judge_of(llm, n_prompt)) == []


def test_a_kind_of_edits_is_measured_if_half_the_default_promise_may_allow_it(
    monkeypatch: pytest.MonkeyPatch, open_tiny: Open
) -> None:
    """New orders are expected to lose three times as much as small edits, and here documents put together ten times."""
    monkeypatch.setitem(edited._FACTORS, TOGETHER, 10.0)
    monkeypatch.setattr(edited, "DEFAULT_LOSS", 9.0)
    llm, memo = open_tiny(**OPTIONS), Memo()
    judge = judge_of(llm)
    small, order, _ = (2 * each.needs(N_PROMPT) for each in measured(llm, judge, memo))
    for promise, n in ((2.9 * small, 1), (3.1 * small, 2), (9.9 * order, 2), (10.1 * order, 3)):
        monkeypatch.setattr(edited, "DEFAULT_LOSS", promise)
        assert [each.edits.most_moves for each in measured(llm, judge, memo)] == [FEW, MANY, TOGETHER][:n]


def test_no_promise_allows_edits_that_lose_a_clear_key(open_tiny: Open) -> None:
    llm, memo = open_tiny(**OPTIONS), Memo()
    judge = judge_of(llm)
    kept = measured(llm, judge)[0]
    losing = Judged((kept.continuation, kept.copying, kept.retrieval), Passkeys(6, 2, 1))
    memo.get(f"edits {FEW}", Judged, lambda: losing)
    [one] = measured(llm, judge, memo)
    assert one.needs(N_PROMPT) == math.inf
