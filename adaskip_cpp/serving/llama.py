"""The server's model: answers each request under its plan, reads no known text again. Start at ServedLlama.answer."""

import re
import secrets
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from importlib import metadata
from types import SimpleNamespace
from typing import Any, cast

import llama_cpp
import numpy as np
from llama_cpp.llama_grammar import LlamaGrammar
from llama_cpp.server.types import CreateChatCompletionRequest

from ..engine.llama import AdaSkipLlama
from ..engine.runs import Saved, Tokens, n_common
from ..errors import RequestError
from ..files import content_hash
from ..model.edits import Reuse
from ..model.plan import Phase
from .logprobs import Logprobs
from .plans import Plans, plan_key
from .prefix_cache import Entry, PrefixCache
from .request import WORTH_KEEPING, ServedRequest


class ServedLlama(AdaSkipLlama):
    """Serves one request after another: ``request``. Before it reads a prompt, it saves its memory in the cache if much
    of it would be lost. Then it loads a saved state if that has more of the prompt. ``logprobs`` are made batch by
    batch, without an array of ``n_ctx * n_vocab``.
    """

    def __init__(self, path: str, *, plans: Plans, cache: PrefixCache, name: str = "model", **kwargs: Any) -> None:
        self.request = ServedRequest()
        super().__init__(path, **kwargs)
        self.on_batch = lambda n_tokens: None if self.request.first else self.request.reads(n_tokens)
        self.name, self.plans = name, plans  # answers contain the name
        self._own_reuse: Reuse = kwargs.get("reuse", "auto")
        of_model = self.plans.choose("auto", self.context_size)
        self.set_plan(of_model.plan, readable=of_model.readable)  # a wrong plan fails now, not at the first request
        self.prefix_cache, cache.can_rewind = cache, not self.has_state
        self._steps: Generator[Any, None, None] | None = None  # of the answer
        self._logprobs: Logprobs | None = None
        self._live_key, self._n_kept = "", 0  # of the memory: its key in the cache, and how many tokens are saved there
        parameters = self.context_params
        settings = {name: getattr(parameters, name) for name in ("type_k", "type_v", "swa_full")}
        rope = {name: getattr(parameters, name) for name in ("rope_scaling_type", "rope_freq_base", "rope_freq_scale")}
        versions = [metadata.version(name) for name in ("llama-cpp-python", "adaskip-cpp")]
        identity = [asdict(self.model_info), settings, self.flash_attn, rope, self.n_ctx(), versions]
        self._settings_key = content_hash(identity)

    def close(self) -> None:
        """Save the memory in the cache, write that to disk, and free the model."""
        if getattr(self, "prefix_cache", None) is not None:
            self._keep(0)
            self._live_key = ""  # garbage collection calls this again
            self.prefix_cache.close()
        super().close()

    def answer(self, request: ServedRequest) -> Any:
        """Return the answer in the form of llama-cpp-python's server, or for a stream an iterator of its chunks."""
        self.request, request.model, body, n_vocab = request, self.name, cast(Any, request.body), self.n_vocab()
        kwargs = body.model_dump(exclude={"n", "best_of", "user", "logit_bias_type", "min_tokens"})
        if (prompt := request.prompt_tokens) is not None:
            if not (prompt and 0 <= min(prompt) <= max(prompt) < n_vocab):
                raise RequestError(f"prompt has no token ids, or wrong ones; use ids from 0 to {n_vocab - 1}")
            kwargs["prompt"] = prompt
        if kwargs.pop("suffix", None):
            kwargs["prompt"] = self._around(kwargs["prompt"], body.suffix)
        if body.seed is None:  # llama_cpp.Llama would take one that follows from the last client's
            kwargs["seed"] = secrets.randbits(31)
        if body.logit_bias and body.logit_bias_type == "tokens":
            texts = {text: self.tokenize(text.encode(), add_bos=False, special=True) for text in body.logit_bias}
            kwargs["logit_bias"] = {str(id): body.logit_bias[text] for text, ids in texts.items() for id in ids}
        for token in kwargs["logit_bias"] or ():
            if not (re.fullmatch(r"\d{1,9}", token, re.ASCII) and int(token) < n_vocab):
                raise RequestError(f"logit_bias names token {token!r}; use ids from 0 to {n_vocab - 1}")
        if body.grammar is not None:
            kwargs["grammar"] = LlamaGrammar.from_string(body.grammar)
        if body.min_tokens > 0:
            longer = llama_cpp.MinTokensLogitsProcessor(body.min_tokens, self.token_eos())
            kwargs["logits_processor"] = llama_cpp.LogitsProcessorList([longer])
        chats = isinstance(body, CreateChatCompletionRequest)
        return self.create_chat_completion(**kwargs) if chats else self.create_completion(**kwargs)

    def _around(self, prompt: str | list[int], suffix: str) -> list[int]:
        """Return the prompt that asks for the text between two texts, with the model's own tokens for that."""
        # llama_cpp.Llama takes token 0 for all of them.
        vocab = self._model.vocab
        marks = [getattr(llama_cpp, f"llama_vocab_fim_{name}")(vocab) for name in ("pre", "suf", "mid")]
        if min(marks) < 0:
            raise RequestError("this model has no tokens for a suffix; leave suffix out")
        before = self.tokenize(prompt.encode(), add_bos=False) if isinstance(prompt, str) else prompt
        after = self.tokenize(suffix.encode(), add_bos=False)
        bos = [self.token_bos()] if llama_cpp.llama_vocab_get_add_bos(vocab) else []
        return [*bos, marks[0], *before, marks[1], *after, marks[2]]

    def count_prompt(self, request: ServedRequest) -> int:
        """Return the number of tokens in the prompt of a chat. Another thread may answer a request meanwhile."""

        def create_completion(prompt: list[int], **kwargs: Any) -> Any:
            choice = {"text": "", "logprobs": None, "finish_reason": "stop"}
            return {"id": "", "created": 0, "model": "", "choices": [choice], "usage": {"prompt_tokens": len(prompt)}}

        body, own = cast(Any, request.body), {"tokenize": self.tokenize, "create_completion": create_completion}
        stand_in: Any = SimpleNamespace(**{**vars(self), **own})
        chat = llama_cpp.Llama.create_chat_completion
        answer: Any = chat(stand_in, body.messages, tools=body.tools, tool_choice=body.tool_choice)
        return int(answer["usage"]["prompt_tokens"])

    def end(self) -> None:
        """End the work for the current request."""
        if self._steps is not None:
            self._steps.close()

    @property
    def gauges(self) -> dict[str, float]:
        """Sizes in bytes, by name."""
        return {"kv_bytes": self.kv_bytes, "prefix_cache_bytes": self.prefix_cache.n_bytes}

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As :meth:`AdaSkipLlama.generate`, for the current request."""
        request, prompt = self.request, list(tokens)
        if not prompt:
            raise RequestError("the prompt is empty; send some text")
        request.check()
        request.begun, request.n_prompt, request.n_layer = time.perf_counter(), len(prompt), self.n_layer
        reuse = request.reuse or self._own_reuse
        request.choice = self.plans.choose(request.wish, len(prompt), edited=reuse == "auto" and self.can_move)
        self.set_reuse((request.choice.edits or "prefix") if reuse == "auto" else reuse)
        request.reuse = "edits" if self.edits else "prefix"
        self._take_up(request, np.array(prompt, np.int32))
        if self._prompt_rows is not None and self._logprobs is not None:
            self._logprobs.expect(prompt, has_bos=request.prompt_tokens is None and prompt[0] == self.token_bos())
        # Stock exceeds max_tokens to complete a character, which has at most four bytes.
        asked = getattr(request.body, "max_tokens", None)
        most = self.context_size if asked is None or asked < 0 else asked + 3
        with closing(super().generate(prompt, *args, **kwargs)) as steps:
            for token in steps:
                request.n_moved = self.n_moved
                is_end = self.is_eog(token)
                request.token(is_end=is_end)
                if self._logprobs is not None and not is_end:
                    self._logprobs.add(token, np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), (self.n_vocab(),)))
                yield token
                request.check()
                if self.n_tokens == self.context_size or request.n_generated >= most:
                    self._is_cut = True
                    if (end := self.token_eos()) >= 0:
                        yield end  # without it, stock would lose the text of the answer
                    return

    def _evaluate(self, phase: Phase, tokens: list[int], **how: Any) -> None:
        before = self.n_tokens
        try:
            super()._evaluate(phase, tokens, **how)
        finally:
            self.request.n_evaluated[phase] += self.n_tokens - before

    # -- what was read before ----------------------------------------------------------------------------------------

    def _take_up(self, request: ServedRequest, prompt: Tokens) -> None:
        """Set the request's plan, and load as much of its prompt into memory as is known."""
        plan, readable, cache = request.choice.plan, request.choice.readable, self.prefix_cache
        names = f"{self._settings_key}/{content_hash([request.owner, request.salt])}/"
        # What another client wrote is not used, so that no answer reveals it.
        if not (request.reuses and self._live_key.startswith(names)):
            self._keep(0)
            self.reset()
            self._live_key, self._n_kept = "", 0
        if not request.reuses:  # without a key, this prompt is neither saved nor used again
            request.known = {"cache_prompt": len(prompt)}
            self.set_plan(plan, readable=readable)
            self.saved_prompts = ()
            return
        key = names + plan_key(plan)
        keys = {key, *(names + plan_key(each) for each in (None, *readable))}
        kept = [each for each in cache.entries if each.key.startswith(names)]
        n_same = n_common(self.input_ids[: self.n_tokens], prompt)
        must_go_back = self.has_state and n_same < self.n_tokens  # as it cannot, it is read from the beginning
        self._keep(0 if key != self._live_key or must_go_back else n_same)
        self.set_plan(plan, readable=readable)
        # This plan may not read all cells of other plans. The cells know by which set they were computed.
        n_live = self._adaskip.kv_valid("prefill", self.n_tokens)
        n_usable = 0 if must_go_back else self._n_known(self.input_ids[:n_live], prompt)
        n_live = min(n_same, n_live)
        found, n_found = cache.find(keys, prompt, self._n_known)
        self._live_key, self._n_kept = key, min(self._n_kept, n_live)
        if found is not None and n_found >= n_usable + WORTH_KEEPING:
            state = cache.take(found)
            if state is not None and self._put(found.tokens, state):
                self._n_kept = n_common(found.tokens, prompt)  # the others make room for the rest of the prompt
        known = [each for each in cache.entries if each.key in keys]
        mine = self.model_info, self.elided_kv
        self.saved_prompts = [Saved(each.tokens, partial(cache.take, each), *mine) for each in known]
        if self._prompt_rows is not None:  # the whole prompt is read again
            self._n_kept, request.known = 0, {"logprobs": len(prompt)}
            return
        request.known = {
            "evicted": _most_common(prompt, cache.forgotten, keys),
            "memory": max(n_live, _most_common(prompt, kept, keys)),
            "plan": max(n_same, _most_common(prompt, kept, {each.key for each in kept} - keys)),
        }

    def _n_known(self, tokens: Tokens, prompt: Tokens) -> int:
        """Return how many tokens of a prompt need not be read if ``tokens`` are in memory."""
        first, runs = self._known(tokens, prompt)
        return first + sum(run.n for run in runs)

    def _keep(self, n_stays: int) -> None:
        """Save the memory if the cache lacks much of it, and only its first ``n_stays`` tokens will stay."""
        n = self.n_tokens
        if self._live_key and n - max(n_stays, self._n_kept) >= WORTH_KEEPING and np.min(self.input_ids[:n]) >= 0:
            size = llama_cpp.llama_state_seq_get_size(self.ctx, 0)
            if size > self.prefix_cache.most:
                self.prefix_cache.forgotten.append(Entry(self._live_key, self.input_ids[:n].copy(), size))
            elif (state := self._save_sequence()) is not None:
                self.prefix_cache.put(self._live_key, self.input_ids[:n], state)
                self._n_kept = n

    # -- what the stock class lacks ------------------------------------------------------------------------------------

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As the stock one, with ``logprobs`` without ``logits_all``, and with answers of 0 tokens."""
        self._steps = self._completed(*args, **kwargs)
        return self._steps

    def _completed(self, *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        request = self.request
        n_top, echo = kwargs.pop("logprobs", None), kwargs.pop("echo", False)
        kwargs["model"] = self.name  # stock returns the name in the request, or the path
        is_empty = kwargs.get("max_tokens") == 0
        steps: Any = super()._create_completion(*args, **{**kwargs, "max_tokens": 1} if is_empty else kwargs)
        prompt = kwargs["prompt"] if isinstance(kwargs["prompt"], str) else self._text(kwargs["prompt"])
        before, n_told, offset = prompt if echo else "", 0, 0 if echo else len(prompt)
        self._logprobs = collected = None if n_top is None else Logprobs(n_top, self._text)
        self._is_cut = False  # whether a limit ended the answer
        with closing(steps), self._reading_prompt(collected.append) if echo and collected else nullcontext():
            for step in steps:
                choice = step["choices"][0]
                is_end = choice["finish_reason"] is not None
                if is_end and self._is_cut:
                    choice["finish_reason"] = "length"
                request.finish = choice["finish_reason"] or ""
                if is_empty:
                    request.n_generated = 0
                    if not is_end:
                        continue
                    choice["text"] = ""
                choice["text"], before = before + choice["text"], ""
                if collected is not None:
                    end = collected.n_prompt if is_empty else len(collected.texts)
                    if not is_end:
                        end = collected.covered(n_told, end, len(choice["text"]))
                    choice["logprobs"] = told = collected.block(n_told, end, offset) if end > n_told else None
                    n_told, offset = end, offset + sum(map(len, told["tokens"] if told else ()))
                yield step

    def _text(self, tokens: list[int]) -> str:
        return self.detokenize(tokens).decode("utf-8", "ignore")


def _most_common(prompt: Tokens, entries: Iterable[Entry], keys: Collection[str]) -> int:
    """Return the largest number of a prompt's first tokens in an entry of these keys."""
    return max((n_common(each.tokens, prompt) for each in entries if each.key in keys), default=0)
