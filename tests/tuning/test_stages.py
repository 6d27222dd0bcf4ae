"""adaskip_cpp.tuning: hold_out, figures, memo and speed, each by itself and by hand."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from oracles.profiles import EXAMPLE

from adaskip_cpp.errors import DataError
from adaskip_cpp.intervals import mean_interval
from adaskip_cpp.measuring.judge import Scores
from adaskip_cpp.measuring.probes import Probe
from adaskip_cpp.measuring.tasks import READMES, TextItem
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.plan import SkipPlan
from adaskip_cpp.model.quality import Passkeys
from adaskip_cpp.model.settings import Settings, Tried
from adaskip_cpp.tuning import hold_out as module
from adaskip_cpp.tuning import speed
from adaskip_cpp.tuning.exact import FoundSettings
from adaskip_cpp.tuning.figures import judged_plan, passkeys_of, quality_of
from adaskip_cpp.tuning.hold_out import hold_out, unseen_texts
from adaskip_cpp.tuning.memo import Memo
from adaskip_cpp.tuning.speed import measure_speed


class Bytes:
    """A byte is a token; BOS is 256."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [256] * add_bos + list(text)


def letters(part: Sequence[TextItem]) -> set[str]:
    return {chr(token) for item in part for token in item.tokens[1:]}


def test_descriptions_come_first_and_a_kind_that_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = unseen_texts()
    assert [*kinds[0]] == [*READMES] and [*kinds[2]] == ["numpy", "Python"] and len(kinds) == 3
    monkeypatch.setattr(module, "licences", dict)
    assert unseen_texts() == kinds[:2]
    monkeypatch.setattr(module, "python_sources", Mock(side_effect=DataError("this Python has no sources")))
    assert unseen_texts() == kinds[:1]


def test_texts_are_dealt_to_two_parts_and_few_texts_or_kinds_too_small_for_their_share_are_cut_in_two() -> None:
    held_out = hold_out(Bytes(), [{name: name * 300 for name in "abcdefg"}], (4, 4), 50)  # type: ignore[arg-type]
    assert (len(held_out.search), len(held_out.judge)) == (4, 4)
    assert not letters(held_out.search) & letters(held_out.judge)
    names = held_out.names()
    assert set(names["searched_on"].split(", ")) == letters(held_out.search)
    assert set(names["judged_on"].split(", ")) == letters(held_out.judge)
    held_out = hold_out(Bytes(), [{"a": "x" * 300 + "y" * 300}], (3, 3), 50)  # type: ignore[arg-type]
    assert (letters(held_out.search), letters(held_out.judge)) == ({"x"}, {"y"})
    assert held_out.names() == {"searched_on": "a (part 1 of 2)", "judged_on": "a (part 2 of 2)"}
    held_out = hold_out(Bytes(), [{"a": "x" * 9}, {"b": "y" * 900}], (5, 5), 50)  # type: ignore[arg-type]
    assert letters(held_out.search) == letters(held_out.judge) == {"y"} and len(held_out.judge) == 5


@pytest.mark.parametrize(("kinds", "n", "found"), [("xy", (5, 5), ["xxxyy"] * 2), ("xyz", (2, 4), ["xy", "xxyz"])])
def test_either_part_has_as_much_of_every_kind_of_text(kinds: str, n: tuple[int, int], found: list[str]) -> None:
    held_out = hold_out(Bytes(), [{each: each * 900} for each in kinds], n, 50)  # type: ignore[arg-type]
    assert ["".join(chr(item.tokens[1]) for item in part) for part in (held_out.search, held_out.judge)] == found


def probe(text: str, kind: Any = "continuation") -> Probe:
    return Probe(text, kind, (1, 2, 3), 3, (4, 5))


def scores(divergence: Any, loss: Any = None, right: Any = None, whole_margin: Any = None) -> Scores:
    given = np.array(divergence, float)
    lost, margin = (given if each is None else np.array(each, float) for each in (loss, whole_margin))
    return Scores(given, lost, given < 1, given < 1 if right is None else np.array(right), margin)


def test_texts_count_alike_however_many_tokens_they_have() -> None:
    """Means over the tokens of all probes of a text, 0.2 and 0.6, then over both texts."""
    probes = [probe("a"), probe("a"), probe("b"), probe("b", "copying")]
    found = quality_of(probes, [scores([0.0, 0.1]), scores([0.5]), scores([0.6]), scores([9.0] * 9)], "continuation")
    assert found.divergence.value == pytest.approx(0.4) and found.divergence.n == found.n_texts == 2
    assert found.error == pytest.approx(0.2), "half of their difference"
    assert found.n_tokens == 4 and found.agreement.value == 1.0
    assert found.tails[1] == pytest.approx(0.6, abs=1e-3)
    assert quality_of(probes, [scores([0.0])] * 3 + [scores([9.0, 0.0])], "copying").agreement.value == 0.5


