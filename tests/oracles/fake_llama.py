"""A model without a library: the part of AdaSkipLlama that calibration uses, computed in NumPy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from adaskip_cpp.model.identity import ModelInfo
from adaskip_cpp.model.plan import SkipPlan

__all__ = ["FakeLlama"]

N_VOCAB = 300
N_EMBD = 4
BOS = 1


class FakeLlama:
    """Bytes are tokens, offset by 2; statistics are functions of the token ids alone, whatever is skipped.

    ``n_batch`` is that of a ubatch; statistics of ``unobserved`` sublayers are NaN.
    """

    def __init__(
        self, n_layer: int = 3, n_ctx: int = 64, n_batch: int = 8, unobserved: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.n_layer, self.n_batch = n_layer, n_batch
        self.model_info = ModelInfo("cd" * 32, "fake", n_layer)
        self.input_ids = np.zeros(n_ctx, np.intc)
        self.n_tokens = 0
        self.plan: SkipPlan | None = None
        self.draft_model: Any = None
        self.readable, self.max_loss = (), None
        self.collecting = False
        self.evaluated: list[tuple[SkipPlan | None, list[int]]] = []
        self.fail_after: tuple[int, BaseException] | None = None
        self._unobserved = unobserved
        self._sink: Callable[[Any], None] | None = None
        self._options: dict[str, bool] = {}

    @property
    def context_size(self) -> int:
        return len(self.input_ids)

    def n_vocab(self) -> int:
        return N_VOCAB

    @property
    def sublayers(self) -> list[Any]:
        return [
            SimpleNamespace(layer=layer, kind=name, skippable=may, in_bulk=may, windowable=False)
            for layer in range(self.n_layer)
            for kind, name in enumerate(("attention", "ffn"))
            for may in [(layer, kind) not in self._unobserved]
        ]

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [BOS] * add_bos + [byte + 2 for byte in text]

    def set_plan(self, plan: SkipPlan | None, readable: Any = ()) -> None:
        self.plan = plan

    def reset(self) -> None:
        self.n_tokens = 0

    @contextlib.contextmanager
    def collect_statistics(
        self,
        sink: Callable[[Any], None],
        *,
        keep_logits: bool = False,
        activations: bool = False,
    ) -> Iterator[None]:
        self._sink, self.collecting = sink, True
        self._options = {"keep_logits": keep_logits, "activations": activations}
        try:
            yield
        finally:
            self._sink, self.collecting = None, False

    def streams(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """u and v of every sublayer, float64 [n_layer, 2, n_tokens, N_EMBD]."""
        values = [np.random.default_rng(token).normal(size=(self.n_layer, 2, 2, N_EMBD)) for token in tokens]
        u, error = np.moveaxis(np.stack(values, axis=2), 3, 0)
        return u, u + error * np.linspace(0.1, 1, self.n_layer)[:, None, None, None]

    @staticmethod
    def next_token(token: int) -> int:
        """What greedy decoding puts after a token."""
        return 2 + (7 * token + 5) % (N_VOCAB - 2)

    def generate(self, tokens: Sequence[int], *, temp: float) -> Generator[int, None, None]:
        """As the real one after a prompt that is cached: its last token is evaluated again, for the logits."""
        assert temp == 0.0 and self._options["keep_logits"] and self.n_tokens == len(tokens)
        self.n_tokens -= 1
        token, phase = tokens[-1], "prefill"
        while True:
            self.eval([token], phase)
            token, phase = self.next_token(token), "decode"
            yield token

    def eval(self, tokens: Sequence[int], phase: str = "prefill") -> None:
        assert self.n_tokens + len(tokens) <= len(self.input_ids)
        self.evaluated.append((self.plan, list(tokens)))
        for start in range(0, len(tokens), self.n_batch):
            if self.fail_after is not None and len(self.evaluated) > self.fail_after[0]:
                raise self.fail_after[1]
            piece = tokens[start : start + self.n_batch]
            self.n_tokens += len(piece)
            if self._sink is not None:
                u, v = self.streams(piece)
                dot, u_sq, v_sq = ((a * b).sum(axis=3).astype(np.float32) for a, b in ((u, v), (u, u), (v, v)))
                sum_u, sum_v = ((a.sum(axis=2)).astype(np.float32) for a in (u, v))
                positions = np.arange(self.n_tokens - len(piece), self.n_tokens, dtype=np.int32)
                pairs = [[(u[at].astype(np.float32), v[at].astype(np.float32)) for at in ((layer, 0), (layer, 1))]
                         for layer in range(self.n_layer)]  # fmt: skip
                for layer, kind in self._unobserved:
                    for array in (dot, u_sq, v_sq, sum_u, sum_v):
                        array[layer, kind] = np.nan
                self._sink(
                    SimpleNamespace(
                        dot=dot,
                        u_sq=u_sq,
                        v_sq=v_sq,
                        layer_dot=(u[:, 0] * v[:, 1]).sum(axis=2).astype(np.float32),
                        sum_u=sum_u,
                        sum_v=sum_v,
                        phase=phase,
                        positions=positions,
                        activations=pairs if self._options["activations"] else None,
                    )
                )
