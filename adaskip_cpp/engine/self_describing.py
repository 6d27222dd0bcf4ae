"""The base of ``AdaSkipLlama`` in ``llama.py``: a ``llama_cpp.Llama`` that describes itself, also in saved states."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._logger import llama_log_callback
from llama_cpp.llama import LlamaState
from llama_cpp.llama_tokenizer import LlamaTokenizer

from ..errors import ModelFileError, NativeError, RequestError, StateError
from ..files import StrPath
from ..model.identity import ModelInfo, fingerprint
from ..model.settings import FlashAttention, Repack
from .arguments import check_arguments, type_bits
from .binding import last_error
from .native import Counters, NativeContext, Sublayer
from .one_thread import OneThread, alone

_ERROR = 4  # ggml_log_level; llama-cpp-python numbers levels otherwise, and hides errors unless verbose
_FLASH_TILE = 64  # ggml's GGML_FA_TILE_Q: with fewer tokens, its CPU backend computes flash attention row by row
_FREED = ("_model", "_ctx", "_batch", "tokenizer_")  # attributes of llama_cpp.Llama that a closed model lacks
_NOT_TOKENIZED = -(2**31)  # llama_tokenize returns this if it fails


class AdaSkipState(LlamaState):
    """A state that records its model and the layers without KV; llama.cpp's own part has the skip set of each cell."""

    model: ModelInfo
    elided_kv: tuple[int, ...]


