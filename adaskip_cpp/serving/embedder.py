"""Embeddings, by a second context of the model."""

from typing import Any

import llama_cpp

from ..errors import RequestError

_MOST = 2048
"""Tokens of a text: it is one ubatch, whose memory grows with its square."""


def open_embedder(options: dict[str, Any], context: int) -> llama_cpp.Llama:
    """Open a model that was opened with these options, for embeddings: pooled as its file says, else their mean."""
    size = min(context, _MOST)
    options = {**options, "embedding": True, "n_ctx": size, "n_batch": size, "n_ubatch": size}
    opened = llama_cpp.Llama(**options)
    if int(opened.pooling_type()) != llama_cpp.LLAMA_POOLING_TYPE_NONE:
        return opened
    opened.close()
    return llama_cpp.Llama(**options, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN)


def embed(llm: llama_cpp.Llama, text: str) -> tuple[Any, int]:
    """Return the embedding of a text, and its number of tokens; a RequestError where stock embeds its beginning."""
    n = len(llm.tokenize(text.encode("utf-8")))
    if n > llm.n_batch:
        raise RequestError(f"a text has {n} tokens; at most {llm.n_batch} can be embedded, cut it")
    result: Any = llm.create_embedding(text)
    return result["data"][0]["embedding"], int(result["usage"]["total_tokens"])
