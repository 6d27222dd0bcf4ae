"""A sequence in NumPy whose prompts are edited as a model's are, and how tests compare the two."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from oracles.reference import ReferenceModel, relative_error
from oracles.sequence_oracle import Cells, History
from oracles.tiny_families import N_LAYER, N_VOCAB

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.edits import WIDE, Edits
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet

__all__ = ["EDITS", "OPTIONS", "SETTINGS", "Oracle", "bulk_of", "counting", "logits_of", "read_both"]

NOTHING = SkipSet.none(N_LAYER)
EDITS = Edits(mend=3, least=8, tail=6, most_moves=2 * WIDE)
OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_batch": 32, "n_ubatch": 16, "logits_all": False}


class Oracle:
    """A sequence in NumPy, whose prompts are edited as the model's are."""

    def __init__(self, model: ReferenceModel, plan: SkipPlan | None = None, edits: Edits = EDITS) -> None:
        self.history = History(Cells(model), OPTIONS["n_ubatch"], plan=plan or SkipPlan(NOTHING, NOTHING), edits=edits)
        self.n_read = 0

    def read(self, prompt: list[int]) -> Any:
        """Read a prompt, the runs of the one before from where they are. Return the last token's logits."""
        before = list(self.history.cells)
        self.history.prompt(prompt)
        are_new = [not any(cell is each for each in before) for cell in self.history.cells]
        self.n_read = sum(
            is_new and cell.computed is None for is_new, cell in zip(are_new, self.history.cells, strict=True)
        )
        return self.history.trace().logits[0]


@contextmanager
def counting(llm: Any) -> Iterator[list[int]]:
    """Yields a list that the tokens of every evaluated batch are added to, as numbers."""
    decode, counts = llm._ctx.decode, []

    def count(batch: Any) -> None:
        counts.append(batch.n_tokens())
        decode(batch)

    llm._ctx.decode = count
    try:
        yield counts
    finally:
        llm._ctx.decode = decode


def logits_of(llm: Any, prompt: list[int]) -> Any:
    """The logits of a prompt's last token, which is read as a request's is."""
    for _ in llm.generate(prompt, temp=0.0):
        break
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (N_VOCAB,)).copy()


def read_both(llm: Any, oracle: Oracle, prompt: list[int], tolerance: float = 1e-5) -> int:
    """Have both read a prompt, which gives the same logits; returns how many tokens the model evaluated."""
    with counting(llm) as counts:
        assert relative_error(logits_of(llm, prompt), oracle.read(prompt)) < tolerance
    assert sum(counts) == oracle.n_read
    return sum(counts)


def bulk_of(*, windowed: Sequence[int] = ()) -> SkipPlan:
    skip = SkipPlan.manual(N_LAYER, attention=[2], ffn=[1, 2], scale=0.9).prefill
    return SkipPlan(NOTHING, NOTHING, bulk=Bulk(skip, head=4, tail=10, windowed=tuple(windowed), window_size=12))


SETTINGS: dict[str, tuple[str, dict[str, Any], SkipPlan | None, float]] = {
    "llama": ("llama", {}, None, 1e-5),
    "flash attention": ("llama", {"flash_attn": True}, None, 1e-2),
    "sliding windows": ("gemma3", {"swa_full": True}, None, 1e-3),
    "bulk": ("llama", {}, bulk_of(), 1e-5),
    "bulk with windows": ("llama", {}, bulk_of(windowed=[0, 1]), 1e-5),
}
