"""adaskip_cpp.tuning.exact: the search for settings, on invented times whose best answer is known.

A request's time is, by definition, the sum of the times of its tokens, each at its depth.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import ModelFileError, NativeError, RequestError
from adaskip_cpp.model.settings import Settings
from adaskip_cpp.model.skip_set import KINDS
from adaskip_cpp.tuning import exact
from adaskip_cpp.tuning.exact import FoundSettings, fastest_settings

DEFAULT = Settings()
PHYSICAL, LOGICAL = 4, 8
Seconds = Callable[[Settings, int], float]


@dataclass
class Machine:
    """A machine with one model at a time. Times of tokens depend on the settings and the number of tokens before."""

    prompt: Seconds = lambda settings, depth: 1e-3
    token: Seconds = lambda settings, depth: 1e-2  # of an answer
    fails: Callable[[Settings, int], None] = lambda settings, depth: None  # may raise, at depth 0 when it is opened
    file_type: str = "2"
    unpackable: Mapping[str, int] = field(default_factory=dict)
    repackable: int = 0
    can_fill: bool = True  # whether the bulk can skip every sublayer
    n_positions: int = 0  # tokens that the model has learned positions for, 0 for any number
    opened: list[Settings] = field(default_factory=list)  # of every model
    now: float = 0.0
    n_read: int = 0
    is_open: bool = False
    plan: SkipPlan | None = None
    n_layer: int = 1

    def open(self, settings: Settings, n_ctx: int) -> Any:
        assert not self.is_open, "one model fits into memory"
        self.fails(settings, 0)
        self.opened.append(settings)
        self.is_open, self.plan, self.n_tokens, self.pending = True, None, 0, 0.0
        self.context_size = min(n_ctx, self.n_positions or n_ctx)
        self.sublayers = [SimpleNamespace(layer=0, kind=kind, in_bulk=self.can_fill) for kind in KINDS]
        self.metadata = {"general.file_type": self.file_type}
        threads = settings.n_threads or PHYSICAL, settings.n_threads_batch or LOGICAL
        self.context_params = SimpleNamespace(n_threads=threads[0], n_threads_batch=threads[1])
        return self

    def close(self) -> None:
        self.is_open = False

    def n_vocab(self) -> int:
        return 100

    def reset(self) -> None:
        self.n_tokens = 0

    def set_plan(self, plan: SkipPlan | None, readable: tuple[SkipPlan, ...] = ()) -> None:
        """Only a plan whose bulk skips everything is set. The whole model may read what it wrote."""
        assert self.can_fill
        assert plan.skipped("bulk").skip.all() if plan else readable == (self.plan,)
        self.plan = plan

    def eval_bulk(self, tokens: list[int]) -> None:
        self._eval(tokens, self.prompt)

    def eval_decode(self, tokens: list[int]) -> None:
        assert len(tokens) == 1
        self._eval(tokens, self.token)

    def _eval(self, tokens: list[int], seconds: Seconds) -> None:
        assert tokens and all(0 <= token < 100 for token in tokens)
        assert self.n_tokens + len(tokens) <= self.context_size
        self.n_read += 0 if self.plan else len(tokens)
        for _ in tokens:
            self.fails(self.opened[-1], self.n_tokens)
            self.pending += 0.0 if self.plan else seconds(self.opened[-1], self.n_tokens)
            self.n_tokens += 1

    def synchronize(self) -> None:  # a GPU computes until then
        self.now += self.pending
        self.pending = 0.0


Search = Callable[..., FoundSettings]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Search:
    """``search(machine, context, n_answer, bound)`` counts all. 20,000 tokens suffice to try all settings twice."""
    monkeypatch.setattr(exact, "physical_cores", lambda: PHYSICAL)
    monkeypatch.setattr(exact, "logical_cores", lambda: LOGICAL)

    def run(
        machine: Machine, context: int = 6000, n_answer: int = 128, bound: int = exact.MOST_TOKENS, **more: Any
    ) -> FoundSettings:
        monkeypatch.setattr(exact, "MOST_TOKENS", bound)
        monkeypatch.setattr(exact, "perf_counter", lambda: machine.now)
        try:
            found = fastest_settings(machine.open, context=context, n_answer=n_answer, **more)
        finally:
            assert not machine.is_open
            assert machine.n_read <= max(bound, 2000)  # the defaults are timed in any case
        assert found.n_tokens == machine.n_read
        assert [each.settings for each in found.tried if each.chosen][-1] == found.settings
        return found

    return run


def faster(factor: float, **change: Any) -> Seconds:
    """A millisecond per token; so many times faster where these settings hold."""

    def seconds(settings: Settings, depth: int) -> float:
        holds = all(getattr(settings, name) == value for name, value in change.items())
        return 1e-3 / (factor if holds else 1.0)

    return seconds


def test_where_nothing_matters_the_defaults_stay_and_progress_ascends(search: Search) -> None:
    told: list[tuple[float, str]] = []
    found = search(Machine(), bound=20_000, on_progress=lambda fraction, words="": told.append((fraction, words)))
    assert found.settings == DEFAULT and found.settings.to_kwargs() == {
        "unpack": (), "flash_attn": False, "repack": True, "n_batch": 512, "n_ubatch": 512,
    }  # fmt: skip
    assert {each.settings for each in found.tried} == {
        DEFAULT,
        Settings(flash_attn=True),
        Settings(repack=False),
        *(Settings(n_threads=n) for n in (PHYSICAL - 1, LOGICAL)),
        *(Settings(n_threads_batch=n) for n in (PHYSICAL - 1, PHYSICAL)),
        *(Settings(n_batch=n, n_ubatch=n) for n in (256, 1024)),
    }
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert {"flash_attn True", "n_batch 1024, n_ubatch 1024"} <= {words for _, words in told}


@pytest.mark.parametrize(
    "change", [{"n_threads_batch": PHYSICAL - 1}, *({"n_batch": n, "n_ubatch": n} for n in (1024, 256))], ids=str
)
def test_what_makes_prompts_faster_is_chosen(change: Mapping[str, Any], search: Search) -> None:
    assert search(Machine(faster(1.2, **change)), bound=20_000).settings == replace(DEFAULT, **change)


def test_the_largest_batches_are_tried_where_larger_ones_were_faster(search: Search) -> None:
    machine = Machine(prompt=lambda settings, depth: 1e-3 * (1 + 100 / settings.n_ubatch))
    found = search(machine, bound=20_000)
    assert (found.settings.n_batch, found.settings.n_ubatch) == (2048, 2048)
    assert 256 not in [each.settings.n_batch for each in found.tried]


def test_what_is_a_fifth_slower_is_timed_once(search: Search) -> None:
    def n_read(factor: float) -> int:
        machine = Machine(faster(1 / factor, n_batch=1024, n_ubatch=1024))
        return search(machine, n_answer=0, bound=20_000).n_tokens

    second = 1024 + 512  # the piece of the candidate, and that of the best settings, in a newly opened model
    assert n_read(1.15) - n_read(1.25) == second + sum(exact._WARM_UP)


def test_several_settings_add_up(search: Search) -> None:
    def prompt(settings: Settings, depth: int) -> float:
        return (1e-3 + 1e-6 * depth * (0.5 if settings.flash_attn else 1.0)) * (0.8 if settings.repack else 0.6)

    found = search(Machine(prompt=prompt, token=faster(1.3, n_threads=PHYSICAL - 1)), n_answer=10_000)
    assert found.settings == Settings(flash_attn=True, repack=False, n_threads=PHYSICAL - 1)


def test_the_prompt_weighs_what_it_weighs_in_the_request(search: Search) -> None:
    # Without repacking prompts are faster and answers slower, as on some processors with Q4_K.
    def machine() -> Machine:
        return Machine(
            prompt=faster(1.5, repack=False), token=lambda settings, depth: 1e-2 * (1.0 if settings.repack else 1.3)
        )

    assert not search(machine(), context=6000, n_answer=16).settings.repack
    assert search(machine(), context=600, n_answer=500).settings.repack


def test_settings_that_are_fast_only_at_the_start_of_a_prompt_are_not_chosen(search: Search) -> None:
    """Qwen2.5-Coder 0.5B on an EPYC: flash attention was faster after 2,048 tokens, and not after 8,192."""

    def prompt(settings: Settings, depth: int) -> float:
        return 0.8e-3 + 6e-7 * max(depth - 3000, 0) if settings.flash_attn else 1e-3

    found = search(Machine(prompt=prompt), context=8000, n_answer=0)
    assert not found.settings.flash_attn
    tried = next(each for each in found.tried if each.settings.flash_attn)
    assert tried.prompt_long_s == pytest.approx(prompt(tried.settings, 8000), rel=0.06)


@pytest.mark.parametrize(("can_fill", "n_positions"), [(True, 0), (False, 0), (True, 2048), (False, 2048)])
@pytest.mark.parametrize("context", [1200, 6000, 32000])
def test_a_requests_time_is_that_of_its_tokens(context: int, can_fill: bool, n_positions: int, search: Search) -> None:
    machine = Machine(lambda settings, depth: 1e-3 + 2e-7 * depth, lambda settings, depth: 1e-2 + 1e-6 * depth)
    machine.can_fill, machine.n_positions = can_fill, n_positions
    tried = search(machine, context, 200).tried[0]
    prompt = sum(machine.prompt(DEFAULT, depth) for depth in range(context))
    answer = sum(machine.token(DEFAULT, depth) for depth in range(context, context + 200))
    assert tried.request_s == pytest.approx(prompt + answer, rel=1e-3)
    assert tried.prompt_short_s == pytest.approx(machine.prompt(DEFAULT, 0), rel=1e-3)
    assert tried.prompt_long_s == pytest.approx(machine.prompt(DEFAULT, context), rel=1e-3)
    assert tried.token_s == pytest.approx(machine.token(DEFAULT, context), rel=1e-3)


@pytest.mark.parametrize("n_answer", [1, 5000])
def test_threads_are_chosen_by_the_phase_that_they_are_for_however_short_it_is(n_answer: int, search: Search) -> None:
    machine = Machine(faster(1.2, n_threads_batch=PHYSICAL), faster(1.2, n_threads=LOGICAL))
    found = search(machine, n_answer=n_answer).settings
    assert (found.n_threads, found.n_threads_batch) == (LOGICAL, PHYSICAL)


def test_slow_answers_under_flash_attention_are_weighed_with_the_best_threads(search: Search) -> None:
    machine = Machine(
        faster(1.5, flash_attn=True), lambda s, d: (0.03 if s.flash_attn else 0.01) / (1 + (s.n_threads == LOGICAL))
    )
    assert search(machine).settings == Settings(flash_attn=True, n_threads=LOGICAL)


@pytest.mark.parametrize(
    ("prompts", "answers", "chosen"),
    [(1.5, 0.5, "prompts"), (1.02, 0.5, False), (0.9, 0.5, False), (1.5, 0.98, True), (1.5, 1.1, True)],
)
def test_flash_attention_is_used_in_prompts_alone_where_only_these_are_faster(
    prompts: float, answers: float, chosen: bool | str, search: Search
) -> None:
    def prompt(settings: Settings, depth: int) -> float:
        return 1e-3 / (prompts if settings.flash_attn else 1.0)

    machine = Machine(prompt, lambda settings, depth: 1e-2 / (answers if settings.flash_attn is True else 1.0))
    found = search(machine, n_answer=300)
    assert found.settings.flash_attn == chosen
    first = next((each for each in found.tried if each.settings.flash_attn == "prompts"), None)
    assert (first is None) == (answers > 1)
    if first is not None:
        times = first.prompt_short_s, first.prompt_long_s, first.token_s
        assert times == pytest.approx((1e-3 / prompts, 1e-3 / prompts, 1e-2))


@pytest.mark.parametrize(("factor", "chosen"), [(1.02, False), (1.05, True)])
def test_small_differences_keep_the_default(factor: float, chosen: bool, search: Search) -> None:
    assert search(Machine(lambda settings, depth: 0.0, faster(factor, flash_attn=True))).settings.flash_attn == chosen


@pytest.mark.parametrize(
    ("first", "second", "third", "chosen"),
    [(0.9, 1.6, 0.9, True), (0.9, 1.6, 0.98, False), (0.9, 1.6, 1.1, False), (0.98, 1.02, None, False)],
)
def test_where_two_rounds_disagree_a_third_one_decides_if_it_may_save_enough(
    first: float, second: float, third: float | None, chosen: bool, search: Search
) -> None:
    """How many times as long flash attention takes, by round. Of 0.98, 1.02 and any other the median is too long."""
    machine, flash = Machine(), Settings(flash_attn=True)

    def prompt(settings: Settings, depth: int) -> float:
        if not settings.flash_attn:
            return 1e-3
        if depth >= 6000:  # the second round goes on where the first ended
            return 1e-3 * second
        return 1e-3 * (first if third is None or len(machine.opened) < 4 else third)

    machine.prompt = prompt
    assert search(machine, 6000, 0).settings.flash_attn == chosen
    # The best, the candidate for two rounds, the best again; then a third round or the next candidate.
    then = [flash, DEFAULT] if third else [DEFAULT, Settings(repack=False)]
    assert machine.opened[:5] == [DEFAULT, flash, DEFAULT, *then]


def test_a_machine_that_grows_slower_keeps_the_defaults(search: Search) -> None:
    machine = Machine()
    machine.prompt = lambda settings, depth: 1e-3 * (1 + machine.n_read / exact.MOST_TOKENS)
    machine.token = lambda settings, depth: 1e-2 * (1 + machine.n_read / exact.MOST_TOKENS)
    assert search(machine).settings == DEFAULT


@pytest.mark.parametrize("can_fill", [True, False])
@pytest.mark.parametrize("n_answer", [0, 1, 5000])
@pytest.mark.parametrize("context", [1, 2, 255, 256, 257, 511, 600, 1024, 1100, 2048, 2600, 6000, 100_000])
def test_the_bound_of_tokens_is_kept(context: int, n_answer: int, can_fill: bool, search: Search) -> None:
    # The search fixture counts. Everything that is tried is faster, so that all is tried twice.
    count: dict[Settings, float] = {}

    def seconds(settings: Settings, depth: int) -> float:
        return 1e-3 * count.setdefault(settings, 0.9 ** len(count))

    machine = Machine(seconds, seconds, can_fill=can_fill)
    assert search(machine, context, n_answer).n_tokens <= exact.MOST_TOKENS


@pytest.mark.parametrize("bound", [1000, 2000, 3000, 6000, 8000])
def test_where_tokens_run_out_what_is_left_keeps_its_default(bound: int, search: Search) -> None:
    assert search(Machine(faster(1.2, n_batch=1024)), bound=bound).settings == DEFAULT
    # Where they suffice for answer threads and flash attention once, a large difference is enough.
    for factor in (1.3, 1.06):
        found = search(Machine(faster(factor, flash_attn=True)), bound=3300)
        assert found.settings.flash_attn == (factor == 1.3)


ALL = vars(Settings(flash_attn=True, repack=False, n_threads=1, n_threads_batch=1))


@pytest.mark.parametrize("given", [{"flash_attn": True}, {"n_ubatch": 128}, {"n_threads": 3}, ALL], ids=str)
def test_what_is_given_is_not_varied(given: Mapping[str, Any], search: Search) -> None:
    found = search(Machine(), given=given)
    assert all(getattr(each.settings, name) == value for each in found.tried for name, value in given.items())
    assert found.settings == Settings(**given) and (len(found.tried) == 1) == (given == ALL)


def test_types_of_weights_are_unpacked_one_after_the_other_where_prompts_are_faster(search: Search) -> None:
    """The type with most weights comes first. Those with less than a tenth are not tried."""

    def prompt(settings: Settings, depth: int) -> float:
        return 1e-3 - 2e-4 * ("Q5_0" in settings.unpack) + 1e-4 * ("Q6_K" in settings.unpack)

    weights = {"Q8_0": 9, "Q6_K": 20, "Q4_1": 11, "Q5_0": 60}
    found = search(Machine(prompt, unpackable=weights))
    assert found.settings == Settings(unpack=("Q5_0",))
    assert [*dict.fromkeys(each.settings.unpack for each in found.tried)] == [
        (),
        ("Q5_0",),
        ("Q5_0", "Q6_K"),
        ("Q5_0", "Q4_1"),
    ]
    assert found.settings.to_kwargs()["unpack"] == ("Q5_0",)


@pytest.mark.parametrize("factor", [1.5, 0.9])
def test_q5_0_is_repacked_where_requests_are_faster(factor: float, search: Search) -> None:
    found = search(Machine(faster(factor, repack="all"), repackable=7))
    assert found.settings.repack == ("all" if factor > 1 else True)
    assert [each.settings.repack for each in found.tried].count("all") >= 1
    assert all(each.settings.repack != "all" for each in search(Machine()).tried)


def test_what_cannot_matter_is_not_tried(search: Search) -> None:
    """Batches that no prompt fills, threads for no answer, and repacking weights that are not quantized."""
    assert {each.settings.n_batch for each in search(Machine(), context=500).tried} == {512, 256}
    assert {each.settings.n_batch for each in search(Machine(), context=200).tried} == {512}
    assert {each.settings.n_threads for each in search(Machine(), n_answer=0).tried} == {None}
    for file_type in ("0", "1", "32"):
        assert all(each.settings.repack for each in search(Machine(file_type=file_type)).tried)


@pytest.mark.parametrize("depth", [0, 1, 100, 2100, 5900, 6100])
@pytest.mark.parametrize("error", [ModelFileError("no room"), NativeError("no room"), RuntimeError("decode returned 1"),
                                   ValueError("Failed to create llama_context"), MemoryError()], ids=repr)  # fmt: skip
def test_a_candidate_that_fails_is_not_chosen(depth: int, error: Exception, search: Search) -> None:
    def fails(settings: Settings, at: int) -> None:
        if settings.flash_attn and at == depth:
            raise error

    found = search(Machine(faster(1.2, flash_attn=True), fails=fails))
    assert found.settings == DEFAULT
    failed = next(each for each in found.tried if each.settings.flash_attn)
    assert not failed.chosen and failed.request_s == failed.token_s == failed.prompt_long_s == float("inf")


@pytest.mark.parametrize(
    ("error", "where"), [(ModelFileError("no such model"), (False, 0)), (KeyboardInterrupt(), (True, 100))], ids=repr
)
def test_failures_of_the_defaults_and_ctrl_c_reach_the_caller(error: BaseException, where: Any, search: Search) -> None:
    def fails(settings: Settings, at: int) -> None:
        if (settings.flash_attn, at) == where:
            raise error

    with pytest.raises(type(error)):
        search(Machine(fails=fails))


def test_an_impossible_request_is_refused(search: Search) -> None:
    for wrong in ({"context": 0}, {"n_answer": -1}):
        with pytest.raises(RequestError):
            search(Machine(), **wrong)
