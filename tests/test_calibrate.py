"""adaskip_cpp.calibrate, the corpus, and the loss of a text."""

import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_llama import BOS, FakeLlama

import adaskip_cpp
from adaskip_cpp import SkipPlan, calibrate, corpus
from adaskip_cpp.errors import NativeError, RequestError
from adaskip_cpp.loss import mean_loss, token_losses

PLAN = SkipPlan.manual(3, ffn=[1])


@pytest.fixture
def llm() -> Any:
    return FakeLlama()


# --- calibration ------------------------------------------------------------------------------------------------------


def test_figures_are_the_mean_over_requests_of_each_requests_figures(llm: Any) -> None:
    requests = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]
    profile = calibrate(llm, requests)
    expected: list[list[np.ndarray]] = [[], [], []]
    for tokens in requests:
        u, v = llm.streams(tokens)
        norm_u, norm_v = np.linalg.norm(u, axis=3), np.linalg.norm(v, axis=3)
        expected[0].append(((u * v).sum(axis=3) / (norm_u * norm_v)).mean(axis=2))
        expected[1].append(np.sqrt((v**2).sum(axis=(2, 3)) / (u**2).sum(axis=(2, 3))))
        expected[2].append(np.median(norm_v / norm_u, axis=2))
    for array, per_request in zip(
        (profile.similarity, profile.norm_ratio, profile.median_ratio), expected, strict=True
    ):
        np.testing.assert_allclose(array, np.mean(per_request, axis=0), rtol=1e-5)


def test_a_profile_says_what_it_was_learned_from(llm: Any) -> None:
    profile = calibrate(llm, [[5, 6, 7], "hello"], description="two short ones")
    assert (profile.n_requests, profile.n_tokens, profile.model) == (2, 3 + 6, llm.model_info)
    assert profile.corpus == "two short ones"
    assert profile.package_version == adaskip_cpp.__version__
    assert profile.created.endswith("+00:00")
    assert "caller" in calibrate(llm, ["hello"]).corpus


def test_without_requests_it_reads_pages_of_the_language_reference(llm: Any) -> None:
    profile = calibrate(llm, n_requests=3, n_tokens=40)
    assert (profile.n_requests, profile.n_tokens) == (3, 120)
    assert "pydoc_data.topics" in profile.corpus


def test_a_sublayer_that_is_never_observed_is_not_skippable() -> None:
    profile = calibrate(FakeLlama(unobserved=[(1, 0)]), ["hello", "world"])  # type: ignore[arg-type]
    assert np.argwhere(~profile.skippable).tolist() == [[1, 0]]


def test_each_request_runs_alone_through_the_full_model(llm: Any) -> None:
    llm.set_plan(PLAN)
    llm.eval([9, 9, 9])
    llm.evaluated.clear()
    calibrate(llm, ["ab", [5, 6]])
    assert llm.evaluated == [(None, [BOS, ord("a") + 2, ord("b") + 2]), (None, [5, 6])]
    assert llm.plan is PLAN
    assert llm.n_tokens == 0 and not llm.collecting


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
def test_an_interruption_leaves_the_model_as_it_was(llm: Any, error: BaseException) -> None:
    llm.set_plan(PLAN)
    llm.fail_after = (1, error)
    with pytest.raises(type(error)):
        calibrate(llm, ["hello", "world", "again"], progress=True)
    assert llm.plan is PLAN
    assert llm.n_tokens == 0 and not llm.collecting
    llm.fail_after = None
    assert calibrate(llm, ["hello"]).n_requests == 1


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "no requests"),
        ("one text", "not several"),
        (["good", ""], "request 1 is empty"),
        (["good", []], "request 1 is empty"),
        (["good", [5] * 65], r"request 1 has 65 tokens, the model's context 64"),
        (["good", "x" * 64], r"request 1 has 65 tokens"),
        (["good", [5, 300]], r"request 1 has the token id 300.*0 to 299"),
        (["good", [-1]], r"request 1 has the token id -1"),
        (["good", [0.5]], "request 1 is neither"),
        (["good", 7], "request 1 is neither"),
        (["good", None], "request 1 is neither"),
    ],
)
def test_all_requests_are_checked_before_the_first_one_runs(llm: Any, requests: Any, message: str) -> None:
    llm.set_plan(PLAN)
    with pytest.raises(RequestError, match=message):
        calibrate(llm, requests)
    assert llm.evaluated == []
    assert llm.plan is PLAN


