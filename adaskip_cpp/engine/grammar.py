"""Grammars that llama.cpp can be given: what it cannot read, or would read for ever, is refused."""

from llama_cpp.llama_grammar import PRIMITIVE_RULES, LlamaGrammar

from ..errors import RequestError
from .binding import ffi, last_error, lib

_CHAR = PRIMITIVE_RULES["char"]  # of texts in what llama-cpp-python makes of a JSON schema
_CHAR.content = _CHAR.content.replace(r'[^"\\]', r'[^"\\\x00-\x1F]')
"""As llama.cpp's own converter has it: JSON has no control characters in a text."""


def check_grammar(vocab: int, grammar: LlamaGrammar) -> None:
    """Refuse, by a RequestError, what llama.cpp cannot use: it would crash on the sampler that it does not make."""
    text, root = (str(each).encode("utf-8", "replace") for each in (grammar._grammar, grammar._root))
    if text and lib.adaskip_check_grammar(ffi.cast("struct llama_vocab *", vocab), text, root) < 0:
        raise RequestError(f"the grammar cannot be used ({last_error()}); see llama.cpp's grammars/README.md")
