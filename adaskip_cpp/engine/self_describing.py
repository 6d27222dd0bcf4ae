"""``llama_cpp.Llama`` that tells what it is: its size, sublayers, memory and identity."""

from functools import cached_property

import llama_cpp

from ..errors import NativeError
from ..model.identity import ModelInfo, fingerprint, override_words
from .native import NativeContext
from .native_types import Counters, Sublayer


class SelfDescribingLlama(llama_cpp.Llama):
    """A model with its native side, and what both tell of it; :class:`AdaSkipLlama` adds the plan."""

    @cached_property
    def _adaskip(self) -> NativeContext:
        if self.ctx is None:
            raise NativeError("the model is closed; open it again.")
        return NativeContext(int(self.ctx))

    def close(self) -> None:
        """Free the model; using it afterwards is an error."""
        self.__dict__.pop("_adaskip", None)
        if hasattr(self, "_stack"):  # absent where the constructor refused its arguments
            super().close()

    @property
    def context_size(self) -> int:
        """Tokens that the context holds.

        llama.cpp rounds ``n_ctx`` up to a multiple of 256 and ``n_ctx()`` tells that, but ``llama_cpp.Llama`` allocates
        its own record of tokens for the ``n_ctx`` asked for.
        """
        return min(self.n_ctx(), len(self.input_ids))

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained on, 0 where its file does not say."""
        return int(llama_cpp.llama_model_n_ctx_train(self.model))

    @property
    def n_layer(self) -> int:
        """Number of layers; the model has twice as many sublayers."""
        return self._adaskip.n_layer

    @property
    def n_layer_kv(self) -> int:
        """Layers up to the last that has KV of its own: all, unless upper layers read that of others."""
        return self._adaskip.n_layer_kv

    @property
    def n_params(self) -> int:
        return int(self._model.n_params())

    @property
    def weight_bytes(self) -> int:
        return int(self._model.size())

    @property
    def has_state(self) -> bool:
        """Whether layers keep a state that stands for all tokens so far, beside KV or instead of it."""
        return bool(self._is_recurrent or self._is_hybrid)

    @property
    def logits_all(self) -> bool:
        """Whether ``scores`` has a row for every evaluated token; else it has the last one's alone."""
        return bool(self._logits_all)

    def is_eog(self, token: int) -> bool:
        """Whether the model ends what it generates with this token."""
        return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    def token_text(self, token: int) -> str:
        """A token as the model's vocabulary writes it."""
        return str(self._model.token_get_text(token))

    @cached_property
    def model_info(self) -> ModelInfo:
        """Its files, LoRA adapter and overrides: what a profile or plan must match."""
        return ModelInfo(
            fingerprint(self.model_path),
            self.metadata.get("general.architecture", "unknown"),
            self.n_layer,
            fingerprint(self.lora_path) if self.lora_path else "",
            float(self.lora_scale) if self.lora_path else 0.0,
            override_words(self.kv_overrides),
        )

    @cached_property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """One row per sublayer, layer by layer, attention before FFN: what can be skipped, and why not."""
        return self._adaskip.sublayers()

    @property
    def counters(self) -> Counters:
        """Graph nodes, graphs built and reused, bytes of KV."""
        return self._adaskip.counters()

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache (and recurrent state), all devices together."""
        return self.counters.kv_bytes

    @property
    def elided_kv(self) -> tuple[int, ...]:
        """Layers whose attention has no KV, because the model was opened with a plan that skips them."""
        return self._adaskip.elided_kv()

    @property
    def n_evaluated(self) -> int:
        """Tokens evaluated since the model was opened, by llama.cpp's own count; of none it tells 1."""
        self.synchronize()  # llama.cpp counts the tokens of a call when it has waited for them
        count = llama_cpp.llama_perf_context(self.ctx)
        return int(count.n_p_eval + count.n_eval)

    def synchronize(self) -> None:
        """Wait for the devices: an evaluation returns before a GPU has finished."""
        llama_cpp.llama_synchronize(self.ctx)

    def begin_request(self) -> None:
        """Begin a request: no token of its answer is decoded yet, and the online stage starts again."""
        self._adaskip.begin_request()

    def has_lost_window(self, n: int) -> bool:
        """Whether positions are gone that a sliding window behind the first ``n`` attends to.

        llama.cpp writes over those that the window has left; with ``swa_full`` as well where it looks for room from the
        cache's start, as behind a loaded state. Stock then reads on without them.
        """
        n_swa = llama_cpp.llama_model_n_swa(self.model)
        if n_swa == 0 or n == 0:
            return False
        first = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self.ctx), 0)
        return not 0 <= first <= max(0, n - n_swa + 1)

    def n_held(self, n: int) -> int:
        """How many of the first ``n`` tokens the memory can go on from: all, unless a call was cut short.

        Where Ctrl-C or a failure comes between llama.cpp's part of a call and ours, the memory holds fewer tokens, or
        more, of which ``eval`` takes the others away. A recurrent state cannot give back what it has read.
        """
        memory = llama_cpp.llama_get_memory(self.ctx)
        last = int(llama_cpp.llama_memory_seq_pos_max(memory, 0)) if memory else n - 1
        if last == n - 1 or n == 0:
            return n
        if last < 0:
            return 0
        if int(self.input_ids[:n].min()) < 0:  # an image has positions of its own
            return n
        return last + 1 if last < n else 0 if self.has_state else n
