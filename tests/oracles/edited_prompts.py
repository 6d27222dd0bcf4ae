"""A sequence in NumPy whose prompts are edited as a model's are, and how tests compare the two."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from oracles.reference import ReferenceModel, relative_error
from oracles.sequence_oracle import Cells, History
from oracles.stock import last_logits
from oracles.tiny_families import N_LAYER

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.edits import WIDE, Edits
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet

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
        before = {id(cell): cell for cell in self.history.cells}
        self.history.prompt(prompt)
        self.n_read = sum(id(cell) not in before and cell.computed is None for cell in self.history.cells)
        return self.history.trace().logits[0]


@contextmanager
def counting(llm: Any) -> Iterator[list[int]]:
    """Yields a list to which the number of tokens of every evaluated batch is added."""
    decode, counts = llm._ctx.decode, []

    def count(batch: Any) -> None:
        counts.append(batch.n_tokens())
        decode(batch)

    with mock.patch.object(llm._ctx, "decode", count):
        yield counts


def logits_of(llm: Any, prompt: list[int]) -> Any:
    """The logits of a prompt's last token, which is read as a request's is."""
    next(llm.generate(prompt, temp=0.0))
    return last_logits(llm)


def read_both(llm: Any, oracle: Oracle, prompt: list[int], tolerance: float = 1e-5) -> int:
    """Have both read a prompt, which gives the same logits; returns how many tokens the model evaluated."""
    with counting(llm) as counts:
        assert relative_error(logits_of(llm, prompt), oracle.read(prompt)) < tolerance
    assert sum(counts) == oracle.n_read
    return sum(counts)


def _bulk(windowed: Sequence[int] = ()) -> SkipPlan:
    skip = SkipPlan.manual(N_LAYER, attention=[2], ffn=[1, 2], scale=0.9).prefill
    return SkipPlan(NOTHING, NOTHING, bulk=Bulk(skip, head=4, tail=10, windowed=tuple(windowed), window_size=12))


SETTINGS: dict[str, tuple[str, dict[str, Any], SkipPlan | None, float]] = {
    "llama": ("llama", {}, None, 1e-5),
    "flash attention": ("llama", {"flash_attn": True}, None, 1e-2),
    "sliding windows": ("gemma3", {"swa_full": True}, None, 1e-3),
    "bulk": ("llama", {}, _bulk(), 1e-5),
    "bulk with windows": ("llama", {}, _bulk(windowed=[0, 1]), 1e-5),
}
