"""What a tiny model must compute under a plan, by the NumPy forward pass."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from oracles.reference import ReferenceModel, ReferenceRun, relative_error
from oracles.sequence_oracle import Cells, History
from oracles.skip_sets import arguments
from oracles.stock import eval_logits
from oracles.stock import last_logits as last_logits

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.skip_set import SkipSet


def split(tokens: list[int], size: int) -> list[list[int]]:
    """A prompt in pieces of ``size`` tokens."""
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def error_under(llm: Any, reference: ReferenceModel, chosen: SkipSet | None, pieces: list[list[int]]) -> float:
    """Of the logits of a prompt in these pieces, under the plan in force, against NumPy under a set."""
    expected = ReferenceRun(reference).eval([*itertools.chain(*pieces)], *arguments(chosen)).logits
    actual = eval_logits(llm, pieces)
    return relative_error(actual, expected[-len(actual) :])


def history_of(reference: ReferenceModel, plan: SkipPlan | None = None) -> History:
    """What a model must hold that was opened and given this plan."""
    result = History(Cells(reference), 512)
    if plan is not None:
        result.set_plan(plan)
    return result


def error(llm: Any, expected: History, start: int = 0) -> float:
    """Of the logits of all cached tokens from one on."""
    rows = [expected.trace(index).logits[0] for index in range(start, llm.n_tokens)]
    return relative_error(llm.scores[start : llm.n_tokens], np.stack(rows))


def generated(llm: Any, expected: History, prompt: list[int], n: int) -> list[int]:
    """The answer of a model to a prompt, which its history gets too."""
    answer = list(itertools.islice(llm.generate(prompt, temp=0.0), n))
    expected.prompt(prompt)
    for token in answer[:-1]:
        expected.decode([token])
    return answer


def log_probabilities(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities of logits, [n, n_vocab], float64."""
    rows = np.asarray(logits, np.float64)
    return np.asarray(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))
