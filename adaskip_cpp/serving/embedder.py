"""Embeddings, by a second context of the model: the first text opens it."""

from typing import Any

import llama_cpp

from ..errors import RequestError

_MOST = 2048
"""Tokens of a text: it is one ubatch, whose memory grows with its square."""


class Embedder:
    """The model a second time, for embeddings.

    Args:
        options: how the model was opened, the keyword arguments of ``llama_cpp.Llama``.
        context: tokens that it holds.
    """

    def __init__(self, options: dict[str, Any], context: int) -> None:
        size = min(context, _MOST)
        self._options = {**options, "embedding": True, "n_ctx": size, "n_batch": size, "n_ubatch": size}
        self._llm: llama_cpp.Llama | None = None

    def embed(self, text: str) -> tuple[Any, int]:
        """Return the embedding of a text, and its number of tokens.

        Raises:
            RequestError: it is too long; stock embeds its beginning.
        """
        if self._llm is None:
            self._llm = self._open()
        n = len(self._llm.tokenize(text.encode("utf-8")))
        if n > self._llm.n_batch:
            raise RequestError(f"a text has {n} tokens; at most {self._llm.n_batch} can be embedded, cut it")
        result: Any = self._llm.create_embedding(text)
        return result["data"][0]["embedding"], int(result["usage"]["total_tokens"])

    def _open(self) -> llama_cpp.Llama:
        """Open it: pooled as the model's file says, or where that says nothing their mean."""
        opened = llama_cpp.Llama(**self._options)
        if int(opened.pooling_type()) != llama_cpp.LLAMA_POOLING_TYPE_NONE:
            return opened
        opened.close()
        return llama_cpp.Llama(**self._options, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN)

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()
