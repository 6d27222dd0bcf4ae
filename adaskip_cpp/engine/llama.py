"""``AdaSkipLlama``, the model class for users: ``llama_cpp.Llama`` that skips the sublayers of a plan.

It is one file, because cached tokens, the plan in force and the phases of new tokens depend on each other.
"""

import operator
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from ..errors import AdaSkipError, NativeError, PlanError, RequestError, StateError
from ..files import StrPath
from ..model.arrays import Vectors
from ..model.edits import Reuse
from ..model.frontier import DEFAULT_LOSS, Frontier, Point, check_max_loss
from ..model.identity import check_gguf
from ..model.plan import Bulk, Phase, SkipPlan
from ..model.plan_file import plan_beside
from ..model.settings import FlashAttention, Repack
from .edited_prompts import EditedPromptsLlama
from .grammar import check_grammar
from .native import OnlineResult, elide_kv
from .one_thread import alone
from .refit import Refit
from .settings import is_here
from .statistics import StatisticsSink

# Takes the logits after the tokens of a batch, float32 [n, n_vocab]. They are llama.cpp's own, until the next batch.
Rows: TypeAlias = Callable[[Vectors], object]


@dataclass(frozen=True)
class _InForce:
    """The arguments of :meth:`AdaSkipLlama.set_plan`: the plan, and the readable plans by their bulk sets' ids."""

    plan: SkipPlan | None = None
    readable: dict[int, SkipPlan] = field(default_factory=dict)


