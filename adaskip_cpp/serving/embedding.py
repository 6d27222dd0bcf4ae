"""Embeds texts in a context of its own, beside that of the server's model. Start at :meth:`Embedder.embed`."""

from collections.abc import Callable
from typing import Any

import llama_cpp

from ..engine.self_describing import SelfDescribingLlama
from ..errors import RequestError

_MOST = 2048  # tokens in a text: it is one ubatch, whose memory grows with the square of its size


class Embedder:
    """Opens a model again with ``options`` when the first text comes. Pooling is as its file says, else the mean."""

    def __init__(self, options: dict[str, Any], context: int) -> None:
        size = min(context, _MOST)
        self._options = {**options, "embedding": True, "n_ctx": size, "n_batch": size, "n_ubatch": size}
        self._llm: llama_cpp.Llama | None = None

    def embed(self, texts: str | list[str], model: str, check: Callable[[], object]) -> dict[str, Any]:
        """Return the answer of OpenAI's API. ``check`` is called before each text."""
        data, n_tokens = [], 0
        for index, text in enumerate([texts] if isinstance(texts, str) else texts):
            check()
            llm = self._llm = self._llm or self._open()
            n = len(llm.tokenize(text.encode("utf-8")))
            if n > llm.n_batch:  # stock would embed the beginning
                raise RequestError(f"a text has {n} tokens, but at most {llm.n_batch} can be embedded; shorten it")
            answer: Any = llm.create_embedding(text)
            data.append({**answer["data"][0], "index": index})
            n_tokens += answer["usage"]["total_tokens"]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "data": data, "model": model, "usage": usage}

    def _open(self) -> llama_cpp.Llama:
        opened = SelfDescribingLlama(**self._options)
        if int(opened.pooling_type()) != llama_cpp.LLAMA_POOLING_TYPE_NONE:
            return opened
        opened.close()
        return SelfDescribingLlama(**self._options, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN)

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()
