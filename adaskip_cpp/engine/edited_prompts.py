"""The part of ``AdaSkipLlama`` that moves runs of earlier prompts to their places in the next: ``_read_edited``."""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from ..errors import NativeError, StateError
from ..files import StrPath
from ..model.edits import APART, WIDE, Edits, Reuse, edits_of
from ..model.plan import SkipPlan
from .one_thread import alone
from .runs import Run, Saved, Tokens, beside, find_runs, n_common
from .self_describing import SelfDescribingLlama


class EditedPromptsLlama(SelfDescribingLlama):
    """A model that moves tokens. :class:`AdaSkipLlama` adds the plan, and evaluates tokens under it."""

    _reads_prompt = False  # whether the caller wants the logits of a prompt's own tokens

    def __init__(self, model_path: StrPath, *, reuse: Reuse, **kwargs: Any) -> None:
        self._reuse, self._edits = reuse, edits_of(reuse)
        self._fills = False  # whether tokens are evaluated before others that are set aside
        self.n_moved: int = 0
        self.saved_prompts: Sequence[Saved] = ()
        super().__init__(model_path, **kwargs)
        self.set_reuse(reuse)

    @property
    def plan(self) -> SkipPlan | None:
        raise NotImplementedError

    def _evaluate_prompt(self, tokens: list[int], n_later: int = 0) -> None:
        raise NotImplementedError

    @property
    def edits(self) -> Edits | None:
        """How runs of an earlier prompt are moved to their places in the next one; None if they are not moved."""
        return self._edits if self._edits is not None and self.can_move else None

    @property
    def reuse(self) -> Reuse:
        """The ``reuse`` that the constructor or ``set_reuse`` was given."""
        return self._reuse

    @alone
    def set_reuse(self, reuse: Reuse) -> None:
        """Set the part of an earlier prompt that later prompts use again; an unknown one is a RequestError.

        Args:
            reuse: ``"auto"``, ``"prefix"``, ``"edits"`` or an ``Edits``, as for the constructor. After ``"prefix"``,
                tokens that were moved before are read again.
        """
        self._use(edits_of(reuse))
        self._reuse = reuse

    def _use(self, edits: Edits | None) -> None:
        if edits != self._edits:
            self._edits, self._requires_eval = edits, True
        self._adaskip.set_most_moves(edits.most_moves if edits else 0)

    def _known(self, cached: Tokens, prompt: Tokens, edits: Edits | None = None) -> tuple[int, list[Run]]:
        """Return how many tokens both begin with, and their other runs; ``edits`` replaces the edits in force."""
        first, edits, bulk = n_common(cached, prompt), edits or self.edits, self.plan.bulk if self.plan else None
        if edits is None or first == len(cached):
            return first, []
        end, mend = max(0, len(prompt) - max(edits.tail, bulk.tail if bulk else 0)), edits.mend
        found = find_runs(cached, prompt, first=first, end=end, least=edits.least + mend)
        moved = [each for each in found if each.n_moves <= edits.most_moves]
        return first, [Run(each.start + mend, each.to + mend, each.n - mend, each.n_moves) for each in moved]

    def _read_edited(self, prompt: list[int]) -> None:
        """Read a prompt up to the end of the last run that it shares with the one in memory or a saved one."""
        native, edits, self.n_moved = self._adaskip, self.edits, 0
        if edits is None or self._reads_prompt or self.logits_all or self.context_params.embeddings:
            return
        n = min(self.n_held(self.n_tokens), native.kv_valid("prefill", self.n_tokens))
        wanted = np.array(prompt, np.int32)
        first, runs = self._known(self.input_ids[:n], wanted)
        saved = self._choose_saved(edits, wanted, [Run(0, 0, first), *runs])
        is_readable = n == 0 or (np.min(self.input_ids[:n]) >= 0 and not self.has_lost_window(max(first, 1)))
        if not (runs or saved) or not is_readable:
            return
        # A saved state is loaded in the place of what the memory holds, so what both begin with is set aside as well.
        prefix = [Run(0, 0, first, 0)] if saved and first else []
        # Before the call, as Ctrl-C may come right after it, with runs set aside.
        self.n_tokens, self._requires_eval, self._fills = 0 if saved else first, True, True
        try:
            native.set_aside(self.n_tokens, [*prefix, *runs])
            for each, theirs in saved:
                runs += self._set_aside_saved(each, theirs)
            native.take_back(first)
            self.n_tokens = first
            for run in sorted(runs, key=lambda run: run.to):
                self._evaluate_prompt(prompt[self.n_tokens : run.to], n_later=len(prompt) - run.to)
                end = run.to + run.n
                native.take_back(end)
                self.input_ids[run.to : end] = prompt[run.to : end]
                self.n_tokens = native.kv_valid("prefill", end)  # fewer if some tokens moved too often
                self._ctx.kv_cache_seq_rm(0, self.n_tokens, -1)
                self.n_moved += self.n_tokens - run.to if run.n_moves else 0
        finally:
            self._fills = False
            # After an interruption, runs are still set aside. llama-cpp-python's own method would spare them.
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.ctx), -1, self.n_tokens, -1)

    def _choose_saved(self, edits: Edits, prompt: Tokens, taken: list[Run]) -> list[tuple[Saved, list[Run]]]:
        """Return which saved prompts have runs for places that are not taken, and these runs; those with most first."""
        chosen, known = [], []
        for each in self.saved_prompts:
            self._check_saved(each)
            first, runs = self._known(each.tokens, prompt)
            runs = [run if run.n_moves < WIDE else run._replace(n_moves=APART) for run in runs]
            runs = [run for run in runs if run.n_moves <= edits.most_moves]
            known.append((each, [Run(0, 0, first, 0), *runs]))
        while known:
            rest = [(each, beside(runs, taken, least=edits.least, mend=edits.mend)) for each, runs in known]
            best = max(rest, key=lambda each: sum(run.n for run in each[1]))
            if not best[1]:
                break
            chosen.append(best)
            taken = [*taken, *best[1]]
            known = [(each, runs) for each, runs in known if each is not best[0]]
        return chosen

    def _set_aside_saved(self, saved: Saved, runs: list[Run]) -> list[Run]:
        """Load a saved prompt and set its runs aside; returns those that may be read, none where there is no room."""
        native, state = self._adaskip, saved.take()
        try:
            if state is None or not self._load_sequence(state):
                return []
            n = native.kv_valid("prefill", len(saved.tokens))
            valid = [run._replace(n=min(run.n, n - run.start)) for run in runs if run.start < n]
            native.set_aside(0, valid)
            return valid
        except NativeError:  # a sliding window has left some, or cells cannot count so many moves
            return []
        finally:
            self._ctx.kv_cache_seq_rm(0, -1, -1)

    @alone
    def save_prompt(self) -> Saved:
        """Return a copy of the tokens in memory with their K and V, about ``kv_bytes`` bytes, for ``saved_prompts``.

        An image among the tokens, or a failure of llama.cpp, is a StateError.

        Examples:
            >>> llm.eval(tokens_of_a_document)
            >>> llm.saved_prompts = [llm.save_prompt()]
        """
        if self.n_tokens and np.min(self.input_ids[: self.n_tokens]) < 0:
            raise StateError("the memory holds an image, which has positions of its own; save a prompt of text.")
        if (state := self._save_sequence()) is None:
            raise StateError("llama.cpp could not save what is in memory; call reset() and read the prompt again.")
        return Saved(self.input_ids[: self.n_tokens].copy(), lambda: state, self.model_info, self.elided_kv)

    @alone
    def load_prompt(self, saved: Saved) -> None:
        """Put a saved prompt in the place of what is in memory.

        A prompt of another model, or one that is gone or that llama.cpp refuses, is a StateError. Only the latter two
        leave the memory empty.
        """
        self._check_saved(saved)
        state = saved.take()
        if state is None or not self._put(saved.tokens, state):
            raise StateError("llama.cpp could not load the saved prompt; read it again.")

    def _check_saved(self, saved: Saved) -> None:
        if (saved.model, saved.elided_kv) != (self.model_info, self.elided_kv):
            raise StateError("a saved prompt is of another model, or has KV of other layers; save it with this model.")

    def _put(self, tokens: Tokens, state: bytearray) -> bool:
        """Replace the memory by a saved state. If it does not fit or llama.cpp refuses it, the memory is empty."""
        self._ctx.kv_cache_clear()
        self.reset()  # type: ignore[no-untyped-call]
        if len(tokens) > self.context_size or not self._load_sequence(state):
            self._ctx.kv_cache_clear()
            return False
        self.input_ids[: len(tokens)] = tokens
        self.n_tokens, self._requires_eval = len(tokens), True
        return True

    def _save_sequence(self) -> bytearray | None:
        """Return the state of sequence 0; None where llama.cpp fails to save it."""
        state = bytearray(llama_cpp.llama_state_seq_get_size(self.ctx, 0))
        content = (ctypes.c_uint8 * len(state)).from_buffer(state)  # no copy: states of long prompts are large
        n = llama_cpp.llama_state_seq_get_data(self.ctx, content, len(state), 0)
        return state if n == len(state) else None

    def _load_sequence(self, state: bytearray) -> bool:
        """Put a saved state in the place of sequence 0; returns whether llama.cpp took it."""
        content = (ctypes.c_uint8 * len(state)).from_buffer(state)
        return bool(llama_cpp.llama_state_seq_set_data(self.ctx, content, len(state), 0))
