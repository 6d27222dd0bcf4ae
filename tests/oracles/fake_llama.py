"""A model without a library: the part of AdaSkipLlama that calibration uses, computed in NumPy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from adaskip_cpp.model.identity import ModelInfo
from adaskip_cpp.model.plan import SkipPlan

N_VOCAB = 300
N_EMBD = 4
BOS = 1


class FakeLlama:
    """Bytes are tokens, offset by 2; statistics are functions of the token ids alone, whatever is skipped.

    Those of ``unobserved`` sublayers are NaN.
    """

    n_layer, n_batch = 3, 8
    readable, max_loss = (), None

    def __init__(self, n_ctx: int = 64, unobserved: Sequence[tuple[int, int]] = ()) -> None:
        self.context_size = n_ctx
        self.model_info = ModelInfo("cd" * 32, "fake", self.n_layer)
        self.n_tokens = 0
        self.plan: SkipPlan | None = None
        self.draft_model: Any = None
        self.collecting = False
        self.evaluated: list[tuple[SkipPlan | None, list[int]]] = []
        self.fail_after: tuple[int, BaseException] | None = None
        self._unobserved = unobserved
        self._sink: Callable[[Any], None] = lambda batch: None
        self._options: dict[str, bool] = {}

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
    def collect_statistics(self, sink: Callable[[Any], None], **options: bool) -> Iterator[None]:
        self._sink, self._options, self.collecting = sink, options, True
        try:
            yield
        finally:
            self._sink, self.collecting = lambda batch: None, False

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
        assert self.n_tokens + len(tokens) <= self.context_size
        self.evaluated.append((self.plan, list(tokens)))
        for start in range(0, len(tokens), self.n_batch):
            if self.fail_after is not None and len(self.evaluated) > self.fail_after[0]:
                raise self.fail_after[1]
            piece = tokens[start : start + self.n_batch]
            positions = np.arange(self.n_tokens, self.n_tokens + len(piece), dtype=np.int32)
            self.n_tokens += len(piece)
            self._sink(SimpleNamespace(phase=phase, positions=positions, **self._statistics(piece)))

    def _statistics(self, tokens: Sequence[int]) -> dict[str, Any]:
        u, v = self.streams(tokens)
        figures = {name: (a * b).sum(axis=3) for name, a, b in (("dot", u, v), ("u_sq", u, u), ("v_sq", v, v))}
        figures |= {"sum_u": u.sum(axis=2), "sum_v": v.sum(axis=2)}
        for array in figures.values():
            for sublayer in self._unobserved:
                array[sublayer] = np.nan
        figures["layer_dot"] = (u[:, 0] * v[:, 1]).sum(axis=2)
        pairs = [list(zip(*row, strict=True)) for row in zip(u.astype(np.float32), v.astype(np.float32), strict=True)]
        return {
            **{name: array.astype(np.float32) for name, array in figures.items()},
            "activations": pairs if self._options.get("activations") else None,
        }
