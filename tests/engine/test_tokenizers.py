"""Texts are split into words as by the stock library, and by words of any length nothing is ended."""

import functools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from oracles.stock import environment
from oracles.tiny_models import write_model

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.errors import RequestError

OVERFLOWING = {
    **dict.fromkeys(("afmoe", "bailingmoe", "bloom", "cohere2moe", "deepseek-coder", "deepseek-llm"), "a"),
    **dict.fromkeys(("deepseek-v3", "exaone-moe", "gpt-4o", "gpt3-finnish", "granite-embed-multi-97m"), "a"),
    **dict.fromkeys(("hunyuan-dense", "jais-2", "joyai-llm", "minicpm5", "minimax-m2", "poro-chat"), "a"),
    **dict.fromkeys(("seed-coder", "talkie", "tekken", "tiny_aya", "ufakzeka", "viking", "whitespace", "youtu"), "a"),
    **dict.fromkeys(("default", "falcon"), "="),
}
"""What splits words, and a character of which 200,000 end the stock library."""

OTHERS = ("llama3", "gpt-2", "qwen2")  # llama.cpp splits by functions of its own there

_STOCK = """
import ctypes, json, sys, llama_cpp
path, texts = json.load(sys.stdin)
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
llm = llama_cpp.Llama(path, n_ctx=64, verbose=False)
print(json.dumps([llm.tokenize(text.encode(), add_bos=False) for text in texts]))
"""

PIECES = (*"aA1 =\n\té中.'/", "aa", "a a", "  ", "123456", "'s", "don't", "\r\n", "\u0301", "==", "the quick", "Été")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], AdaSkipLlama]:
    folder = tmp_path_factory.mktemp("pre")

    @functools.cache
    def open_(pre: str) -> AdaSkipLlama:
        return AdaSkipLlama(str(write_model(folder / f"{pre}.gguf", pre=pre)), n_ctx=64, n_threads=1, verbose=False)

    return open_


def texts(seed: int) -> list[str]:
    """Mixed ones of up to 5,000 characters, and runs of one character."""
    rng = random.Random(seed)
    mixed = ["".join(rng.choices(PIECES, k=rng.randrange(1, 2000))) for _ in range(8)]
    return [*mixed, *(rng.choice(PIECES) * 1500 + "".join(rng.choices(PIECES, k=50)) for _ in range(8))]


@pytest.mark.parametrize("pre", [*(pre for pre in OVERFLOWING if pre != "whitespace"), *OTHERS])  # spaces end that
def test_a_text_has_the_tokens_of_the_stock_library(opened: Callable[[str], Any], pre: str) -> None:
    llm, asked = opened(pre), texts(len(pre))
    command = [sys.executable, "-c", _STOCK]
    given = json.dumps([llm.model_path, asked])
    told = subprocess.run(command, input=given, env=environment(), capture_output=True, text=True, check=True)
    for text, expected in zip(asked, json.loads(told.stdout), strict=True):
        assert llm.tokenize(text.encode(), add_bos=False) == expected


@pytest.mark.parametrize("pre", OVERFLOWING)
def test_a_long_word_is_one_and_ends_nothing(opened: Callable[[str], Any], pre: str) -> None:
    """The vocabulary has four letters as one token, and two signs."""
    letter = OVERFLOWING[pre]
    pair, n = {"a": (b"aaaa", 50_000), "=": (b"==", 100_000)}[letter]
    llm = opened(pre)
    (token,), (single,) = (llm.tokenize(text, add_bos=False) for text in (pair, letter.encode()))
    assert llm.tokenize(letter.encode() * 200_001, add_bos=False) == [token] * n + [single]


def test_a_word_for_which_there_is_no_stack_is_refused(opened: Callable[[str], Any]) -> None:
    llm = opened("tekken")
    with pytest.raises(RequestError, match="a word of it is too long; put spaces into it"):
        llm.tokenize(b"a" * 4_000_000)
    assert llm.tokenize(b"a" * 8, add_bos=False) == llm.tokenize(b"aaaa", add_bos=False) * 2
