"""Grammars that llama.cpp can be given: what it cannot parse, or would sample by for ever, is refused."""

import re
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_grammar import LlamaGrammar

from ..errors import RequestError

MOST_REPEATED = 2000
"""Of one element, and repetitions in a grammar: each may or may not be there, and llama.cpp keeps a stack for either.
Three tokens by 1,000 optional letters in a row took 0.5 s, by 2,000 3.5 s."""

_MOST_PARENTHESES = 200  # llama.cpp's parser calls itself for each: tens of thousands overflow its stack


def check_grammar(vocab: Any, grammar: LlamaGrammar) -> None:
    """Refuse, by a RequestError, what llama.cpp cannot parse and would crash on, and what it would block on."""
    text, root = str(grammar._grammar), str(grammar._root)
    code = re.sub(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]', "", text)  # without literals and classes of characters
    depth = np.cumsum([(each == "(") - (each == ")") for each in code], dtype=np.int64)
    if depth.max(initial=0) > _MOST_PARENTHESES:
        raise RequestError(f"the grammar has more than {_MOST_PARENTHESES} parentheses in one another; use rules")
    check_repeats("the grammar", code)
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), root.encode())
    if not sampler:
        raise RequestError("the grammar cannot be parsed; see llama.cpp's grammars/README.md for what GBNF is")
    llama_cpp.llama_sampler_free(sampler)


def check_repeats(what: str, text: str) -> None:
    """Refuse, by a RequestError, a grammar or regular expression that repeats too much, or one thing too often."""
    times = re.findall(r"\d{1,18}", " ".join(re.findall(r"\{[\d, ]*\}", text)))
    if max(map(int, times), default=0) > MOST_REPEATED or len(re.findall(r"[?*+{]", text)) > MOST_REPEATED:
        raise RequestError(f"{what} repeats too much; use at most {MOST_REPEATED} repetitions, of at most as many each")
