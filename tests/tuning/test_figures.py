"""adaskip_cpp.tuning.figures: the loss of a plan in each kind of answer, and lost pass keys, by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adaskip_cpp.intervals import mean_interval
from adaskip_cpp.measuring.judge import Scores
from adaskip_cpp.measuring.probes import Probe
from adaskip_cpp.model.plan import SkipPlan
from adaskip_cpp.model.quality import Passkeys
from adaskip_cpp.tuning.figures import judged_plan, passkeys_of, quality_of


def probe(text: str, kind: Any = "continuation") -> Probe:
    return Probe(text, kind, (1, 2, 3), 3, (4, 5))


def scores(divergence: Any, loss: Any = None, right: Any = None, whole_margin: Any = None) -> Scores:
    given = np.array(divergence, float)
    lost, margin = (given if each is None else np.array(each, float) for each in (loss, whole_margin))
    return Scores(given, lost, given < 1, given < 1 if right is None else np.array(right), margin)


def test_texts_count_alike_however_many_tokens_they_have() -> None:
    """Means over the tokens of all probes of a text, 0.2 and 0.6, then over both texts."""
    probes = [probe("a"), probe("a"), probe("b"), probe("b", "copying")]
    found = quality_of(probes, [scores([0.0, 0.1]), scores([0.5]), scores([0.6]), scores([9.0] * 9)], "continuation")
    assert found.divergence.value == pytest.approx(0.4) and found.divergence.n == found.n_texts == 2
    assert found.error == pytest.approx(0.2), "half of their difference"
    assert found.n_tokens == 4 and found.agreement.value == 1.0
    assert found.tails[1] == pytest.approx(0.6, abs=1e-3)
    assert quality_of(probes, [scores([0.0])] * 3 + [scores([9.0, 0.0])], "copying").agreement.value == 0.5


def test_an_added_loss_counts_where_it_is_above_the_divergence_beyond_chance() -> None:
    texts = [probe(name) for name in "abcd"]
    diverged = np.array([0.1, 0.2, 0.3, 0.4])
    lost = np.add(diverged, [0.5, 0.6, 0.5, 0.6])
    found = quality_of(texts, [scores([d], [x]) for d, x in zip(diverged, lost, strict=True)], "continuation")
    assert found.excess == mean_interval(lost - diverged).low and 0.4 < found.excess < 0.55
    assert found.harm == pytest.approx(0.25 + found.excess)
    by_chance = np.add(diverged, [0.9, -0.5, 0.5, -0.6])
    found = quality_of(texts, [scores([d], [x]) for d, x in zip(diverged, by_chance, strict=True)], "continuation")
    assert found.excess == 0.0 and found.harm == found.divergence.value
    alone = quality_of(texts[:1], [scores([0.1, 0.3], [5.0, 5.0])], "continuation")
    assert alone.divergence.value == pytest.approx(0.2) and np.isnan(alone.error) and alone.excess == 0.0


def test_a_pass_key_that_becomes_likelier_is_no_loss() -> None:
    """The key is the right answer. Elsewhere the whole model's answer counts, right or wrong."""
    texts, answers = ("a", "b"), [scores([0.3, 0.1], [-0.5, 0.2]), scores([0.4, 0.2], [-0.6, -0.1])]
    keys = quality_of([probe(text, "retrieval") for text in texts], answers, "retrieval")
    assert keys.divergence.value == pytest.approx(0.025) and keys.loss.value == pytest.approx(-0.25)
    copies = quality_of([probe(text, "copying") for text in texts], answers, "copying")
    assert copies.divergence.value == pytest.approx(0.25)


def test_a_pass_key_is_lost_where_a_token_of_it_is_wrong_that_the_whole_model_was_sure_of() -> None:
    """Sure is ten times as likely as any other token, for each token of the key."""
    sure, unsure, right, wrong = [2.31, 5.0], [5.0, 2.3], [True, True], [True, False]
    asked = [(sure, right), (sure, wrong), (unsure, right), (unsure, wrong), (sure, right)]
    probes = [probe("a"), *[probe("a", "retrieval")] * len(asked)]
    every = [scores([9.0]), *(scores([0.0, 0.0], right=hit, whole_margin=margin) for margin, hit in asked)]
    assert passkeys_of(probes, every) == Passkeys(5, 3, 2)
    assert passkeys_of(probes[:1], every[:1]) == Passkeys(0, 0, 0)


def test_a_plan_is_judged_until_it_loses_a_pass_key() -> None:
    """A key that the whole model is not sure of is no reason to stop."""
    right, wrong = [True], [False]
    asked = [([0.1], wrong), ([5.0], right), ([5.0], wrong), ([5.0], right)]
    kinds = "continuation", "copying", *["retrieval"] * len(asked)
    every = [scores([0.1])] * 2 + [scores([0.0], right=hit, whole_margin=margin) for margin, hit in asked]

    def judge(n_kept: int) -> tuple[Any, list[int]]:
        taken = list[int]()
        judge = SimpleNamespace(
            probes=[probe("a", kind) for kind in kinds[:n_kept]],
            each=lambda plan: (taken.append(i) or each for i, each in enumerate(every[:n_kept])),
            n_evaluated=0,
            read_whole=lambda: None,
        )
        return judged_plan(judge, SkipPlan.manual(4, ffn=(3,))), taken  # type: ignore[arg-type]

    assert judge(6) == (("a", 0), [0, 1, 2, 3, 4]), "the text, and nothing after its lost key"
    (found, _), taken = judge(4)
    _, copying, retrieval = found.kinds
    assert found.passkeys == Passkeys(2, 1, 1) and copying.n_tokens == 1 and taken == [0, 1, 2, 3]
    assert retrieval.n_tokens == 2 and retrieval.divergence.value == 0.0