def test_requests_may_come_from_a_generator_and_fill_the_context(llm: Any) -> None:
    def requests() -> Iterator[Any]:
        yield "a"
        yield np.full(64, 5)

    assert calibrate(llm, requests()).n_tokens == 66


def test_statistics_that_miss_tokens_are_noticed(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "eval", lambda tokens: FakeLlama.eval(llm, tokens[1:]))
    with pytest.raises(NativeError, match="2 of a request's 3 tokens"):
        calibrate(llm, [[5, 6, 7]])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("progress", "terminal", "slow", "shown"),
    [(None, True, True, True), (None, True, False, False), (None, False, True, False), (True, False, False, True),
     (False, True, True, False)],
)  # fmt: skip
def test_progress_is_shown_on_a_terminal_if_it_takes_long(
    llm: Any, monkeypatch: pytest.MonkeyPatch, progress: bool | None, terminal: bool, slow: bool, shown: bool
) -> None:
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys.modules[calibrate.__module__], "_SHOW_AFTER_S", -1.0 if slow else 1e9)
    calibrate(llm, ["hello", "world"], progress=progress)
    assert ("Calibrating" in stderr.getvalue()) is shown


# --- the corpus -------------------------------------------------------------------------------------------------------


def test_no_paragraph_is_on_two_pages() -> None:
    paragraphs = [paragraph for page in corpus.pages().values() for paragraph in page.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_an_excluded_page_is_not_in_the_text() -> None:
    page = corpus.pages()["debugger"]
    assert page in corpus.text()
    assert page not in corpus.text(exclude=["debugger"])


def test_a_text_is_cut_into_requests_of_equal_length_spread_over_it(llm: Any) -> None:
    text = "".join(chr(33 + i) for i in range(90))
    requests = corpus.cut(llm, text, 3, 11)
    assert [request[0] for request in requests] == [BOS] * 3
    assert [[chr(token - 2) for token in request[1:]] for request in requests] == [
        list(text[start : start + 10]) for start in (0, 30, 60)
    ]


def test_a_short_text_gives_fewer_or_shorter_requests(llm: Any) -> None:
    assert [len(request) for request in corpus.cut(llm, "x" * 25, 9, 11)] == [11, 11]
    assert [len(request) for request in corpus.cut(llm, "x" * 5, 9, 11)] == [6]
    with pytest.raises(RequestError, match="empty"):
        corpus.cut(llm, "", 9, 11)
    with pytest.raises(RequestError, match="at least 1 request"):
        corpus.cut(llm, "x", 0, 11)


# --- loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_negative_log_likelihood(llm: Any) -> None:
    tokens = [1, *np.random.default_rng(0).integers(2, 300, 63).tolist()]
    logits = np.array([np.random.default_rng(token).normal(size=300).astype(np.float32) for token in tokens], float)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = [-np.log(probabilities[i, tokens[i + 1]]) for i in range(len(tokens) - 1)]
    np.testing.assert_allclose(token_losses(llm, tokens), expected, rtol=1e-12)
    assert mean_loss(llm, tokens) == pytest.approx(np.mean(expected), rel=1e-12)
    assert llm.n_tokens == 0


def test_a_loss_that_cannot_be_computed_is_refused(llm: Any) -> None:
    for tokens in ([], [1], [1] * 65):
        with pytest.raises(RequestError, match="2 to 64"):
            token_losses(llm, tokens)
    llm._logits_all = False
    with pytest.raises(RequestError, match="logits_all=True"):
        token_losses(llm, [1, 2])
