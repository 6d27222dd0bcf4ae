"""What a model's cache must hold after any sequence of calls, and what it must compute from it.

The oracle keeps, per position, its token and the set that it was computed under, and applies the rules of
:func:`is_readable`. What cannot be read, and everything after it, is evaluated again, as prompt. Of a prompt's new
tokens those are its bulk that are neither among the first of the sequence nor among the last of the prompt. The
reference, which refuses to read a position without K and V, evaluates that history.

An edited prompt takes the runs of tokens that both have from the cells of the one before, and what is new is read in
the order of positions. A moved cell has the K and V of its old place, and counts its moves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import reject
from oracles.drawn_plans import NOTHING
from oracles.reference import OnlineReference, ReferenceModel, ReferenceRun, Trace, Windows

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.refit import N_PRIOR
from adaskip_cpp.engine.runs import Run, beside, find_runs
from adaskip_cpp.model.edits import APART, WIDE, Edits
from adaskip_cpp.model.plan import OnlineStage
from adaskip_cpp.model.skip_set import SkipSet


@dataclass(frozen=True)
class Cell:
    """One cached position: its token, and what it was computed under."""

    token: int
    skip_set: SkipSet
    made_of: tuple[SkipSet, OnlineStage] | None = None  # from which set an online stage made that one
    in_bulk: bool = False  # whether skipped attentions kept K and V
    windows: Windows | None = None
    n_moves: int = 0
    computed: tuple[ReferenceRun, int] | None = None  # where a moved cell has its K and V from
    fitted: SkipSet | None = None  # the plan's set, if ``skip_set`` is one with maps that were fitted to the text

    @classmethod
    def bulk_of(cls, token: int, plan: SkipPlan, fit: Fit | None = None) -> Cell:
        assert plan.bulk is not None
        base, windows = plan.bulk.skip, windows_of(plan)
        return cls(token, fit.skip_set() if fit else base, in_bulk=True, windows=windows, fitted=base if fit else None)


@dataclass(frozen=True)
class Fit:
    """What maps were fitted to, the traces of some tokens, and the text up to the last of them."""

    of: SkipSet
    text: tuple[int, ...] = ()
    samples: tuple[tuple[Trace, SkipSet], ...] = ()  # with the set that each ran under

    def skip_set(self) -> SkipSet:
        """The set with the maps of least squares, with rows that hold each map where it was."""
        if self.of.up is None:
            return self.of
        up = self.of.up.copy()
        for layer, kind in np.argwhere(self.of.skip):
            at, first = (layer, kind), (layer, kind)
            if self.of.skip[layer].all() and self.of.scale[layer, 0] == 1 and not self.of.up[layer, 0].any():
                first = (layer, 0)  # one map for the whole layer
            traces = [trace for trace, under in self.samples if not (under.skip[at] or under.skip[first])]
            if traces and up[at].any():
                u = np.stack([each.u[(*first, 0)] for each in traces])
                v = np.stack([each.v[(*at, 0)] for each in traces])
                z = u @ self.of.down[at].astype(np.float64).T
                rest = v - self.of.scale[at] * u - (0 if self.of.bias is None else self.of.bias[at])
                weight = np.sqrt(N_PRIOR * (z * z).sum() / len(self.samples) / z.shape[1]) * np.eye(z.shape[1])
                rows, values = np.concatenate([z, weight]), np.concatenate([rest, weight @ up[at].T])
                up[at] = np.linalg.lstsq(rows, values, rcond=None)[0].T
        return SkipSet(self.of.skip, self.of.scale, self.of.bias, self.of.down, up.astype(np.float32))


def windows_of(plan: SkipPlan) -> Windows | None:
    """The attentions that look back at a window where the bulk of a plan runs them; None for none."""
    if (bulk := plan.bulk) is None:
        return None
    layers = tuple(layer for layer in bulk.windowed if layer not in bulk.skip.attention)
    return Windows(layers, bulk.window_size, bulk.head) if layers else None


def bulks_of(plans: Sequence[SkipPlan]) -> set[tuple[SkipSet, Windows | None, bool]]:
    """The bulk sets of plans, their windows and whether maps are fitted, but for those that leave the whole model."""
    bulks = {(plan.bulk.skip, windows_of(plan), plan.bulk.refit > 0) for plan in plans if plan.bulk is not None}
    return {each for each in bulks if each[0].n_skip or each[1] is not None}


def is_readable(cell: Cell, plan: SkipPlan, skip_set: SkipSet, readable: Sequence[SkipPlan] = ()) -> bool:
    """Whether a set of a plan may read a cached position, with the bulk of ``readable`` plans besides its own.

    It may read what the whole model computed, a set of the plan, what its online stage made of one, or such a bulk,
    unless an attention that runs now was skipped there. In a bulk none is, as K and V are kept.
    """
    if cell.in_bulk:
        is_whole = cell.skip_set.n_skip == 0 and cell.windows is None
        of = (cell.fitted or cell.skip_set, cell.windows, cell.fitted is not None)
        return is_whole or of in bulks_of([plan, *readable])
    if not set(cell.skip_set.attention) <= set(skip_set.attention):
        return False
    if cell.made_of is not None:
        return cell.made_of == (plan.decode, plan.online)
    return cell.skip_set.n_skip == 0 or cell.skip_set in (plan.prefill, *(each for _, each in plan.decode_sets))


class Cells:
    """The reference's sequence for a history, evaluated no further than asked for."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model, self._run = model, ReferenceRun(model)
        self._done: list[Cell] = []
        self._traces: list[Trace] = []

    def trace(self, cells: Sequence[Cell], index: int) -> Trace:
        """The trace of one position of this history, which was not moved."""
        self.evaluate(cells)
        return self._traces[index]

    def evaluate(self, cells: Sequence[Cell]) -> ReferenceRun:
        """The sequence that holds this history."""
        common = common_prefix(self._done, cells)
        if common < len(self._done):
            self._run.rewind(common)
            del self._done[common:], self._traces[common:]
        for (each, in_bulk, windows, is_moved), group in itertools.groupby(cells[common:], _under):
            same = list(group)
            if is_moved:
                for run, place in (cell.computed for cell in same if cell.computed is not None):
                    self._run.take(run, place, 1)
                    self._traces.append(Trace(*[np.empty(0)] * 4))
            else:
                tokens = [cell.token for cell in same]
                trace = self._run.eval(tokens, each.skip, each.scale, each.bias, each.down, each.up, in_bulk, windows)
                self._traces += [trace.part(slice(i, i + 1)) for i in range(len(tokens))]
            self._done += same
        return self._run


