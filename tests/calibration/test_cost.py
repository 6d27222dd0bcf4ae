"""adaskip_cpp.calibration.cost: measured on a model of known cost, whose evaluations advance a clock of their own."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from oracles.fixtures import Open

from adaskip_cpp import SkipPlan
from adaskip_cpp.calibration import cost
from adaskip_cpp.errors import RequestError


class TimedLlama:
    """Every evaluation takes as long as known costs say; a plan that runs an attention without KV is an error.

    A ubatch of a prompt has no outputs: the last layer with KV of its own computes K and V alone, those above nothing.
    ``base``, ``growth`` and ``kept`` are the truth, seconds per token, ``limit`` KV cells, ``head`` seconds of a
    decoded token's output, ``noise`` the relative deviation of times; one in twenty is also three times as long.
    The evaluation of number ``slow`` takes ten times as long. ``shapes`` are sizes of FFNs, by default all alike.
    """

    def __init__(
        self,
        n_layer: int = 12,
        growth: float = 1e-7,
        *,
        shapes: Sequence[int] | None = None,
        windows: Any = 0,
        limit: Any = math.inf,
        size: int = 512,
        n_ctx: int = 8192,
        swa_full: bool = False,
        n_layer_kv: int | None = None,
    ) -> None:
        self.base, self.growth = np.tile([1e-4, 3e-4], (n_layer, 1)), np.full(n_layer, growth)
        self.limit = np.broadcast_to(np.array(limit, float), n_layer)
        self.fixed, self.kept, self.head, self.noise, self.now = 2e-4, 2e-5, 5e-4, 0.0, 0.0
        self.n_layer, self.n_layer_kv, self.n_batch = n_layer, n_layer_kv or n_layer, size
        self.ctx = self.draft_model = self.max_loss = None
        self.readable, self.context_size, self.flash_attn, self.repack, self.unpack = (), n_ctx, False, True, ()
        self.context_params = SimpleNamespace(
            n_ubatch=size, n_threads=2, n_threads_batch=2, flash_attn_type=0, type_k=1, type_v=1, swa_full=swa_full
        )
        self.model_params = SimpleNamespace(n_gpu_layers=0x7FFFFFFF, use_extra_bufts=True)
        sizes = zip(shapes or [8] * n_layer, np.broadcast_to(windows, n_layer), strict=True)
        self.sublayers = tuple(
            SimpleNamespace(layer=layer, kind=kind, skippable=True, in_bulk=True, shape=shape, window=window)
            for layer, (size_of_ffn, slides) in enumerate(sizes)
            for kind, shape, window in (("attention", int(slides), int(slides)), ("ffn", 10_000 + size_of_ffn, 0))
        )
        self.plan: SkipPlan | None = None
        self.n_tokens, self.n_evaluated = 0, 0
        self.fail_after, self.slow = 0, 0  # numbers of evaluations
        self._rng = np.random.default_rng(0)
        self._holes = np.zeros(n_layer, bool)

    def n_vocab(self) -> int:
        return 100

    def n_embd(self) -> int:
        return 4

    def set_plan(self, plan: SkipPlan | None, readable: Any = ()) -> None:
        self.plan = plan

    def reset(self) -> None:
        self.n_tokens = 0
        self._holes[:] = False

    def synchronize(self) -> None:
        pass

    def token_seconds(self, skip: np.ndarray, end: int) -> float:
        """A decoded token, its output included."""
        cells = np.minimum(-(-end // 256) * 256, self.limit)
        attention = sum((self.base[:, 0] + self.growth * cells)[~skip[:, 0]])
        return float(self.fixed + self.head + attention + sum(self.base[~skip[:, 1], 1]))

    def unread_seconds(self, skip: np.ndarray, keeps: bool, end: int) -> float:
        """A token of a ubatch without outputs, layer by layer: nothing is computed that no K and V above depend on."""
        seconds, is_needed = self.fixed, False
        for layer in reversed(range(self.n_layer_kv)):
            cells = min(-(-end // 256) * 256, self.limit[layer])
            runs = ~skip[layer]
            if runs[1] and is_needed:
                seconds += self.base[layer, 1]
            if runs[0] and is_needed:
                seconds += self.base[layer, 0] + self.growth[layer] * cells
            elif runs[0] or keeps:
                seconds += self.kept
            is_needed = is_needed or runs[0] or keeps
        return float(seconds)

    def eval_bulk(self, tokens: list[int]) -> None:
        plan = self.plan or SkipPlan.manual(self.n_layer)
        chosen, keeps = plan.skipped("bulk").skip, plan.bulk is not None
        self._write(tokens, chosen, keeps=keeps)
        n_maps = (
            0 if plan.bulk is None or plan.bulk.skip.up is None else np.count_nonzero(plan.bulk.skip.up.any((2, 3)))
        )
        self._pass(len(tokens) * (self.unread_seconds(chosen, keeps, self.n_tokens) + 3e-5 * n_maps))

    def eval_decode(self, tokens: list[int]) -> None:
        chosen = (self.plan or SkipPlan.manual(self.n_layer)).decode.skip
        self._write(tokens, chosen)
        self._pass(len(tokens) * self.token_seconds(chosen, self.n_tokens))

    def _write(self, tokens: list[int], skip: np.ndarray, *, keeps: bool = False) -> None:
        self.n_evaluated += 1
        if self.n_evaluated == self.fail_after:
            raise KeyboardInterrupt
        for each in self.sublayers:
            kind = ("attention", "ffn").index(each.kind)
            assert each.skippable or keeps or not skip[each.layer, kind], "skips what only the bulk can"
        assert not (self._holes & ~skip[:, 0]).any(), "reads KV that was never written"
        self._holes |= skip[:, 0] & (not keeps)
        self.n_tokens += len(tokens)
        assert self.n_tokens <= self.context_size and 0 <= min(tokens) <= max(tokens) < 100

    def _pass(self, seconds: float) -> None:
        disturbed = 10 if self.n_evaluated == self.slow else 3 if self._rng.random() < 0.05 and self.noise else 1
        self.now += seconds * disturbed * max(1 + self.noise * self._rng.normal(), 0.2)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Open:
    """``timed(n_layer=12, growth=1e-7, ...)``: a TimedLlama whose layers all cost the same."""

    def make(*args: Any, **options: Any) -> TimedLlama:
        llm = TimedLlama(*args, **options)
        monkeypatch.setattr(cost, "perf_counter", lambda: llm.now)
        return llm

    return make


@pytest.mark.parametrize("shapes", [[8] * 12, [8] * 5 + [16] * 7])
@pytest.mark.parametrize("kinds_of_attention", [1, 3])
def test_the_fit_recovers_the_truth_by_shape(kinds_of_attention: int, shapes: list[int], timed: Open) -> None:
    llm = timed(shapes=shapes, windows=9000 + np.arange(12) % kinds_of_attention)
    llm.base[:, 1] *= np.array(shapes) / 8
    found = cost.measure_cost(llm, seconds=60, rank=2)
    assert (found.prefill.each_map, found.decode.each_map) == (pytest.approx(3e-5 * 512, rel=1e-6), 0)
    for phase, n_tokens in ((found.prefill, 512), (found.decode, 1)):
        np.testing.assert_allclose(phase.base, llm.base * n_tokens, rtol=1e-6)
        np.testing.assert_allclose(phase.growth, llm.growth * n_tokens, rtol=1e-6)
        assert phase.fixed == pytest.approx((2e-4 + 5e-4 * (n_tokens == 1)) * n_tokens, rel=1e-6)
        assert len({*phase.base[:, 0]}) <= kinds_of_attention and len({*phase.base[:, 1]}) == len({*shapes})
    np.testing.assert_allclose(found.prefill.kept, 2e-5 * 512, rtol=1e-6)
    assert found.n_layer_kv == 12 and not found.decode.kept.any() and found.deepest >= 6144


def test_predictions_hold_in_noise_and_with_disturbed_runs(timed: Open) -> None:
    llm = timed(20, 2e-8)
    llm.noise = 0.1
    found = cost.measure_cost(llm, seconds=200)
    skip = np.zeros((20, 2), bool)
    skip[3:9, 0] = skip[10:14, 1] = True
    for context in (512, 2048, 6000):
        true = llm.token_seconds(skip & False, context + 1) / llm.token_seconds(skip, context + 1)
        predicted = found.seconds(None, context, "decode") / found.seconds(skip, context, "decode")
        assert predicted == pytest.approx(true, rel=0.03)


def test_layers_without_kv_of_their_own_cost_what_the_last_token_takes(timed: Open) -> None:
    llm = timed(n_layer_kv=5)
    found = cost.measure_cost(llm, seconds=60)
    nothing = np.zeros((12, 2), bool)
    expected = sum(512 * llm.unread_seconds(nothing, False, end) for end in (512, 1024, 1536))
    assert found.seconds(None, 1537, "prefill") == pytest.approx(expected + llm.token_seconds(nothing, 1537), rel=1e-6)


def test_what_the_bulk_alone_can_skip_is_measured_too(timed: Open) -> None:
    """What keeping K and V costs there is never left out, and so belongs to the rest."""
    llm = timed(windows=[0] * 10 + [4096] * 2, n_ctx=4096)
    llm.sublayers[16].skippable = llm.sublayers[18].skippable = False  # attentions of layers 8 and 9
    found = cost.measure_cost(llm, seconds=100)
    np.testing.assert_allclose(found.prefill.base[:, 0], [1e-4 * 512] * 8 + [8e-5 * 512] * 2 + [1e-4 * 512] * 2)
    np.testing.assert_allclose(found.prefill.growth, 1e-7 * 512)
    assert found.prefill.fixed == pytest.approx((2e-4 + 4e-5) * 512) and found.prefill.fixed_growth == 0
    assert not found.decode.base[8:10, 0].any() and found.decode.base[:8, 0].all()


GEMMA_3 = np.where(np.arange(12) % 6 == 5, 0, 512)
LIMITED = np.where(GEMMA_3, 1024, math.inf)  # the window and a ubatch of 512


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"windows": GEMMA_3}, LIMITED),
        ({"windows": GEMMA_3, "swa_full": True}, LIMITED),
        ({"windows": 512, "swa_full": True}, math.inf),
        ({"windows": 4096, "n_ctx": 2048}, math.inf),
    ],
    ids=["windows", "windows whose KV is kept", "KV that is kept and read whole", "wider than the context"],
)
def test_layers_with_a_window_stop_growing_where_the_truth_does(options: Any, limit: Any, timed: Open) -> None:
    llm = timed(limit=limit, **options)
    found = cost.measure_cost(llm, seconds=100)
    np.testing.assert_array_equal(found.limit, llm.limit)
    np.testing.assert_allclose(found.decode.growth, llm.growth, rtol=1e-6)
    for context in (500, 1020, 3000, 6000):
        expected = llm.token_seconds(np.zeros((12, 2), bool), context + 1)
        assert found.seconds(None, context, "decode") == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_skipped_belongs_to_the_rest_and_grows_with_it(timed: Open) -> None:
    llm = timed()
    llm.sublayers[0].skippable = llm.sublayers[0].in_bulk = False  # attention of layer 0
    found = cost.measure_cost(llm, seconds=100)
    assert found.prefill.base[0, 0] == found.prefill.growth[0] == 0
    assert found.prefill.fixed == pytest.approx((2e-4 + 1e-4) * 512, rel=1e-6)
    assert found.prefill.fixed_growth == pytest.approx(1e-7 * 512, rel=1e-6)


def test_the_time_is_kept_to_and_more_of_it_is_spent_on_more_rounds(timed: Open) -> None:
    evaluated = []
    for seconds, contexts in ((40, {}), (1, {"contexts": [512]}), (60, {"contexts": [512]})):
        llm, seen = timed(30, 1e-8), list[float]()
        llm.base[:] = 5e-6, 7e-6
        cost.measure_cost(llm, seconds=seconds, on_progress=seen.append, **contexts)
        counted = seen[2:]  # after the warm-up, whose time does not count
        assert counted == sorted(counted) and 0 <= min(seen) <= max(seen) <= 1
        assert contexts or (20 < llm.now < 45 and max(seen) > 0.5)
        evaluated.append(llm.n_evaluated)
    assert evaluated[2] > 2 * evaluated[1]


@pytest.mark.parametrize("slow", range(55, 77, 2))
def test_a_slow_moment_does_not_change_the_costs_of_a_slow_model(timed: Open, slow: int) -> None:
    """One round alone takes longer than the time allows. Each trial slows another evaluation down."""
    llm = timed(24, 2e-8)
    llm.slow = slow
    found = cost.measure_cost(llm, seconds=1, contexts=[512, 2048])
    np.testing.assert_allclose(found.prefill.base, llm.base * 512, rtol=0.05)
    np.testing.assert_allclose(found.prefill.growth, llm.growth * 512, rtol=0.3)


@pytest.mark.parametrize("seconds, gaps", [(60, {2048 - 512 - 525, 8192 - 512 - 2061}), (0.1, {8192 - 512 - 525})])
def test_between_contexts_the_cache_is_filled(
    seconds: float, gaps: set[int], timed: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a ubatch and 13 tokens, 1,011 are missing. In too little time, the first and the last context are timed."""
    llm, filled, fill = timed(n_ctx=9000), set[int](), cost.fill
    monkeypatch.setattr(cost, "fill", lambda llm, tokens: (filled.add(len(tokens)), fill(llm, tokens)))
    found = cost.measure_cost(llm, seconds=seconds, contexts=[512, 2048, 8192])
    assert filled == gaps and found.deepest == 8192 + 13
    np.testing.assert_allclose(found.prefill.growth, llm.growth * 512, rtol=1e-6)