class AdaSkipLlama(EditedPromptsLlama):
    """A ``llama_cpp.Llama`` that can skip sublayers by a plan. It takes the same arguments and has the same methods.

    Without a plan, logits are bit-identical to those of ``llama_cpp.Llama`` with the same settings. A plan has a set of
    sublayers for each phase (see ``SkipPlan``). The prompt of a call runs under the plan's prefill set, and the answer
    under its decode set. If the plan has a bulk, the prompt's tokens between head and tail run under the bulk set
    instead, but for those that its maps are fitted to (``Bulk.refit``). A call that asks for the logits of a prompt's
    own tokens (``echo`` with ``logprobs``, or embeddings) reads the prompt without a bulk.

    A plan may be changed at any time. A cached token is used again if two conditions hold. It has K and V for all
    sublayers that run now. And it was computed by the whole model, under a set of the plan in force, or in the bulk of
    a plan in ``readable``. All tokens from the first other one on are evaluated again.

    A model generates one answer at a time, for one thread at a time. A second thread or answer gets a StateError.

    Args:
        model_path: a GGUF file.
        plan: the sublayers to skip: a ``SkipPlan``, a ``Frontier``, ``"auto"`` or None for the whole model. ``"auto"``
            reads the file that ``adaskip-cpp tune`` wrote beside the model (``plan_path``). A frontier chooses a plan
            for each prompt. On the machine of the frontier, the model is opened with the frontier's settings, but
            arguments given here come first. If a plan has no bulk, the layers whose attention it skips in every phase
            get no memory for K and V. Such a model takes only plans that skip these attentions too, and not None.
        max_loss: for a frontier: the promise, in nats per token that an answer may lose; None for 0.05.
        exact_batches: whether prompts are cut into batches exactly as in ``llama_cpp.Llama``. By default, models whose
            upper layers share KV (Gemma 3n and 4) compute the last token of a prompt by itself. These layers then run
            for no other token. Logits differ by the rounding of another batch size.
        flash_attn: True, False or ``"prompts"``: without flash attention where fewer than 64 tokens are computed at
            once, as in answers. On many CPUs these are slow with it. None for the setting of ``tune``, or False.
        repack: whether llama.cpp may keep weights on the CPU in its own layout (``use_extra_bufts``). With ``"all"``,
            products also read copies of Q5_0 weights as Q8_0, which holds the same values. This needs a layout of ggml
            for Q8_0 (``repackable``). On a Xeon with AMX, Qwen2.5-Coder reads 1.7 times as fast as with ``unpack``
            (docs/dev/method.md). Logits differ by rounding. None for the setting of ``tune``, or True.
        unpack: types of weights, such as ``["Q5_0"]``, that prompts read as F32, in products with 64 and more tokens.
            It concerns the layers' weights in the memory of the CPU that llama.cpp did not repack (``unpackable``). On
            one Xeon Qwen2.5-Coder then reads 1.4 times as fast (docs/dev/method.md). Logits differ by rounding. None
            for the setting of ``tune``, or no type.
        reuse: the part of an earlier prompt that is used again. ``"prefix"`` is the common beginning, as in
            ``llama_cpp.Llama``. ``"edits"`` or an ``Edits`` also moves each run of tokens that both prompts share.
            Moved tokens were computed after other text, which costs some quality. ``"auto"`` moves runs if a frontier
            has measured that this keeps their share of the promise. Plans have the whole promise until a prompt has
            more tokens to move than it begins with. From then on, plans leave that share to edits. In these cases, only
            the prefix is used: the model has a recurrent state; a sliding window has left the tokens; llama.cpp cannot
            shift the memory; a call asks for a prompt's own logits.
        **kwargs: all other arguments of ``llama_cpp.Llama``.

    Attributes:
        frontier: the frontier that the model was opened with, or None.
        max_loss: the promise by which plans are chosen, in nats per token; None after ``set_plan`` with one plan.
        flash_attn: whether flash attention is used: True, False or ``"prompts"``.
        n_moved: tokens of the last prompt that were moved to their places in it.
        saved_prompts: results of ``save_prompt``. If edited prompts are used, later prompts use runs of these too.
        on_batch: a function of the number of tokens in memory, called when an evaluation begins and after each batch.

    Raises:
        ModelFileError: the file is missing, is not GGUF, or cannot be loaded.
        PlanError: the plan cannot be used, see ``set_plan``.
        PlanFileError: with ``"auto"``, the plan file, see ``plan_path``, is missing or cannot be used.
        ProfileMismatchError: the plan is of another model.
        RequestError: ``reuse``, ``flash_attn`` or a type in ``unpack`` is unknown. Or ``flash_attn="prompts"`` cannot
            be, because V is quantized or tensors are split between GPUs.

    Examples:
        >>> from adaskip_cpp import AdaSkipLlama  # before anything that imports llama_cpp
        >>> llm = AdaSkipLlama("model.gguf", n_ctx=8192, plan="auto", max_loss=0.02)
        >>> llm.create_completion(long_prompt, max_tokens=200)["choices"][0]["text"]
        >>> llm.set_plan(None)  # the whole model
    """

    def __init__(
        self,
        model_path: StrPath,
        *,
        plan: SkipPlan | Frontier | Literal["auto"] | None = None,
        max_loss: float | None = None,
        exact_batches: bool = False,
        flash_attn: FlashAttention | None = None,
        repack: Repack | None = None,
        unpack: Sequence[str] | None = None,
        reuse: Reuse = "auto",
        **kwargs: Any,
    ) -> None:
        model_path = os.fspath(model_path)
        check_gguf(model_path)
        given = {"flash_attn": flash_attn, "repack": repack, "unpack": unpack}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        self.frontier: Frontier | None = None
        self.max_loss: float | None = None
        self.on_batch: Callable[[int], object] = lambda n_tokens: None
        self._was_edited = False  # whether a prompt was worth moving runs for
        _check_choice(plan, max_loss)
        if isinstance(plan, str):
            found = plan_beside(model_path)
            if max_loss is not None and found.frontier is None:
                raise PlanError(
                    "max_loss chooses from a frontier, but the plan file beside the model has one plan; leave it out, "
                    "or run `adaskip-cpp tune`."
                )
            plan = found.plan or found.frontier
        if isinstance(plan, Frontier):
            self.frontier, plan = plan, None
            self.max_loss = DEFAULT_LOSS if max_loss is None else max_loss
            if is_here(self.frontier.machine):
                kwargs = {**self.frontier.settings.to_kwargs(), **kwargs}
        self._exact_batches = exact_batches
        self._plans: dict[int, _InForce] = {0: _InForce()}  # by tag; native code knows the tag in force
        self._plan_opened = plan  # decides the KV layout
        self._refit: Refit | None = None  # the maps of the last bulk that were fitted to its prompt
        self._phase: Phase = "prefill"
        self._n_requests = 0  # answers begun, so that one notices another
        self._prompt_rows: Rows | None = None  # takes these logits; None: they go to scores
        # In a plan, decode skips every attention that prefill skips, so these are skipped in both.
        elided = None if plan is None else np.isin(np.arange(plan.n_layer), plan.without_kv)
        with elide_kv(elided):
            super().__init__(model_path, reuse=reuse, **kwargs)
        try:
            if self.frontier is not None and (made_for := self.frontier.made_for) is not None:
                made_for.check(self.model_info, "the frontier", model_path)
            if plan is not None:
                self.set_plan(plan)
        except BaseException:
            self.close()
            raise

    @property
    def plan(self) -> SkipPlan | None:
        """The plan in force; None if the whole model runs."""
        return self._plans[self._adaskip.plan_tag()].plan

    @property
    def readable(self) -> tuple[SkipPlan, ...]:
        """The plans of mode ``prompt`` whose cached tokens may be used too, as ``set_plan`` was given them."""
        return tuple(self._plans[self._adaskip.plan_tag()].readable.values())

    def point(self, n_tokens: int) -> Point | None:
        """Return the frontier's point for a prompt of ``n_tokens``; None if no frontier chooses, or the whole model."""
        if self.frontier is None or self.max_loss is None:
            return None
        return self.frontier.point(n_tokens, self.max_loss, edited=self._leaves_share)

    @alone
    def set_plan(
        self,
        plan: SkipPlan | Literal["auto"] | None,
        *,
        max_loss: float | None = None,
        readable: Sequence[SkipPlan] = (),
    ) -> None:
        """Set the plan from the next evaluation on. After an error, the old plan stays.

        Args:
            plan: the plan; None for the whole model. ``"auto"`` chooses a plan of the frontier for each prompt: the
                fastest at the prompt's length that keeps the promise. Tokens that were read under another plan that
                keeps it are not read again.
            max_loss: for ``"auto"``: the promise, in nats per token that an answer may lose; None for 0.05.
            readable: plans of mode ``prompt``. Tokens that were evaluated in the bulk of a prompt under one of them are
                not evaluated again. A plan without a bulk changes nothing here.

        Raises:
            ProfileMismatchError: a plan was made for another model.
            NotSkippableError: a plan has a sublayer that this model cannot skip.
            PlanError: a plan needs K and V for which the model was opened without memory, is for another number of
                layers, or counts tokens in a context of several sequences; or ``"auto"`` is given without a frontier.
        """
        _check_choice(plan, max_loss)
        if isinstance(plan, str):
            if self.frontier is None:
                raise PlanError('there is no frontier to choose from; open the model with plan="auto".')
            # The next prompt sets the plan, and finds out which cached tokens a tighter promise may not read.
            self.max_loss = DEFAULT_LOSS if max_loss is None else max_loss
            self._requires_eval = True
            return
        self._put_in_force(plan, readable)
        self.max_loss = None
        self.set_reuse(self._reuse)

    def _choose(self, n_tokens: int) -> None:
        """Put the frontier's plan for a prompt of ``n_tokens`` in force, if plans are chosen for each prompt."""
        if self.frontier is None or self.max_loss is None:
            return
        edited = self._leaves_share
        if self._reuse == "auto":
            point = self.frontier.edit_point(n_tokens, self.max_loss) if edited else None
            self._use(None if point is None else point.edits)
        plan = self.frontier.choose(n_tokens, self.max_loss, edited=edited)
        self._put_in_force(plan, self.frontier.readable(self.max_loss, self.context_size, edited=edited))

    @property
    def _leaves_share(self) -> bool:
        """Whether the plans of a frontier leave a share of the promise to moved tokens."""
        return self._reuse == "auto" and self.can_move and (self._was_edited or bool(self.saved_prompts))

    def _notice_edit(self, prompt: list[int]) -> None:
        """Find out whether a frontier's plans should leave the share of edits from this prompt on.

        Tokens of faster plans are read again then. That is worth it if the prefix alone would save less than half.
        """
        if self._was_edited or self.frontier is None or self.max_loss is None or not self.can_move:
            return
        if self._reuse == "auto" and (point := self.frontier.edit_point(len(prompt), self.max_loss)) is not None:
            cached, wanted = self.input_ids[: self.n_held(self.n_tokens)], np.array(prompt, np.int32)
            first, runs = self._known(cached, wanted, point.edits)
            self._was_edited = sum(run.n for run in runs) > first

    def _put_in_force(self, plan: SkipPlan | None, readable: Sequence[SkipPlan]) -> None:
        for each in readable if plan is None else (plan, *readable):
            if not isinstance(each, SkipPlan):
                raise PlanError(f"expected a SkipPlan or None, not {type(each).__name__}; see Profile.plan().")
            self._check_model(each)
        native, current = self._adaskip, self._plans[self._adaskip.plan_tag()]
        new = _InForce(plan, self._by_bulk_id(readable, current))
        if new.readable.keys() == current.readable.keys() and new.plan == current.plan:
            return
        tag = 0 if plan is None and not new.readable else native.plan_tag() + 1
        # One native call changes the plan, and Ctrl-C may come right after it. So both plans are known until then.
        self._plans = {0: _InForce(), native.plan_tag(): current, tag: new}
        if self._refit is not None:
            self._refit.is_put = False  # a new plan has the maps of the calibration
        # The present logits are those of the old plan: an equal prompt must be evaluated again before sampling.
        requires_eval, self._requires_eval = self._requires_eval, True
        try:
            native.set_plan(plan, tag, sorted(new.readable))
        except NativeError:
            raise  # building a graph to find the sublayers failed, and llama.cpp lost its record of the present logits
        except AdaSkipError:  # refused: nothing has changed
            self._requires_eval = requires_eval
            raise
        self._plans = {0: _InForce(), tag: new}

    def _by_bulk_id(self, plans: Sequence[SkipPlan], current: _InForce) -> dict[int, SkipPlan]:
        """Return plans by the id of their bulk set, without whole-model plans, which may always be read."""
        known = {_bulk_key(plan): set_id for set_id, plan in current.readable.items()}
        new = {key: plan for plan in plans if (key := _bulk_key(plan)) not in known}
        if new:  # their maps are read, which takes long, so it is done once for all
            try:
                known |= zip(new, self._adaskip.bulk_set_ids([*new.values()]), strict=True)
            except NativeError:
                self._requires_eval = True  # as in set_plan
                raise
        result = {known[_bulk_key(plan)]: plan for plan in plans}
        result.pop(0, None)
        return result

    def _check_model(self, plan: SkipPlan) -> None:
        n_layer, n_embd, path = self.n_layer, self.n_embd(), self.model_path
        if plan.n_layer != n_layer:
            raise PlanError(f"the plan is for {plan.n_layer} layers, {path!r} has {n_layer}; make one for it.")
        for n in (each.n_embd for each in plan.sets):
            if n not in (None, n_embd):
                raise PlanError(f"the plan's vectors have {n} values, the model's {n_embd}; make one for this model.")
        if plan.model is not None:
            plan.model.check(self.model_info, "the plan", path)

    @alone
    def reset(self) -> None:
        """Forget all tokens, as ``llama_cpp.Llama.reset``."""
        super().reset()  # type: ignore[no-untyped-call]

    @alone
    def truncate(self, n: int) -> None:
        """Forget all tokens but the first ``n``. With a recurrent state, the next evaluation reads these again."""
        if 0 <= n < self.n_tokens:
            self.n_tokens, self._requires_eval = n, True

    @alone
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate token ids after the cached ones, as a prompt. While ``generate`` generates, they are an answer.

        Raises:
            StateError: cached tokens must be evaluated again, but are an image; call ``reset``.
            RequestError: the context has no room for them; nothing has changed.
        """
        self._check_room(self.n_tokens + len(tokens))
        if self._phase == "prefill" and len(tokens):
            self._choose(self.n_tokens + len(tokens))
        self._eval(self._phase, tokens)

    @alone
    def eval_decode(self, tokens: Sequence[int]) -> None:
        """Evaluate token ids as ``eval``, but as an answer: they count in the plan's online stage or schedule."""
        self._eval("decode", tokens)

    @alone
    def logits_after(self, tokens: Sequence[int]) -> Vectors:
        """Evaluate tokens as ``eval_decode``; return the logits after each, float32 ``[len(tokens), n_vocab]``.

        A StateError as in ``eval``, or while statistics of all tokens are collected: no logits are computed then.
        """
        self._check_logits()
        found, n = np.empty((len(tokens), self.n_vocab()), np.float32), 0

        def keep(rows: Vectors) -> None:
            nonlocal n
            found[n : n + len(rows)] = rows
            n += len(rows)

        self._eval("decode", tokens, keep)
        return found

    @alone
    def eval_bulk(self, tokens: Sequence[int]) -> None:
        """Evaluate token ids as ``eval``, but as the middle of a prompt: all in the bulk, without head and tail.

        They are prefill if the plan has no bulk. No logits are computed, also with ``logits_all``; ``scores`` stays.
        """
        self._eval("bulk", tokens)

    def _eval(self, phase: Phase, tokens: Sequence[int], rows: Rows | None = None) -> None:
        tokens = self._checked(tokens)
        if not tokens:
            return
        self._check_room(self.n_tokens + len(tokens))
        native = self._adaskip
        # Prefill runs every attention that bulk and decode run, so its first stale position may come earlier.
        reads: Phase = "decode" if phase == "decode" else "prefill"
        n_held = self.n_held(self.n_tokens)
        if min(n_held, native.kv_valid(reads, self.n_tokens)) < self.n_tokens or self.has_lost_window(self.n_tokens):
            stale = self._rewind(min(n_held, native.kv_valid("prefill", self.n_tokens)))
            if phase == "prefill":
                tokens = stale + tokens
            else:
                self._evaluate_prompt(stale)
        if phase == "decode":
            self._evaluate("decode", tokens, is_last=True, rows=rows)
        elif phase == "bulk" and self.plan and self.plan.bulk:
            self._evaluate_bulk(self.plan.bulk, tokens, is_read=False, aligns=False)
        elif phase == "bulk":
            self._evaluate("prefill", tokens, is_last=False, is_read=False)
        else:
            self._evaluate_prompt(tokens)

    def _evaluate_prompt(self, tokens: list[int], n_later: int = 0) -> None:
        """Evaluate tokens of a prompt, its bulk under the bulk set; ``n_later`` tokens of the prompt are to follow.

        A prompt with an image runs whole. Several tokens of an image may have one position, but windows count cells.
        """
        has_image = self.n_tokens > 0 and np.min(self.input_ids[: self.n_tokens]) < 0
        is_whole = self._reads_prompt or self.context_params.embeddings or has_image
        bulk = None if self.plan is None or is_whole else self.plan.bulk
        begin, end = bulk.span(self.n_tokens, len(tokens) + n_later) if bulk else (0, 0)
        if bulk and end:
            self._evaluate("prefill", tokens[:begin], is_last=False)
            self._evaluate_bulk(bulk, tokens[begin:end])
            tokens = tokens[end:]
        if bulk and self.n_tokens > bulk.head:
            n_near = min(max(len(tokens) + n_later - bulk.last, 0), len(tokens))
            narrow = self._narrows(bulk)
            self._evaluate("bulk" if narrow else "prefill", tokens[:n_near], is_last=False, narrow=narrow)
            tokens = tokens[n_near:]
        self._evaluate("prefill", tokens, is_last=n_later == 0, rows=self._prompt_rows)

    def _evaluate_bulk(self, bulk: Bulk, tokens: list[int], *, is_read: bool = True, aligns: bool = True) -> None:
        """Evaluate tokens of the bulk, those that its maps are fitted to as the rest of a prompt."""
        start, n_ubatch = self.n_tokens, int(self.context_params.n_ubatch)
        if bulk.refit and self._adaskip.callback is not None:  # the maps cannot be fitted, so all tokens run whole
            self._evaluate("prefill", tokens, is_last=False, is_read=is_read)
            return
        for begin, end, is_whole in bulk.pieces(start, start + len(tokens), is_fitted=self._is_refit(bulk)):
            piece = tokens[begin - start : end - start]
            if is_whole:
                self._fit_to(bulk, piece, is_read=is_read)
                continue
            if bulk.refit and self._refit is not None:
                self._refit.put(self._adaskip)
            first = bulk.first_batch(begin, end - begin, n_ubatch) if aligns else len(piece)
            self._evaluate("bulk", piece[:first], is_last=False, is_read=is_read)
            self._evaluate("bulk", piece[first:], is_last=False, is_read=is_read)

    def _narrows(self, bulk: Bulk) -> bool:
        """Whether the next tokens have the bulk's windows even where they skip nothing: see ``Bulk.refit``."""
        return self.n_tokens > bulk.head and bulk.narrows and self._adaskip.callback is None

    def _is_refit(self, bulk: Bulk) -> bool:
        """Whether the bulk's maps are fitted to the text in memory."""
        fit, known = self._refit, self.input_ids[: self.n_tokens]
        return fit is not None and fit.skip is bulk.skip and np.array_equal(fit.tokens, known[: len(fit.tokens)])

    def _fit_to(self, bulk: Bulk, tokens: list[int], *, is_read: bool) -> None:
        """Evaluate tokens of the bulk that skip nothing, and fit its maps to them if they are enough."""
        n_threads = max(int(self.context_params.n_threads_batch), 1)  # with less, llama.cpp takes its default
        fit, narrow = Refit(bulk, self._refit if self._is_refit(bulk) else None, n_threads), self._narrows(bulk)
        phase: Phase = "bulk" if narrow else "prefill"
        with self._observing(fit.add, keep_logits=True, activations=True, of_bulk=True):
            self._evaluate(phase, tokens, is_last=False, is_read=is_read, narrow=narrow)
        if len(tokens) == bulk.refit:
            fit.tokens, self._refit = self.input_ids[: self.n_tokens].copy(), fit

    def _evaluate(
        self,
        phase: Phase,
        tokens: list[int],
        *,
        is_last: bool,
        is_read: bool = True,
        narrow: bool = False,
        rows: Rows | None = None,
    ) -> None:
        """Evaluate tokens in one phase; ``rows``, if given, gets the logits after each token, a batch at a time."""
        native = self._adaskip
        native.set_phase(phase, narrow=narrow)
        # If this fails, the present logits are not those of the cached tokens.
        self._requires_eval = True
        try:
            self.on_batch(self.n_tokens)
            # One batch at a time, so that Ctrl-C inside a statistics sink ends the evaluation there.
            for batch, with_logits in self._batches(tokens, is_last=is_last):
                try:
                    self._decode(batch, with_logits=with_logits and is_read, rows=rows)
                except RuntimeError as error:
                    try:
                        native.raise_failure(error)
                    except NativeError:
                        # Out of memory, llama.cpp leaves cells that belong to no sequence: only clearing removes them.
                        self._ctx.kv_cache_clear()
                        raise
                native.raise_pending()
                self.on_batch(self.n_tokens)
        finally:
            native.set_phase("prefill")  # for code that decodes on the context without this class
        self._requires_eval = native.drops_logits or not is_last

    def _batches(self, tokens: list[int], *, is_last: bool) -> Iterable[tuple[list[int], bool]]:
        """Cut tokens into batches; return each with whether its logits are read."""
        size, every = self.n_batch, self.logits_all or self.context_params.embeddings
        batches = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        splits = is_last and not every and not self._exact_batches and self.n_layer_kv < self.n_layer
        if splits and len(batches[-1]) > 1:
            batches[-1:] = [batches[-1][:-1], batches[-1][-1:]]
        return [(batch, every or (is_last and batch is batches[-1])) for batch in batches]

    def _decode(self, tokens: list[int], *, with_logits: bool, rows: Rows | None) -> None:
        """As ``llama_cpp.Llama.eval`` of one batch, but without logits, or with those after each token for ``rows``."""
        start, end = self.n_tokens, self.n_tokens + len(tokens)
        every = rows is not None or (with_logits and self.logits_all)
        if not self._fills:
            self._ctx.kv_cache_seq_rm(-1, start, -1)
        self._batch.set_batch(batch=tokens, n_past=start, logits_all=every)
        self._batch.batch.logits[len(tokens) - 1] = with_logits or every
        self._ctx.decode(self._batch)
        self.input_ids[start:end] = tokens
        self.n_tokens = end
        if every:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(tokens), self.n_vocab()))
            if self.logits_all:
                self.scores[start:end] = logits
            if rows is not None:
                rows(logits)

    def _rewind(self, n_valid: int) -> list[int]:
        """Forget the cached tokens from the first stale one on, and return them."""
        if self.has_state or self.has_lost_window(n_valid):
            n_valid = 0  # such a memory cannot go back: it has dropped tokens, or merged them into a state
        tokens = self.input_ids[n_valid : self.n_tokens].tolist()
        if min(tokens) < 0:
            raise StateError("the cached prompt holds an image, which the new plan must see again; call reset() first.")
        if n_valid == 0:
            self.reset()
        self.n_tokens = n_valid
        return list(tokens)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """Generate token ids as ``llama_cpp.Llama.generate`` does. All evaluations after the prompt's are decode.

        Raises:
            RequestError: the context has no room, or the grammar is wrong, allows no token or goes on in too many ways.
            StateError: as in ``logits_after``; ``saved_prompts`` has a prompt of another model; or another answer was
                begun before this one ended.
        """
        tokens = list(tokens)
        with self._one_thread:
            self._begin(tokens, resets=kwargs.get("reset", True))
            number = self._n_requests
        with closing(super().generate(tokens, *args, **kwargs)) as steps:
            phase: Phase = "prefill"
            sent: Sequence[int] | None = None
            while True:
                with self._one_thread:
                    if number != self._n_requests:
                        raise StateError("another answer was begun meanwhile, and its tokens are in memory; ask again.")
                    # Set for this step alone: the caller may evaluate something else between two steps.
                    self._phase = phase
                    try:
                        token = steps.send(sent)
                    except StopIteration:
                        return
                    finally:
                        self._phase = "prefill"
                phase = "decode"
                sent = yield token

    def _begin(self, tokens: list[int], *, resets: bool) -> None:
        """Prepare for the answer to a prompt: choose a plan, and read what moves runs of earlier prompts."""
        self._check_logits()
        self._check_room(len(tokens))
        self._n_requests += 1
        self._notice_edit(tokens)
        self._choose(len(tokens))
        self.begin_request()
        if self._prompt_rows is not None or (self._reads_prompt and self.plan and self.plan.bulk):
            self.reset()  # cached tokens have no usable logits, for example the bulk of an earlier prompt
        if resets:
            self._read_edited(tokens)

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("grammar") is not None:
            check_grammar(self._model.vocab, kwargs["grammar"])
        return super()._init_sampler(*args, **kwargs)

    @alone
    def sample(self, *args: Any, **kwargs: Any) -> int:
        """Return a token id, as ``llama_cpp.Llama.sample`` does; raises RequestError as ``generate``."""
        token = int(super().sample(*args, **kwargs))
        if token < 0:
            self._adaskip.raise_failure(RuntimeError("no token was sampled"))
        return token

    def _check_logits(self) -> None:
        if self._adaskip.drops_logits:
            way_out = "leave collect_statistics() first, or open it with keep_logits=True"
            raise StateError(f"no logits are computed while statistics of all tokens are collected; {way_out}.")

    def detokenize(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> bytes:
        """Return the bytes of tokens, as ``llama_cpp.Llama`` does; a RequestError if one is not of this model."""
        return bytes(super().detokenize(self._checked(tokens), *args, **kwargs))

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        """Return the token ids as a list; raise a RequestError if one is not of this model."""
        try:
            ids = [operator.index(token) for token in tokens]
        except TypeError as error:
            raise RequestError(f"{error}; give token ids, as tokenize() returns them.") from None
        if ids and not (min(ids) >= 0 and max(ids) < self.n_vocab()):
            wrong = next(each for each in ids if not 0 <= each < self.n_vocab())
            raise RequestError(f"there is no token {wrong}; this model has ids from 0 to {self.n_vocab() - 1}.")
        return ids

    def _check_room(self, n: int) -> None:
        """Refuse ``n`` tokens in all: llama.cpp may hold more than ``n_ctx``, of which there is no record."""
        if n > self.context_size:
            raise RequestError(f"{n} tokens exceed context window of {self.context_size}; {self._shorten}")

    @property
    def _shorten(self) -> str:
        if self._adaskip.n_positions == self.context_size:
            return "shorten the prompt: this model has learned no further positions"
        return "shorten the prompt, or open the model with a larger n_ctx (--ctx)"

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        reads_prompt = kwargs.get("echo") and kwargs.get("logprobs") is not None
        steps: Any = super()._create_completion(*args, **kwargs)
        try:
            with closing(steps):
                while True:
                    with self._reading_prompt() if reads_prompt else nullcontext():
                        step = next(steps, None)
                    if step is None:
                        return
                    yield step
        except ValueError as error:
            if not str(error).startswith("Requested tokens"):
                raise
            words = str(error).rpartition(" ")[0]  # the last word is the context as llama.cpp rounds it up
            raise RequestError(f"{words} {self.context_size}; {self._shorten}") from error

    @contextmanager
    def _reading_prompt(self, rows: Rows | None = None) -> Iterator[None]:
        """Compute the logits of a prompt's own tokens while the context is open, into ``rows`` or ``scores``."""
        self._reads_prompt, self._prompt_rows = True, rows
        try:
            yield
        finally:
            self._reads_prompt, self._prompt_rows = False, None

    @property
    def online(self) -> OnlineResult | None:
        """The result of the online stage in the last request; None if the plan has no online stage."""
        return None if self.plan is None or self.plan.online is None else self._adaskip.online()

    def collect_statistics(
        self, sink: StatisticsSink, *, keep_logits: bool = False, activations: bool = False
    ) -> AbstractContextManager[None]:
        """Return a context manager that hands the statistics of each evaluated ubatch to a function.

        Each sublayer that runs is observed for each token. By default no logits are computed meanwhile: use ``eval``.
        Meanwhile a bulk whose maps are fitted to the prompt runs whole. Collecting twice at a time is a StateError.

        Args:
            sink: a function of a ``StatisticsBatch``. An exception that it raises ends the evaluation.
            keep_logits: whether logits are computed, so that ``generate`` works. The last layer's FFN is then observed
                for output tokens alone.
            activations: whether each sublayer's inputs and outputs are handed over too, ``8 * n_layer * n_embd`` bytes
                per token.

        Examples:
            >>> batches = []
            >>> with llm.collect_statistics(batches.append):
            ...     llm.eval(tokens)
        """
        return self._observing(sink, keep_logits=keep_logits, activations=activations)

    @contextmanager
    def _observing(self, sink: StatisticsSink, **options: bool) -> Iterator[None]:
        native = self._adaskip
        if native.callback is not None:
            raise StateError("statistics are collected already; leave the other collect_statistics() first.")
        try:
            native.start_statistics(sink, **options)
            yield
        finally:
            self._requires_eval = True
            try:
                native.stop_statistics()
            except KeyboardInterrupt:  # it would leave a model that computes no logits
                native.stop_statistics()
                raise

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        state |= {"plan": self._plan_opened, "exact_batches": self._exact_batches, "repack": self.repack}
        state |= {"flash_attn": self.flash_attn, "unpack": self.unpack, "reuse": self._reuse}
        return {**state, "plan_in_force": (self.plan, self.readable, self.frontier, self.max_loss)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        in_force = state.pop("plan_in_force", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if in_force is not None:  # None: llama-cpp-python's own class pickled it
            plan, readable, self.frontier, self.max_loss = in_force
            self._put_in_force(plan, readable)


def _bulk_key(plan: SkipPlan) -> tuple[object, ...]:
    """Return a value that is equal for plans whose bulks share one object as their set, and compute equal K and V."""
    bulk = plan.bulk
    return (id(plan),) if bulk is None else (id(bulk.skip), bulk.head, bulk.windowed, bulk.window_size, bulk.refit)


def _check_choice(plan: Any, max_loss: float | None) -> None:
    if plan != "auto" if isinstance(plan, str) else not isinstance(plan, SkipPlan | Frontier | None):
        raise PlanError(f'unknown plan {plan!r}; pass "auto", a SkipPlan or None.')
    if max_loss is not None:
        check_max_loss(max_loss)
        if not isinstance(plan, str | Frontier):
            raise PlanError('max_loss chooses from a frontier; pass it with plan="auto", or leave it out.')
