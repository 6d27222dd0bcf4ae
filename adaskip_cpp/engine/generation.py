"""Streams one answer as text and times it, for the command line and the demo: start with ``Generation``."""

import codecs
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeAlias

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import RequestError
from ..progress import Stage, silent
from .llama import AdaSkipLlama

Message: TypeAlias = "tuple[Literal['system', 'user', 'assistant'], str]"  # who says what in a chat
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Timing:
    """The numbers of tokens and the seconds of an answer."""

    n_prompt: int
    n_evaluated: int  # tokens of the prompt that were not cached from an earlier request
    n_generated: int  # including the token that ends the answer
    first_token_s: float  # from the call to the first token
    decode_s: float  # for the n_generated - 1 tokens after it
    is_cut: bool  # whether the answer ended because the context was full

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.n_evaluated / self.first_token_s

    @property
    def token_s(self) -> float | None:
        """Seconds per token after the first one; None if there was none."""
        return self.decode_s / (self.n_generated - 1) if self.n_generated > 1 else None


class Generation:
    """The answer to a prompt of token ids: iterate over it once for its text. ``on_stage`` shows reading the prompt.

    ``timing`` is set when the iteration ends, also by ``close()`` or Ctrl-C; None if no token was generated.
    """

    def __init__(
        self, llm: AdaSkipLlama, prompt: list[int], *, max_tokens: int, temperature: float = 0, on_stage: Stage = silent
    ) -> None:
        n, n_ctx = len(prompt), llm.context_size
        if n == 0:
            raise RequestError("the prompt is empty; write something to answer")
        if max_tokens < 1:
            raise RequestError(f"cannot generate {max_tokens} tokens; use at least 1")
        if n >= n_ctx:
            raise RequestError(f"the prompt has {n} tokens, the context {n_ctx}; shorten it or raise --ctx")
        self.llm, self.prompt, self.on_stage = llm, prompt, on_stage
        self.max_tokens, self.temperature = max_tokens, temperature
        self.timing: Timing | None = None

    def __iter__(self) -> Generator[str, None, None]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        n_before, was_empty = self.llm.n_evaluated, self.llm.n_tokens == 0
        n_evaluated = n_prompt = len(self.prompt)
        room = self.llm.context_size - n_prompt
        first = last = start = time.perf_counter()
        n_generated, is_cut = 0, False
        tokens = self.llm.generate(self.prompt, temp=self.temperature)
        try:
            for token in chain(self._first(tokens), tokens):
                last = time.perf_counter()
                if n_generated == 0:
                    first = last
                    if not was_empty:
                        n_evaluated = min(max(self.llm.n_evaluated - n_before, 1), n_prompt)
                n_generated += 1
                if self.llm.is_eog(token):
                    break
                # A token may end inside a character: the decoder keeps its bytes until the others come.
                if text := decoder.decode(self.llm.detokenize([token])):
                    yield text
                is_cut = n_generated == room < self.max_tokens
                if is_cut or n_generated == self.max_tokens:
                    break
        finally:
            tokens.close()
            if n_generated > 0:
                self.timing = Timing(n_prompt, n_evaluated, n_generated, first - start, last - first, is_cut)
        if text := decoder.decode(b"", final=True):
            yield text

    def _first(self, tokens: Generator[int, Sequence[int] | None, None]) -> list[int]:
        """Read the prompt; return the first token in a list, which is empty if there is none."""
        llm, n_cached, before = self.llm, -1, self.llm.on_batch

        def on_batch(n_tokens: int) -> None:
            nonlocal n_cached
            n_cached = n_tokens if n_cached < 0 else n_cached
            on_progress((n_tokens - n_cached) / (len(self.prompt) - n_cached))

        with self.on_stage("Reading the prompt") as on_progress:
            llm.on_batch = on_batch
            try:
                return [next(tokens)]
            except StopIteration:
                return []
            finally:
                llm.on_batch = before


def has_chat_template(llm: AdaSkipLlama) -> bool:
    return bool(llm.metadata.get(_TEMPLATE))


def chat_tokens(llm: AdaSkipLlama, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation in the model's own chat template, up to the beginning of the answer."""
    if not has_chat_template(llm):
        raise RequestError("this model has no chat template; use `adaskip-cpp generate --raw`")
    bos, eos = (llm.token_text(token) if token != -1 else "" for token in (llm.token_bos(), llm.token_eos()))
    turns: list[dict[str, str]] = [{"role": role, "content": content} for role, content in messages]
    try:
        formatter = Jinja2ChatFormatter(llm.metadata[_TEMPLATE], eos_token=eos, bos_token=bos)
        prompt = formatter(messages=turns).prompt  # type: ignore[arg-type]  # its messages are a union of TypedDicts
    except Exception as error:  # a template is a program in the model file, which can fail in any way
        way_out = "do without --system" if messages[0][0] == "system" else "use `adaskip-cpp generate --raw`"
        raise RequestError(f"the model's chat template failed ({error}); {way_out}") from error
    return llm.tokenize(prompt.encode("utf-8", "replace"), add_bos=False, special=True)
