"""Refuses grammars that llama.cpp cannot read, or would read forever, for ``AdaSkipLlama``: ``check_grammar``."""

from llama_cpp.llama_grammar import PRIMITIVE_RULES, LlamaGrammar

from ..errors import RequestError
from .binding import ffi, last_error, lib

_CHAR = PRIMITIVE_RULES["char"]  # a character of a string, in llama-cpp-python's grammars for JSON schemas
_CHAR.content = _CHAR.content.replace(r'[^"\\]', r'[^"\\\x00-\x1F]')  # no control characters, as in llama.cpp


def check_grammar(vocab: int, grammar: LlamaGrammar) -> None:
    """Raise a RequestError if llama.cpp can make no sampler for the grammar: it would crash without one."""
    text, root = (str(each).encode("utf-8", "replace") for each in (grammar._grammar, grammar._root))
    if text and lib.adaskip_check_grammar(ffi.cast("struct llama_vocab *", vocab), text, root) < 0:
        raise RequestError(f"the grammar cannot be used ({last_error()}); see llama.cpp's grammars/README.md")