def test_an_added_loss_counts_where_it_is_above_the_divergence_beyond_chance() -> None:
    texts = [probe(name) for name in "abcd"]
    diverged = np.array([0.1, 0.2, 0.3, 0.4])
    lost = np.add(diverged, [0.5, 0.6, 0.5, 0.6])
    found = quality_of(texts, [scores([d], [x]) for d, x in zip(diverged, lost, strict=True)], "continuation")
    assert found.excess == mean_interval(lost - diverged).low and 0.4 < found.excess < 0.55
    assert found.harm == pytest.approx(0.25 + found.excess)
    by_chance = np.add(diverged, [0.9, -0.5, 0.5, -0.6])
    found = quality_of(texts, [scores([d], [x]) for d, x in zip(diverged, by_chance, strict=True)], "continuation")
    assert found.excess == 0.0 and found.harm == found.divergence.value
    alone = quality_of(texts[:1], [scores([0.1, 0.3], [5.0, 5.0])], "continuation")
    assert alone.divergence.value == pytest.approx(0.2) and np.isnan(alone.error) and alone.excess == 0.0


def test_a_pass_key_is_lost_where_a_token_of_it_is_wrong_that_the_whole_model_was_sure_of() -> None:
    """Sure is ten times as likely as any other token, for each token of the key."""
    sure, unsure, right, wrong = [2.31, 5.0], [5.0, 2.3], [True, True], [True, False]
    asked = [(sure, right), (sure, wrong), (unsure, right), (unsure, wrong), (sure, right)]
    probes = [probe("a"), *[probe("a", "retrieval")] * len(asked)]
    every = [scores([9.0]), *(scores([0.0, 0.0], right=hit, whole_margin=margin) for margin, hit in asked)]
    assert passkeys_of(probes, every) == Passkeys(5, 3, 2)
    assert passkeys_of(probes[:1], every[:1]) == Passkeys(0, 0, 0)


def test_a_plan_is_judged_until_it_loses_a_pass_key() -> None:
    """A key that the whole model is not sure of is no reason to stop."""
    right, wrong = [True], [False]
    asked = [([0.1], wrong), ([5.0], right), ([5.0], wrong), ([5.0], right)]
    kinds = "continuation", "copying", *["retrieval"] * len(asked)
    every = [scores([0.1])] * 2 + [scores([0.0], right=hit, whole_margin=margin) for margin, hit in asked]

    def judge(n_kept: int) -> tuple[Any, list[int]]:
        taken = list[int]()
        judge = SimpleNamespace(
            probes=[probe("a", kind) for kind in kinds[:n_kept]],
            each=lambda plan: (taken.append(i) or each for i, each in enumerate(every[:n_kept])),
            n_evaluated=0,
            read_whole=lambda: None,
        )
        return judged_plan(judge, SkipPlan.manual(4, ffn=(3,))), taken  # type: ignore[arg-type]

    assert judge(6) == ((None, 0), [0, 1, 2, 3, 4])
    (found, _), taken = judge(4)
    _, copying, retrieval = found.kinds
    assert found.passkeys == Passkeys(2, 1, 1) and copying.n_tokens == 1 and taken == [0, 1, 2, 3]
    assert retrieval.n_tokens == 2 and retrieval.divergence.value == 0.0


def get(memo: Memo, value: float, name: str = "lost") -> float:
    """The value that the memo has, else this one."""
    return memo.get(name, float, lambda: value)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "unfinished.json")


def test_what_was_found_is_kept_as_it_is_and_not_made_again(path: str) -> None:
    tried = Tried(Settings(flash_attn=True), *[math.inf] * 4, False), Tried(Settings(), 1e-3, 2e-12, 0.1, 9.5, True)
    made = [FoundSettings(Settings(n_threads=2), tried, 900)]
    found = [Memo(path, "key").get("settings", FoundSettings, made.pop) for _ in range(2)]
    assert found == [FoundSettings(Settings(n_threads=2), tried, 900)] * 2