def test_after_ctrl_c_the_plan_is_put_back_and_the_cache_is_empty(timed: Open) -> None:
    llm = timed()
    llm.plan, llm.fail_after = SkipPlan.manual(12, [3]), 40
    with pytest.raises(KeyboardInterrupt):
        cost.measure_cost(llm, seconds=1)
    assert llm.plan == SkipPlan.manual(12, [3]) and llm.n_tokens == 0


def test_a_small_context_is_measured_as_far_as_it_goes_and_one_without_room_is_refused(timed: Open) -> None:
    llm, nothing = timed(growth=0, n_ctx=64, size=32), np.zeros((12, 2), bool)
    found = cost.measure_cost(llm, seconds=1)
    assert found.seconds(None, 64, "decode") == pytest.approx(llm.token_seconds(nothing, 64), rel=1e-6)
    llm = timed(n_ctx=8)
    with pytest.raises(RequestError, match=r"too small.*n_ctx="):
        cost.measure_cost(llm)
    assert llm.n_evaluated == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe", "gemma4", "gemma4-per-layer"])
def test_tokens_that_fill_the_cache_are_not_read_again(name: str, open_tiny: Open) -> None:
    llm = open_tiny(name, logits_all=False)
    assert cost.can_fill(llm)
    skippable = next(row.layer for row in llm.sublayers if row.kind == "attention" and row.skippable)
    for plan in (None, SkipPlan.manual(llm.n_layer, ffn=[1], phase="bulk"), SkipPlan.manual(llm.n_layer, [skippable])):
        llm.reset()
        llm.set_plan(plan)
        llm.eval([1, 5])
        cost.fill(llm, [6] * 40)
        assert llm.plan == plan
        seen: list[Any] = []
        with llm.collect_statistics(seen.append):
            llm.eval_bulk([7, 8])
            llm.eval_decode([9])
        assert [batch.positions.tolist() for batch in seen] == [[42, 43], [44]]
    assert not cost.can_fill(open_tiny("gemma3n"))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4", "gemma4-per-layer", "gemma3n"])
def test_a_tiny_model_is_measured(name: str, open_tiny: Open) -> None:
    plan = SkipPlan.manual(3, ffn=[0]) if name == "llama" else None
    llm = open_tiny(name, under=plan, logits_all=False)
    found = cost.measure_cost(llm, seconds=0.5)
    assert llm.plan is plan and llm.n_tokens == 0
    assert found.seconds(None, 100, "prefill") > 0
    assert found.settings.n_threads == llm.n_threads and found.settings.type_k == "F32"
