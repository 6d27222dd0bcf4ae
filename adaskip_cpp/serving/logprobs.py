"""Log-probabilities of tokens, in OpenAI's form, of logits that come a batch at a time and are not kept."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..measuring.judge import Logits

Detokenize = Callable[[list[int], list[int]], str]  # text of tokens behind others


class _Row(NamedTuple):
    """What is kept of the logits before a token: its own log-probability, and the likeliest tokens with theirs."""

    of_token: float
    top: list[tuple[int, float]]


class Logprobs:
    """Collects them for a request, with the ``n_top`` likeliest tokens each: of its answer, and of an echoed prompt."""

    def __init__(self, n_top: int, detokenize: Detokenize) -> None:
        self.n_top, self._detokenize = n_top, detokenize
        self.tokens: list[int] = []
        self._rows: list[_Row | None] = []
        self._ahead: list[int] = []
        self.n_prompt = 0  # tokens of the prompt that are told

    def expect(self, tokens: Sequence[int], *, has_bos: bool) -> None:
        """Announce the prompt, whose logits :meth:`append` gets in order; a BOS that it did not ask for is not told."""
        self._ahead = [*tokens[1:]]
        self.n_prompt = len(tokens) - has_bos
        if not has_bos:  # nothing is before the first token, so it has no probability
            self.tokens.append(tokens[0])
            self._rows.append(None)

    def append(self, logits: Logits) -> None:
        """Take the logits behind tokens of the prompt, ``[n, n_vocab]``; those behind the last belong to the answer."""
        for row in logits:
            if self._ahead:
                self.add(self._ahead.pop(0), row)

    def add(self, token: int, logits: Logits) -> None:
        """Take a token and the logits before it, ``[n_vocab]``."""
        values = logits.astype(np.float64)
        values -= values.max()
        values -= np.log(np.exp(values).sum())
        n = min(self.n_top, len(values))
        best = np.argpartition(-values, n - 1)[:n] if n else np.zeros(0, int)
        top = sorted(((int(each), float(values[each])) for each in best), key=lambda pair: (-pair[1], pair[0]))
        self.tokens.append(token)
        self._rows.append(_Row(float(values[token]), top))

    def covered(self, begin: int, end: int, n_chars: int) -> int:
        """Return up to which token, from ``begin`` on, a text of so many characters goes."""
        while begin < end and n_chars > 0:
            n_chars -= len(self._detokenize([self.tokens[begin]], self.tokens[:begin]))
            begin += 1
        return begin

    def block(self, begin: int, end: int, offset: int) -> dict[str, Any]:
        """Return ``logprobs`` of a choice: those of some of the tokens, whose text begins at ``offset`` characters."""
        texts, offsets, top = [], [], []
        for at in range(begin, end):
            before, row = self.tokens[:at], self._rows[at]
            text = self._detokenize([self.tokens[at]], before)
            texts.append(text)
            offsets.append(offset)
            offset += len(text)
            likeliest = None
            if row is not None:
                likeliest = {self._detokenize([token], before): value for token, value in reversed(row.top)}
                likeliest[text] = row.of_token
            top.append(likeliest)
        values = [None if row is None else row.of_token for row in self._rows[begin:end]]
        return {"tokens": texts, "text_offset": offsets, "token_logprobs": values, "top_logprobs": top}
