"""Log-probabilities of tokens in OpenAI's form. :class:`Logprobs` gets the logits batch by batch, and drops them."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from ..measuring.judge import Logits


class Logprobs:
    """Collects log-probabilities for one request: of its answer and of an echoed prompt, with the ``n_top`` best."""

    def __init__(self, n_top: int, detokenize: Callable[[list[int]], str]) -> None:
        self.n_top, self._detokenize = n_top, detokenize
        self.texts: list[str] = []  # of the tokens so far
        self._values: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._ahead: list[int] = []  # tokens of the prompt whose logits will come
        self.n_prompt = 0  # tokens of the prompt that clients see

    def expect(self, tokens: Sequence[int], *, has_bos: bool) -> None:
        """Announce the prompt; :meth:`append` then gets its logits in order. Clients do not see an added BOS."""
        self._ahead = [*tokens[1:]]
        self.n_prompt = len(tokens) - has_bos
        if not has_bos:
            self.add(tokens[0], None)

    def append(self, logits: Logits) -> None:
        """Take logits after tokens of the prompt, ``[n, n_vocab]``. Those after its last token belong to the answer."""
        for row in logits:
            if self._ahead:
                self.add(self._ahead.pop(0), row)

    def add(self, token: int, logits: Logits | None) -> None:
        """Take a token and the logits before it, ``[n_vocab]``; None if it follows nothing, so has no probability."""
        text = self._detokenize([token])
        value: float | None = None
        top: dict[str, float] | None = None
        if logits is not None:
            values = logits.astype(np.float64)
            values -= np.max(values)
            values -= np.log(np.exp(values).sum())
            n = min(self.n_top, len(values))
            best = np.argpartition(-values, n - 1)[:n] if n else np.zeros(0, int)
            ordered = sorted(best.tolist(), key=lambda each: (values[each], -each))  # of equal texts, the last counts
            value = float(values[token])
            top = {**{self._detokenize([each]): float(values[each]) for each in ordered}, text: value}
        self.texts.append(text)
        self._values.append(value)
        self._top.append(top)

    def covered(self, begin: int, end: int, n_chars: int) -> int:
        """Return the end of the tokens, from ``begin`` on, that make a text of ``n_chars`` characters."""
        while begin < end and n_chars > 0:
            n_chars -= len(self.texts[begin])
            begin += 1
        return begin

    def block(self, begin: int, end: int, offset: int) -> dict[str, Any]:
        """Return ``logprobs`` of a choice for tokens ``begin`` to ``end``; ``offset`` is where their text begins."""
        texts = self.texts[begin:end]
        offsets = [*accumulate(map(len, texts[:-1]), initial=offset)]
        values, top = self._values[begin:end], self._top[begin:end]
        return {"tokens": texts, "text_offset": offsets, "token_logprobs": values, "top_logprobs": top}
