"""Grammars that llama.cpp can be given: what it cannot read, or would read for ever, is refused."""

from llama_cpp.llama_grammar import LlamaGrammar

from ..errors import RequestError
from .binding import ffi, last_error, lib


def check_grammar(vocab: int, grammar: LlamaGrammar) -> None:
    """Refuse, by a RequestError, what llama.cpp cannot use: it would crash on the sampler that it does not make."""
    text, root = (str(each).encode("utf-8", "replace") for each in (grammar._grammar, grammar._root))
    if text and lib.adaskip_check_grammar(ffi.cast("struct llama_vocab *", vocab), text, root) < 0:
        raise RequestError(f"the grammar cannot be used ({last_error()}); see llama.cpp's grammars/README.md")