class SelfDescribingLlama(llama_cpp.Llama):
    """A model with its native side. :class:`AdaSkipLlama` adds the plan."""

    def __init__(
        self,
        model_path: StrPath,
        *,
        flash_attn: FlashAttention = False,
        repack: Repack = True,
        unpack: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        check_arguments(flash_attn, repack, kwargs)
        self._one_thread = OneThread()
        self.repack: Repack = "all" if repack == "all" else bool(repack)
        self.unpack, unpacked = tuple(unpack), type_bits(unpack)
        self.flash_attn: FlashAttention = "prompts" if flash_attn == "prompts" else bool(flash_attn)
        try:
            with _errors_logged() as reasons:
                super().__init__(os.fspath(model_path), flash_attn=bool(flash_attn), **kwargs)
        except ValueError as error:
            if "Failed to" not in str(error):  # llama_cpp.Llama's message if llama.cpp cannot load something
                raise
            raise ModelFileError(
                f"llama.cpp cannot open {os.fspath(model_path)!r} ({reasons[0] if reasons else error}); check that the "
                "file is complete, its architecture supported, and the memory large enough for its context (n_ctx, "
                "--ctx)."
            ) from error
        if self.lora_path and not self._lora_adapter:  # llama_cpp.Llama takes a null pointer for an adapter
            self._lora_adapter = None
            self.close()
            raise ModelFileError(
                f"llama.cpp cannot use {self.lora_path!r} as a LoRA adapter ({', '.join(reasons[:1])}); give a GGUF "
                "file that was made for this model."
            )
        if flash_attn == "prompts":
            self._adaskip.set_flash_least(_FLASH_TILE)
        if repack == "all":
            self._adaskip.repack()
        if unpacked:
            self._adaskip.set_unpacked(unpacked)
        self._n_ctx = self.context_size  # that by which llama_cpp.Llama bounds prompts and answers
        self.n_batch = min(self.n_batch, self._adaskip.n_positions or self.n_batch)  # embed cuts texts to it

    @cached_property
    def _adaskip(self) -> NativeContext:
        return NativeContext(int(self.ctx))

    def close(self) -> None:
        """Free the model. It cannot be used afterwards."""
        if not hasattr(self, "_stack"):  # the constructor refused its arguments
            return
        with self._one_thread:
            self.__dict__.pop("_adaskip", None)
            super().close()
            for name in _FREED:
                self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        # Every method of llama_cpp.Llama gets at llama.cpp through these. It would read freed memory.
        if name in _FREED:
            raise NativeError("the model is closed; open it again.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def model_params(self) -> Any:
        """The ``llama_model_params`` that the model was loaded with."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        # llama_cpp.Llama makes them in its constructor, which has no argument for use_extra_bufts.
        params.use_extra_bufts = bool(self.repack)
        self._model_params = params

    @property
    def context_size(self) -> int:
        """Tokens that the context holds. A model with learned positions has no more than these, as GPT-2 has 1,024."""
        # llama.cpp rounds n_ctx up to a multiple of 256, as n_ctx() says. llama_cpp.Llama's own record of tokens is for
        # the n_ctx asked for.
        n_ctx = min(self.n_ctx(), len(self.input_ids))
        return min(n_ctx, self._adaskip.n_positions or n_ctx)

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained on; 0 if its file does not say."""
        return int(llama_cpp.llama_model_n_ctx_train(self.model))

    @property
    def n_layer(self) -> int:
        """Number of layers. The model has twice as many sublayers."""
        return self._adaskip.n_layer

    @property
    def n_layer_kv(self) -> int:
        """Number of layers up to the last one with KV of its own: all, unless upper layers read the KV of others."""
        return self._adaskip.n_layer_kv

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return int(self._model.n_params())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return int(self._model.size())

    @property
    def has_state(self) -> bool:
        """Whether layers have a recurrent state, beside KV or instead of it."""
        return bool(self._is_recurrent or self._is_hybrid)

    @property
    def can_move(self) -> bool:
        """Whether runs of tokens can be moved for edited prompts: there is no state, and llama.cpp can shift K."""
        return self._adaskip.can_move

    @cached_property
    def unpackable(self) -> dict[str, int]:
        """Number of weights by type that lie in the CPU's memory as in the file: ``unpack`` can name these types."""
        return self._adaskip.unpackable()

    @cached_property
    def repackable(self) -> int:
        """Number of Q5_0 weights that ``repack="all"`` copies; 0 where ggml's CPU backend has no layout for Q8_0."""
        return self._adaskip.repackable()

    @property
    def logits_all(self) -> bool:
        """Whether ``scores`` has a row for each evaluated token, and not only for the last one."""
        return bool(self._logits_all)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Return a text's token ids. llama.cpp's failure, as for a word of a million letters, is a RequestError."""
        if not isinstance(self.tokenizer_, LlamaTokenizer):
            return self.tokenizer_.tokenize(text, add_bos, special)
        n = -len(text) - 2
        while n < 0:
            tokens, room = (llama_cpp.llama_token * -n)(), -n
            n = llama_cpp.llama_tokenize(self._model.vocab, text, len(text), tokens, room, add_bos, special)
            if n == _NOT_TOKENIZED:
                raise RequestError(f"the text cannot be tokenized: {last_error()}; put spaces into it, or shorten it")
        return list(tokens[:n])

    @alone
    def embed(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """As ``llama_cpp.Llama.embed``, with the same arguments. A text without tokens is a RequestError."""
        # For a text without tokens, llama_cpp.Llama writes out of bounds.
        for text in [input] if isinstance(input, str) else input:
            if not self.tokenize(text.encode("utf-8")):
                raise RequestError("a text to embed is empty; leave it out")
        return super().embed(input, *args, **kwargs)

    def is_eog(self, token: int) -> bool:
        """Return whether the token of this id ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def token_text(self, token: int) -> str:
        """Return the token of this id as the model's vocabulary writes it."""
        return str(self._model.token_get_text(token))

    @cached_property
    def model_info(self) -> ModelInfo:
        """The model's identity, which a profile or plan must match."""
        file, architecture = fingerprint(self.model_path), self.metadata.get("general.architecture", "unknown")
        lora = (fingerprint(self.lora_path), float(self.lora_scale)) if self.lora_path else ("", 0.0)
        overrides = ", ".join(f"{name}={value!r}" for name, value in sorted((self.kv_overrides or {}).items()))
        return ModelInfo(file, architecture, self.n_layer, *lora, overrides)

    @cached_property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """All sublayers, layer by layer, attention before FFN, with the reasons why some cannot be skipped."""
        return self._adaskip.sublayers()

    @property
    def counters(self) -> Counters:
        """Counts of graph nodes, graphs and bytes."""
        return self._adaskip.counters()

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache and recurrent state, on all devices."""
        return self.counters.kv_bytes

    @property
    def elided_kv(self) -> tuple[int, ...]:
        """Layers whose attention has no KV, because the model was opened with a plan that skips it."""
        return self._adaskip.elided_kv()

    @property
    def n_evaluated(self) -> int:
        """Tokens evaluated since the model was opened, as llama.cpp counts them: 1 for none."""
        self.synchronize()  # llama.cpp counts the tokens of a call only after waiting for them
        count = llama_cpp.llama_perf_context(self.ctx)
        return int(count.n_p_eval + count.n_eval)

    def synchronize(self) -> None:
        """Wait for the devices. An evaluation returns before a GPU has finished."""
        llama_cpp.llama_synchronize(self.ctx)

    def begin_request(self) -> None:
        """Begin a request: schedules and the online stage start again at its first decoded token."""
        self._adaskip.begin_request()

    def has_lost_window(self, n: int) -> bool:
        """Return whether memory lacks tokens that a sliding window after the first ``n`` attends to."""
        # llama.cpp overwrites cells that the window has left. With swa_full it does so too if it looks for room from
        # the cache's start, as after a loaded state. Stock then continues without them.
        n_swa = llama_cpp.llama_model_n_swa(self.model)
        if n_swa == 0 or n == 0:
            return False
        first = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self.ctx), 0)
        return not 0 <= first <= max(0, n - n_swa + 1)

    def n_held(self, n: int) -> int:
        """Return how many of the first ``n`` tokens the memory holds: all, unless a call was cut short."""
        # After Ctrl-C or a failure between llama.cpp's part of a call and ours, the memory holds fewer tokens, or more.
        # eval removes the additional ones. A recurrent state cannot remove a token.
        memory = llama_cpp.llama_get_memory(self.ctx)
        last = int(llama_cpp.llama_memory_seq_pos_max(memory, 0)) if memory else n - 1
        if n == 0 or last < 0:
            return 0
        if last == n - 1 or np.min(self.input_ids[:n]) < 0:  # an image has positions of its own
            return n
        return last + 1 if last < n else 0 if self.has_state else n

    @alone
    def save_state(self) -> AdaSkipState:
        """Return the state as ``llama_cpp.Llama.save_state`` does, with the model's identity."""
        state = AdaSkipState.__new__(AdaSkipState)
        state.__dict__.update(vars(super().save_state()), model=self.model_info, elided_kv=self.elided_kv)
        return state

    @alone
    def load_state(self, state: LlamaState) -> None:
        """Load a state of this class, or of ``llama_cpp.Llama``, which counts as one of the whole model.

        Another model, other context settings or another KV layout raise a StateError. Nothing is changed then, unless
        llama.cpp itself refuses the state: then the cache is empty.
        """
        if isinstance(state, AdaSkipState) and (differences := state.model.differences(self.model_info)):
            raise StateError(f"the state is of another model: {'; '.join(differences)}; load it into that model.")
        if getattr(state, "elided_kv", ()) != self.elided_kv:
            way_out = "open the model with the same plan= as then, or none"
            raise StateError(f"the state was saved with KV for other layers; {way_out}.")
        if state.input_ids.shape != self.input_ids.shape or state.scores.shape != self.scores[: state.n_tokens].shape:
            raise StateError("the state has another n_ctx, n_batch or logits_all; open the model with those settings.")
        try:
            super().load_state(state)
        except RuntimeError as error:
            self._ctx.kv_cache_clear()
            self.reset()  # type: ignore[no-untyped-call]
            raise StateError(f"llama.cpp refused the state ({error}); the cache is empty, read the prompt.") from error


@contextmanager
def _errors_logged() -> Iterator[list[str]]:
    """Yield a list that collects the errors logged meanwhile: llama.cpp reports its reasons in its log alone."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(level: int, text: bytes, user_data: Any) -> None:
        if level == _ERROR:
            lines.append(text.decode("utf-8", "replace").strip())
        llama_log_callback(level, text, user_data)

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