def _under(cell: Cell) -> tuple[SkipSet, bool, Windows | None, bool]:
    return cell.skip_set, cell.in_bulk, cell.windows, cell.computed is not None


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items two sequences have in common from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class History:
    """What the cache must hold, and what the next decoded token must run under."""

    reference: Cells
    n_ubatch: int  # tokens evaluated at once; a schedule and the online stage change the set between two such
    draft: Callable[[list[int]], list[int]] = lambda tokens: []  # proposes tokens after those cached and the last one
    # Whether the next evaluation begins at the start, as a window has lost positions that it would read, and the first
    # position that windows still have where a prompt comes: which cells it writes over, llama.cpp alone knows.
    restarts: Callable[[], bool] = lambda: False
    oldest: Callable[[], int] = lambda: 0
    edits: Edits | None = None  # how its runs are moved; None where they are not
    saved: Sequence[History] = ()  # histories whose runs are moved as well
    cells: list[Cell] = field(default_factory=list)
    plan: SkipPlan = NOTHING
    readable: Sequence[SkipPlan] = ()
    logits_are_current: bool = False
    n_decoded: int = 0
    stage: OnlineReference | None = None
    fit: Fit | None = None  # the last one
    collects: bool = False  # whether statistics are collected, so that none is made

    @property
    def tokens(self) -> list[int]:
        """The cached tokens."""
        return [cell.token for cell in self.cells]

    def set_plan(self, plan: SkipPlan, readable: Sequence[SkipPlan] = ()) -> None:
        """Another plan, or others whose bulk it may read; equal ones change nothing."""
        if plan != self.plan or bulks_of(readable) != bulks_of(self.readable):
            self.plan, self.readable, self.logits_are_current = plan, readable, False
            self.begin_request()

    def set_edits(self, edits: Edits | None) -> None:
        """Another way to move runs of tokens from here on."""
        self.edits, self.logits_are_current = edits, self.logits_are_current and edits == self.edits

    def begin_request(self) -> None:
        """No token of this request is decoded yet."""
        online, fixed = self.plan.online, self.plan.decode
        self.n_decoded, self.stage = 0, None
        if online is not None:
            self.stage = OnlineReference(online.window, online.threshold, online.scale, fixed.skip, fixed.scale)

    def decode_set(self) -> SkipSet:
        """What the next decoded token runs under."""
        fixed = self.plan.decode
        if self.stage is not None:
            return SkipSet(self.stage.skip, self.stage.factor, fixed.bias, fixed.down, fixed.up)
        return [each for start, each in self.plan.schedule or ((0, fixed),) if start <= self.n_decoded][-1]

    def eval(self, tokens: list[int]) -> None:
        """Evaluate tokens of a prompt."""
        self._append_prompt(self._forget_unreadable(self.plan.prefill) + tokens)

    def eval_bulk(self, tokens: list[int]) -> None:
        """Evaluate tokens of a prompt that is to go on."""
        self._append_prompt(self._forget_unreadable(self.plan.prefill))
        self._append_bulk(tokens)
        self.logits_are_current = False

    def _forget_unreadable(self, skip_set: SkipSet) -> list[int]:
        """The tokens that are to be evaluated again as ``skip_set`` cannot read them."""
        restarts = self.restarts()
        if not restarts and self._n_readable(skip_set) == len(self.cells):
            return []
        start = 0 if restarts else self._n_readable(self.plan.prefill)
        tokens = self.tokens[start:]
        del self.cells[start:]
        return tokens

    def _append_prompt(self, tokens: list[int], n_after: int = 0) -> None:
        bulk, n = self.plan.bulk, len(tokens)
        end = 0 if bulk is None else min(max(n + n_after - bulk.tail, 0), n)
        head = 0 if bulk is None or (bulk.head < bulk.refit and not self.cells) else bulk.head  # else it joins the fit
        begin = end if bulk is None else min(max(head - len(self.cells), 0), end)
        self._append_whole(tokens[:begin])
        self._append_bulk(tokens[begin:end])
        near = max(n + n_after - bulk.last, end) if self._narrows() else end
        self._append_whole(tokens[end:near], narrow=True)
        self._append_whole(tokens[near:])
        self.logits_are_current = self.logits_are_current or bool(tokens)

    def _append_whole(self, tokens: Sequence[int], *, narrow: bool = False) -> None:
        plan, bulk = self.plan, self.plan.bulk
        if narrow and bulk and not plan.prefill.n_skip:  # as in the bulk, but nothing is skipped
            windows, of = windows_of(plan), bulk.skip
            self.cells += [Cell(each, plan.prefill, in_bulk=True, windows=windows, fitted=of) for each in tokens]
        else:
            self.cells += [Cell(token, plan.prefill) for token in tokens]

    def _narrows(self) -> bool:
        """Whether the next tokens have the windows of the bulk even where they skip nothing."""
        bulk = self.plan.bulk
        return bulk is not None and len(self.cells) > bulk.head and bulk.narrows and not self.collects

    def _append_bulk(self, tokens: list[int]) -> None:
        """Append tokens of the bulk, of which some run whole if maps are fitted to them."""
        plan, bulk, start = self.plan, self.plan.bulk, len(self.cells)
        if bulk is None or (bulk.refit and self.collects):
            self._append_whole(tokens)
            return
        is_fitted = self._fit_in_force() is not None
        for begin, end, is_whole in bulk.pieces(start, start + len(tokens), is_fitted=is_fitted):
            piece = tokens[begin - start : end - start]
            if not is_whole:
                fit = self._fit_in_force()
                self.cells += [Cell.bulk_of(token, plan, fit) for token in piece]
                continue
            known = self._fit_in_force() or Fit(bulk.skip)
            self._append_whole(piece, narrow=self._narrows())
            if len(piece) == bulk.refit:
                at = range(max(begin, bulk.head, 1), end)
                samples = [(self.reference.trace(self.cells, i), plan.prefill) for i in at]
                self.fit = Fit(bulk.skip, tuple(self.tokens), (*known.samples, *samples))

    def _fit_in_force(self) -> Fit | None:
        """The fit of the plan's bulk to the text in memory."""
        fit, bulk = self.fit, self.plan.bulk
        is_ours = bulk is not None and bulk.refit and fit is not None and fit.of is bulk.skip
        return fit if is_ours and tuple(self.tokens[: len(fit.text)]) == fit.text else None

    def _n_readable(self, skip_set: SkipSet, cells: Sequence[Cell] | None = None) -> int:
        cells, most_moves = self.cells if cells is None else cells, self.edits.most_moves if self.edits else 0
        for position, cell in enumerate(cells):
            if cell.n_moves > most_moves or not is_readable(cell, self.plan, skip_set, self.readable):
                return position
        return len(cells)

    def prompt(self, tokens: list[int]) -> None:
        """A new request: llama-cpp-python keeps the common prefix, and evaluates at least one token."""
        self.begin_request()
        self._take_runs(tokens, self.oldest())
        common = common_prefix(self.tokens, tokens)
        if common == len(tokens):
            if len(self.cells) == len(tokens) and self.logits_are_current:
                return
            common -= 1
        del self.cells[common:]
        self.eval(tokens[common:])

    def _take_runs(self, tokens: list[int], oldest: int) -> None:
        """Read an edited prompt up to the last run of tokens that it has from the cells, or from saved ones."""
        if self.edits is None:
            return
        first, found = self._runs(self.cells[: self._n_readable(self.plan.prefill)], tokens)
        taken, runs = [Run(0, 0, first), *found], [(run, self) for run in found]
        rest = [(each, self._runs(each.cells, tokens, wide=APART)) for each in self.saved]
        is_replaced = False  # by a saved state, even if the plan turns out to read nothing of it
        while rest:
            least, mend = self.edits.least, self.edits.mend
            free = [beside([Run(0, 0, n, 0), *theirs], taken, least=least, mend=mend) for _, (n, theirs) in rest]
            index = max(range(len(rest)), key=lambda index: sum(run.n for run in free[index]))
            taken += free[index]
            is_replaced |= bool(free[index])
            best, _ = rest.pop(index)
            n = self._n_readable(self.plan.prefill, best.cells)
            valid = [run._replace(n=min(run.n, n - run.start)) for run in free[index] if run.start < n]
            moves = (cell.n_moves + run.n_moves for run in valid for cell in best.cells[run.start : run.start + run.n])
            if max(moves, default=0) <= 255:  # cells count no further, and then the saved state is not read at all
                runs += [(run, best) for run in valid]
        window = max(filter(None, self.reference.model.window), default=0)
        if not (runs or is_replaced) or (self.cells and oldest > max(0, first - window + 1)):
            return
        sources = {id(each): each.reference.evaluate(each.cells).copy() for _, each in runs}
        held = {id(each): list(each.cells) for _, each in runs}
        del self.cells[first:]
        self.logits_are_current = False
        for run, history in sorted(runs, key=lambda each: each[0].to):
            self._append_prompt(tokens[len(self.cells) : run.to], len(tokens) - run.to)
            for i, cell in enumerate(held[id(history)][run.start : run.start + run.n], run.start):
                computed = cell.computed or (sources[id(history)], i)
                self.cells.append(replace(cell, n_moves=cell.n_moves + run.n_moves, computed=computed))
            del self.cells[self._n_readable(self.plan.prefill) :]

    def _runs(self, cells: Sequence[Cell], tokens: list[int], wide: int = WIDE) -> tuple[int, list[Run]]:
        """With how many cells a prompt begins, and which runs of the others it has, without what is mended."""
        assert self.edits is not None
        held, mend = [cell.token for cell in cells], self.edits.mend
        first, bulk_tail = common_prefix(held, tokens), self.plan.bulk.tail if self.plan.bulk is not None else 0
        end = max(0, len(tokens) - max(self.edits.tail, bulk_tail))
        both = np.array(held, np.int32), np.array(tokens, np.int32)
        found = find_runs(*both, first=first, end=end, least=mend + self.edits.least)
        found = [run._replace(n_moves=wide if run.n_moves == WIDE else 1) for run in found]
        runs = [run for run in found if run.n_moves <= self.edits.most_moves]
        return first, [Run(run.start + mend, run.to + mend, run.n - mend, run.n_moves) for run in runs]

    def decode(self, tokens: list[int]) -> None:
        """Evaluate a generated token and a draft of those after it."""
        self._append_prompt(self._forget_unreadable(self.decode_set()))
        for start in range(0, len(tokens), self.n_ubatch):
            piece = tokens[start : start + self.n_ubatch]
            made_of = (self.plan.decode, self.plan.online) if self.stage is not None and self.stage.ffn else None
            self.cells += [Cell(token, self.decode_set(), made_of) for token in piece]
            self.logits_are_current = True
            self.n_decoded += len(piece)
            if self.stage is not None:
                for index in range(-len(piece), 0):
                    self.stage.observe(self.trace(index))
                if (np.abs(self.stage.similarity - self.stage.threshold) < 1e-5).any():
                    reject()  # float32 may choose otherwise

    def generate(self, prompt: list[int]) -> Generator[int, int, None]:
        """Answer a prompt: yields the position whose logits the next token is sampled from, and is sent that token."""
        self.prompt(prompt)
        index = len(self.cells) - 1
        while True:
            token = -1
            while index < len(self.cells):
                token = yield index
                index += 1
                if index < len(self.cells) and self.cells[index].token != token:  # not as the draft has it
                    del self.cells[index:]
                    self.logits_are_current = False
            self.decode([token, *self.draft([*self.tokens, token])])

    def trace(self, index: int = -1) -> Trace:
        """What the reference computes for one of the cached positions."""
        return self.reference.trace(self.cells, index)
