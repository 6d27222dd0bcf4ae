"""Log-probabilities of tokens in OpenAI's form. :class:`Logprobs` gets the logits batch by batch, and drops them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..measuring.judge import Logits

Detokenize = Callable[[list[int], list[int]], str]  # the text of tokens that follow the second list


class _Row(NamedTuple):
    """The log-probability of a token, and the likeliest tokens at its place with theirs."""

    of_token: float
    top: list[tuple[int, float]]


class Logprobs:
    """Collects log-probabilities for one request: of its answer and of an echoed prompt, with the ``n_top`` best."""

    def __init__(self, n_top: int, detokenize: Detokenize) -> None:
        self.n_top, self._detokenize = n_top, detokenize
        self.tokens: list[int] = []
        self._rows: list[_Row | None] = []
        self._ahead: list[int] = []
        self.n_prompt = 0  # tokens of the prompt that clients see

    def expect(self, tokens: Sequence[int], *, has_bos: bool) -> None:
        """Announce the prompt; :meth:`append` then gets its logits in order. Clients do not see an added BOS."""
        self._ahead = [*tokens[1:]]
        self.n_prompt = len(tokens) - has_bos
        if not has_bos:  # the first token follows nothing, so it has no probability
            self.tokens.append(tokens[0])
            self._rows.append(None)

    def append(self, logits: Logits) -> None:
        """Take logits after tokens of the prompt, ``[n, n_vocab]``. Those after its last token belong to the answer."""
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
        """Return the end of the tokens, from ``begin`` on, that make a text of ``n_chars`` characters."""
        while begin < end and n_chars > 0:
            n_chars -= len(self._detokenize([self.tokens[begin]], self.tokens[:begin]))
            begin += 1
        return begin

    def block(self, begin: int, end: int, offset: int) -> dict[str, Any]:
        """Return ``logprobs`` of a choice for tokens ``begin`` to ``end``; ``offset`` is where their text begins."""
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