BROKEN = [b"", b"{", b"[]", b'"key"', b"\xff\xfe", b'{"lost": 1.0}']
OF_ANOTHER_RUN = [b'{"key": ["key"]}', b'{"key": "other", "lost": 1}']
OF_ANOTHER_TYPE = [b'{"key": "key", "lost": ' + value + b"}" for value in (b"true", b'"much"', b"[1.0]", b'{"a": 1.0}')]


@pytest.mark.parametrize("content", BROKEN + OF_ANOTHER_RUN + OF_ANOTHER_TYPE)
def test_what_is_broken_or_of_another_run_or_type_is_written_over(content: bytes, path: str) -> None:
    Path(path).write_bytes(content)
    assert (get(Memo(path, "key"), 2.0), get(Memo(path, "key"), 3.0), get(Memo(path, "other"), 4.0)) == (2, 2, 4)


def test_an_interrupted_value_is_not_kept(path: str) -> None:
    memo = Memo(path, "key")
    get(memo, 1.0)
    with pytest.raises(KeyboardInterrupt):
        memo.get("second", float, Mock(side_effect=KeyboardInterrupt))
    again = Memo(path, "key")
    assert (get(again, 3.0), get(again, 2.0, "second")) == (1.0, 2.0)


def test_a_profile_is_kept_and_one_of_another_key_or_model_or_a_broken_one_is_none(path: str) -> None:
    assert Memo(path, "key").profile(EXAMPLE.model) is None
    Memo(path, "key").keep_profile(EXAMPLE)
    assert Memo(path, "key").profile(EXAMPLE.model) == EXAMPLE
    assert Memo(path, "other").profile(EXAMPLE.model) is None
    assert Memo(path, "key").profile(replace(EXAMPLE.model, fingerprint="cd" * 32)) is None
    next(each for each in Path(path).parent.iterdir() if "profile" in each.name).write_text("{")
    assert Memo(path, "key").profile(EXAMPLE.model) is None


def test_remove_leaves_no_file_and_without_a_path_values_are_kept_for_this_run_alone(path: str) -> None:
    for memo, profile in ((Memo(path, "key"), EXAMPLE), (Memo(), None)):
        memo.remove()  # there is none
        memo.keep_profile(EXAMPLE)
        assert (get(memo, 1.0), get(memo, 2.0)) == (1.0, 1.0)
        assert memo.profile(EXAMPLE.model) == profile
        memo.remove()
        assert [*Path(path).parent.iterdir()] == []
    assert get(Memo(), 2.0) == 2.0


def test_stock_settings_and_plan_are_timed_in_turn_and_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, asked = list[tuple[str, str, dict[str, Any]]](), list[tuple[str, int]]()

    class InventedWorker(contextlib.AbstractContextManager["InventedWorker"]):
        """Stands in for a process: stock takes 6 s for a prompt, ours 3, and 2 with a plan."""

        def __init__(self, name: str, side: str) -> None:
            self.name, self.side = name, side

        def __exit__(self, *exception: object) -> None: ...

        def open(self, path: str, options: dict[str, Any]) -> None:
            opened.append((self.name, self.side, options))

        def time(self, prompt: Sequence[int], n_decode: int) -> RequestTime:
            asked.append((self.name, len(prompt)))
            return RequestTime({"stock": 6.0, "settings": 3.0, "plan": 2.0}[self.name], ())

    monkeypatch.setattr(speed, "Worker", InventedWorker)
    plan, found = SkipPlan.manual(3, ffn=[1], phase="bulk"), Settings(flash_attn=True, n_threads=2)
    speeds = measure_speed("m.gguf", found, plan, [1] * 70, n_rounds=2, kwargs={"n_gpu_layers": 0})
    assert [(each.of, each.context, each.ratio.value, each.seconds) for each in speeds] == [
        ("settings", 70, pytest.approx(2.0), (6.0, 3.0)),
        ("plan", 70, pytest.approx(1.5), (3.0, 2.0)),
        ("both", 70, pytest.approx(3.0), (6.0, 2.0)),
    ]
    stock = {"n_ctx": 78, "n_gpu_layers": 0}
    ours = {**stock, **found.to_kwargs()}
    assert opened == [("stock", "stock", stock), ("settings", "ours", ours), ("plan", "ours", {**ours, "plan": plan})]
    assert asked[:3] == [("stock", 8), ("settings", 8), ("plan", 8)], "nobody times these"
    assert sorted(asked[3:]) == sorted([("stock", 70), ("settings", 70), ("plan", 70)] * 2)
    assert [each.of for each in measure_speed("m.gguf", found, None, [1] * 70, n_rounds=2)] == ["settings"]
