"""Inputs and outputs of sublayers, token by token, which maps are fitted on: against NumPy and against reductions."""

import itertools
from typing import Any

import numpy as np
import pytest
from oracles.fixtures import Open
from oracles.observed import activations_of, copied
from oracles.reference import ReferenceModel, ReferenceRun
from oracles.tiny_families import FAMILIES, N_EMBD, N_LAYER, tokens

SUBLAYERS = [(layer, kind) for layer in range(N_LAYER) for kind in (0, 1)]

SPLITS: dict[str, dict[str, Any]] = {
    "one piece": {},
    "one piece, with all logits": {},
    "n_batch 7": {"n_batch": 7},
    "token by token": {"n_batch": 1},
    "last logits, n_ubatch 16": {"logits_all": False, "n_ubatch": 16},
}


@pytest.mark.parametrize("split", SPLITS)
def test_activations_are_the_references_inputs_and_outputs(
    split: str, open_tiny: Open, reference: ReferenceModel
) -> None:
    expected = ReferenceRun(reference).eval(tokens(40))
    seen = activations_of(open_tiny(**SPLITS[split]), tokens(40), keep_logits="with" in split)
    assert [position for _, positions in seen for position in positions] == list(range(40))
    for activations, positions in seen:
        for layer, kind in SUBLAYERS:
            u, v = activations[layer][kind]
            assert u.dtype == v.dtype == np.float32 and u.shape == v.shape == (len(positions), N_EMBD)
            np.testing.assert_allclose(u, expected.u[layer, kind, positions], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(v, expected.v[layer, kind, positions], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_agree_with_the_reductions_on_every_architecture(name: str, open_tiny: Open) -> None:
    llm, seen = open_tiny(name, n_ubatch=16), []
    with llm.collect_statistics(lambda batch: seen.append((batch, copied(batch))), activations=True):
        llm.eval(tokens(40))
    observed = {(s.layer, ("attention", "ffn").index(s.kind)) for s in llm.sublayers if s.in_bulk}
    for batch, activations in seen:
        for layer, kind in itertools.product(range(llm.n_layer), (0, 1)):
            if (layer, kind) not in observed:
                assert activations[layer][kind] is None
                continue
            u, v = (x.astype(np.float64) for x in activations[layer][kind])
            for actual, wanted in (
                (batch.dot, (u * v).sum(axis=1)),
                (batch.u_sq, (u * u).sum(axis=1)),
                (batch.v_sq, (v * v).sum(axis=1)),
                (batch.sum_u, u.sum(axis=0)),
                (batch.sum_v, v.sum(axis=0)),
            ):
                np.testing.assert_allclose(actual[layer, kind], wanted, rtol=1e-4, atol=1e-3)


def test_with_logits_the_last_layer_does_not_see_every_token_and_has_none(open_tiny: Open) -> None:
    # Without logits_all, llama.cpp adds the last attention to the stream for the prompt's last token only.
    llm = open_tiny(logits_all=False, n_batch=32, n_ubatch=8)
    for activations, _ in activations_of(llm, tokens(20), keep_logits=True):
        assert [[pair is None for pair in row] for row in activations] == [[False] * 2, [False] * 2, [True] * 2]


def test_without_asking_there_are_none(open_tiny: Open) -> None:
    llm = open_tiny()
    seen: list[Any] = []
    with llm.collect_statistics(seen.append):
        llm.eval(tokens(20))
    assert [batch.activations for batch in seen] == [None]
