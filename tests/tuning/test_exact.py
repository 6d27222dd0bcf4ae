"""adaskip_cpp.tuning.exact: the search for settings, on invented times whose best answer is known.

A request's time is, by definition, the sum of the times of its tokens, each at its depth.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.errors import ModelFileError, NativeError, RequestError
from adaskip_cpp.model.settings import Settings
from adaskip_cpp.model.skip_set import KINDS
from adaskip_cpp.tuning import exact
from adaskip_cpp.tuning.exact import FoundSettings, fastest_settings

DEFAULT = Settings()
PHYSICAL, LOGICAL = 4, 8
LEAST_TOKENS = 2000
"""The defaults are timed in any case."""
Seconds = Callable[[Settings, int], float]


def constant(seconds: float) -> Seconds:
    return lambda settings, depth: seconds


@dataclass
class Machine:
    """How long each token takes, by the settings and the number of tokens before it.

    Attributes:
        prompt, token: seconds per token of a prompt, of an answer.
        fails: raises what a model with these settings fails with, when it is opened (0) or so many tokens deep.
        file_type: ``general.file_type`` of the model.
        can_fill: whether the bulk can skip every sublayer of the model.
        n_positions: tokens that the model has learned positions for, 0 for any number.
        events: the settings of every model that was opened.
    """

    prompt: Seconds = lambda settings, depth: 1e-3
    token: Seconds = lambda settings, depth: 1e-2
    fails: Callable[[Settings, int], None] = lambda settings, depth: None
    file_type: str = "2"
    can_fill: bool = True
    n_positions: int = 0
    now: float = 0.0
    n_open: int = 0
    n_tokens: int = 0
    opened: list[Settings] = field(default_factory=list)

    def open(self, settings: Settings, n_ctx: int) -> Any:
        assert self.n_open == 0, "one model fits into memory"
        self.fails(settings, 0)
        self.opened.append(settings)
        self.n_open += 1
        return Model(self, settings, n_ctx)


class Model:
    def __init__(self, machine: Machine, settings: Settings, n_ctx: int) -> None:
        self._machine, self._settings = machine, settings
        self._pending = 0.0
        self.plan: SkipPlan | None = None
        self.n_tokens, self.n_layer, self.context_size = 0, 1, min(n_ctx, machine.n_positions or n_ctx)
        self.sublayers = [SimpleNamespace(layer=0, kind=kind, in_bulk=machine.can_fill) for kind in KINDS]
        self.metadata = {"general.file_type": machine.file_type}
        self.context_params = SimpleNamespace(
            n_threads=settings.n_threads or PHYSICAL, n_threads_batch=settings.n_threads_batch or LOGICAL
        )

    def n_vocab(self) -> int:
        return 100

    def reset(self) -> None:
        self.n_tokens = 0

    def set_plan(self, plan: SkipPlan | None, readable: tuple[SkipPlan, ...] = ()) -> None:
        """Only a plan whose bulk skips everything is set. The whole model may read what it wrote."""
        assert self._machine.can_fill
        assert plan.skipped("bulk").skip.all() if plan else readable == (self.plan,)
        self.plan = plan

    def eval_bulk(self, tokens: list[int]) -> None:
        self._eval(tokens, self._machine.prompt)

    def eval_decode(self, tokens: list[int]) -> None:
        assert len(tokens) == 1
        self._eval(tokens, self._machine.token)

    def _eval(self, tokens: list[int], seconds: Seconds) -> None:
        assert tokens and all(0 <= token < 100 for token in tokens)
        self._machine.n_tokens += 0 if self.plan else len(tokens)
        assert self.n_tokens + len(tokens) <= self.context_size
        for _ in tokens:
            self._machine.fails(self._settings, self.n_tokens)
            self._pending += 0.0 if self.plan else seconds(self._settings, self.n_tokens)
            self.n_tokens += 1

    def synchronize(self) -> None:  # a GPU computes until then
        self._machine.now += self._pending
        self._pending = 0.0

    def close(self) -> None:
        self._machine.n_open -= 1


Search = Callable[..., FoundSettings]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Search:
    """``search(machine, context, n_answer, **more)``; whatever happens, all is counted and no model stays open."""
    monkeypatch.setattr(exact, "physical_cores", lambda: PHYSICAL)
    monkeypatch.setattr(exact, "logical_cores", lambda: LOGICAL)

    def run(machine: Machine, context: int = 6000, n_answer: int = 128, **more: Any) -> FoundSettings:
        monkeypatch.setattr(exact, "perf_counter", lambda: machine.now)
        try:
            found = fastest_settings(machine.open, context=context, n_answer=n_answer, **more)
        finally:
            assert machine.n_open == 0
            assert machine.n_tokens <= max(exact.MOST_TOKENS, LEAST_TOKENS)
        assert found.n_tokens == machine.n_tokens
        assert [each.settings for each in found.tried if each.chosen][-1] == found.settings
        return found

    return run


@pytest.fixture
def enough_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as it takes to try every setting in two rounds, on this machine of many threads."""
    monkeypatch.setattr(exact, "MOST_TOKENS", 20_000)


def faster(factor: float, *, growth: float = 0.0, **change: Any) -> Seconds:
    """A millisecond per token, and ``growth`` per token of depth; so many times faster where these settings hold."""

    def seconds(settings: Settings, depth: int) -> float:
        holds = all(getattr(settings, name) == value for name, value in change.items())
        return (1e-3 + growth * depth) / (factor if holds else 1.0)

    return seconds


# -- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("enough_tokens")
def test_where_nothing_matters_the_defaults_stay(search: Search) -> None:
    found = search(Machine())
    assert found.settings == DEFAULT and found.settings.to_kwargs() == {
        "flash_attn": False, "repack": True, "n_batch": 512, "n_ubatch": 512,
    }  # fmt: skip
    tried = {each.settings for each in found.tried}
    assert tried == {
        DEFAULT,
        Settings(flash_attn=True),
        Settings(repack=False),
        Settings(n_threads=PHYSICAL - 1),
        Settings(n_threads=LOGICAL),
        Settings(n_threads_batch=PHYSICAL),
        Settings(n_threads_batch=PHYSICAL - 1),
        Settings(n_batch=1024, n_ubatch=1024),
        Settings(n_batch=256, n_ubatch=256),
    }


@pytest.mark.parametrize(
    ("phase", "change"),
    [
        ("prompt", {"flash_attn": True}),
        ("prompt", {"repack": False}),
        ("prompt", {"n_threads_batch": PHYSICAL}),
        ("prompt", {"n_threads_batch": PHYSICAL - 1}),
        ("prompt", {"n_batch": 1024, "n_ubatch": 1024}),
        ("prompt", {"n_batch": 256, "n_ubatch": 256}),
        ("token", {"flash_attn": True}),
        ("token", {"repack": False}),
        ("token", {"n_threads": LOGICAL}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("enough_tokens")
def test_what_makes_prompts_or_answers_faster_is_chosen(phase: str, change: Mapping[str, Any], search: Search) -> None:
    found = search(Machine(**{"prompt": constant(1e-5), phase: faster(1.2, **change)}))
    assert found.settings == replace(DEFAULT, **change)


@pytest.mark.usefixtures("enough_tokens")
def test_the_largest_batches_are_tried_where_larger_ones_were_faster(search: Search) -> None:
    found = search(Machine(prompt=lambda settings, depth: 1e-3 * (1 + 100 / settings.n_ubatch)))
    assert (found.settings.n_batch, found.settings.n_ubatch) == (2048, 2048)
    assert 256 not in [each.settings.n_batch for each in found.tried]


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


def test_flash_attention_is_judged_at_the_depth_of_the_request(search: Search) -> None:
    def prompt(settings: Settings, depth: int) -> float:
        return 1.1e-3 + 1e-7 * depth if settings.flash_attn else 1e-3 + 3e-7 * depth

    assert not search(Machine(prompt=prompt), context=600, n_answer=0).settings.flash_attn
    assert search(Machine(prompt=prompt), context=6000, n_answer=0).settings.flash_attn


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


@pytest.mark.parametrize("change", [{"n_threads": LOGICAL}, {"n_threads_batch": PHYSICAL}], ids=str)
@pytest.mark.parametrize("n_answer", [1, 5000])
def test_threads_are_chosen_by_the_phase_that_they_are_for_however_short_it_is(
    change: Mapping[str, Any], n_answer: int, search: Search
) -> None:
    machine = Machine(faster(1.2, n_threads_batch=PHYSICAL), faster(1.2, n_threads=LOGICAL))
    found = search(machine, n_answer=n_answer)
    assert all(getattr(found.settings, name) == value for name, value in change.items())


# -- ties ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "chosen"), [(1.02, False), (1.05, True)])
def test_small_differences_keep_the_default(factor: float, chosen: bool, search: Search) -> None:
    found = search(Machine(constant(0.0), faster(factor, flash_attn=True)))
    assert found.settings.flash_attn == chosen


@pytest.mark.parametrize(("third", "chosen"), [(0.9, True), (0.98, False), (1.1, False)])
def test_where_two_rounds_disagree_a_third_one_decides(third: float, chosen: bool, search: Search) -> None:
    """Flash attention takes 0.9 of the time, is disturbed in the second round, and then takes ``third``."""
    machine = Machine()

    def prompt(settings: Settings, depth: int) -> float:
        if not settings.flash_attn:
            return 1e-3
        if depth >= 6000:  # the second round goes on where the first ended
            return 1.6e-3
        return 1e-3 * (0.9 if len(machine.opened) < 4 else third)  # best, candidate; the best again, and the candidate

    machine.prompt = prompt
    assert search(machine, 6000, 0).settings.flash_attn == chosen
    assert machine.opened[:5] == [DEFAULT, Settings(flash_attn=True), DEFAULT, Settings(flash_attn=True), DEFAULT]


def test_where_two_rounds_disagree_and_neither_saves_enough_there_is_no_third_one(search: Search) -> None:
    """Of 0.98, 1.02 and any third value, the median saves less than 3%."""
    machine = Machine()
    machine.prompt = lambda settings, depth: 1e-3 * (1 if not settings.flash_attn else 1.02 if depth >= 6000 else 0.98)
    assert not search(machine, 6000, 0).settings.flash_attn
    assert machine.opened[:4] == [DEFAULT, Settings(flash_attn=True), DEFAULT, DEFAULT]


def test_a_machine_that_grows_slower_keeps_the_defaults(search: Search) -> None:
    machine = Machine()
    machine.prompt = lambda settings, depth: 1e-3 * (1 + machine.n_tokens / exact.MOST_TOKENS)
    machine.token = lambda settings, depth: 1e-2 * (1 + machine.n_tokens / exact.MOST_TOKENS)
    assert search(machine).settings == DEFAULT


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("can_fill", [True, False])
@pytest.mark.parametrize("n_answer", [0, 1, 5000])
@pytest.mark.parametrize("context", [1, 2, 255, 256, 257, 511, 600, 1024, 1100, 2048, 2600, 6000, 100_000])
def test_no_request_takes_more_tokens_than_the_bound(
    context: int, n_answer: int, can_fill: bool, search: Search
) -> None:
    # The search fixture counts. Everything that is tried is faster, so that all is tried twice.
    count: dict[Settings, float] = {}

    def seconds(settings: Settings, depth: int) -> float:
        return 1e-3 * count.setdefault(settings, 0.9 ** len(count))

    machine = Machine(seconds, seconds, can_fill=can_fill)
    assert search(machine, context, n_answer).n_tokens <= exact.MOST_TOKENS


@pytest.mark.parametrize("bound", [1000, 2000, 3000, 6000, 8000])
def test_where_tokens_run_out_what_is_left_keeps_its_default(
    bound: int, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "MOST_TOKENS", bound)
    machine = Machine(faster(1.2, n_batch=1024))
    found = search(machine)
    first = found.tried[0].settings
    assert found.settings == first == DEFAULT


def test_one_round_is_enough_for_a_large_difference_where_tokens_are_short(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "MOST_TOKENS", 2600)  # the defaults and flash attention once
    assert search(Machine(faster(1.3, flash_attn=True))).settings.flash_attn
    assert not search(Machine(faster(1.06, flash_attn=True))).settings.flash_attn


def test_what_is_clearly_slower_gets_no_second_round(search: Search) -> None:
    machine = Machine(faster(1.6, flash_attn=False), faster(1.6, flash_attn=False))
    search(machine)
    assert machine.opened[:3] == [DEFAULT, Settings(flash_attn=True), DEFAULT]
    assert machine.opened[3] == Settings(repack=False), "the turn before was its own, not flash attention's second"
    other = Machine()
    search(other)
    assert other.opened[:5] == [DEFAULT, Settings(flash_attn=True), DEFAULT, DEFAULT, Settings(repack=False)]


# -- what is not tried -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"flash_attn": True},
        {"repack": False},
        {"n_batch": 64},
        {"n_ubatch": 128},
        {"n_threads": 3},
        {"n_threads_batch": 2},
        {"flash_attn": False, "repack": True, "n_batch": 512, "n_ubatch": 512, "n_threads": 1, "n_threads_batch": 1},
    ],
    ids=str,
)
def test_what_is_given_is_not_varied(given: Mapping[str, Any], search: Search) -> None:
    found = search(Machine(), given=given)
    assert all(getattr(each.settings, name) == value for each in found.tried for name, value in given.items())
    assert found.settings == Settings(**given)
    if len(given) == 6:
        assert len(found.tried) == 1


@pytest.mark.parametrize("file_type", ["0", "1", "32"])
def test_a_model_without_quantized_weights_is_not_repacked(file_type: str, search: Search) -> None:
    assert all(each.settings.repack for each in search(Machine(file_type=file_type)).tried)


def test_batches_that_no_prompt_fills_are_not_tried(search: Search) -> None:
    assert {each.settings.n_batch for each in search(Machine(), context=500).tried} == {512, 256}
    assert {each.settings.n_batch for each in search(Machine(), context=200).tried} == {512}


def test_without_an_answer_its_threads_are_not_tried(search: Search) -> None:
    assert {each.settings.n_threads for each in search(Machine(), n_answer=0).tried} == {None}


# -- failures --------------------------------------------------------------------------------------------------------


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
def test_what_the_defaults_fail_with_and_ctrl_c_reach_the_caller_and_the_model_is_closed(
    error: BaseException, where: tuple[bool, int], search: Search
) -> None:
    def fails(settings: Settings, at: int) -> None:
        if (settings.flash_attn, at) == where:
            raise error

    with pytest.raises(type(error)):
        search(Machine(fails=fails))


@pytest.mark.parametrize("wrong", [{"context": 0}, {"context": -5}, {"n_answer": -1}], ids=str)
def test_an_impossible_request_is_refused(wrong: Mapping[str, Any], search: Search) -> None:
    with pytest.raises(RequestError):
        search(Machine(), **wrong)


# -- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "jamba"])
def test_a_real_model_reads_what_is_counted(
    family: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # jamba's layers keep a state, which cannot be rewound.
    monkeypatch.setattr(exact, "physical_cores", lambda: 1)
    monkeypatch.setattr(exact, "logical_cores", lambda: 1)
    seen: list[int] = []

    class Counting(AdaSkipLlama):
        def _evaluate(self, phase: Any, tokens: list[int], **more: Any) -> None:
            seen.append(0 if phase == "bulk" else len(tokens))  # the whole model has no bulk
            super()._evaluate(phase, tokens, **more)

    def open_model(settings: Settings, n_ctx: int) -> AdaSkipLlama:
        return Counting(str(tiny(family)), n_ctx=n_ctx, verbose=False, **settings.to_kwargs())

    found = fastest_settings(open_model, context=1100, n_answer=8, given={"n_threads": 1, "n_threads_batch": 1})
    assert sum(seen) == found.n_tokens <= exact.MOST_TOKENS
    assert [each.settings for each in found.tried if each.chosen][-1] == found.settings
    assert all(each.request_s > 0 for each in found.tried)


# -- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("enough_tokens")
def test_progress_ascends_to_1_and_nothing_is_printed(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[float, str]] = []
    search(Machine(), on_progress=lambda fraction, words="": told.append((fraction, words)))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert {"flash_attn True", "n_batch 1024, n_ubatch 1024"} <= {words for _, words in told}
    assert capsys.readouterr() == ("", "")
