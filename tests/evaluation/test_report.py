"""The report: one page that loads nothing, and says what the results say."""

import html
import re
from typing import Any

import pytest

from adaskip_cpp.evaluation.plots import quality_picture
from adaskip_cpp.evaluation.report import rendered
from adaskip_cpp.evaluation.results import SPEED_NAMES, About, Figure, Results, Row, Speed, TaskScores
from adaskip_cpp.intervals import Interval


def contender(strategy: str, mode: Any, loss: float) -> Row:
    figure, compensation = Figure(loss, 0.1, 4), "affine" if strategy == "adaskip" else "none"
    return Row(
        *(f"{strategy}-{mode}", strategy, "12", mode, compensation, 12, 12),
        speed={name: Speed(Interval(1.25, 1.2, 1.3, 5), figure) for name in SPEED_NAMES},
        text={"all": dict.fromkeys(("loss", "added_loss", "kl", "agreement"), figure)},
        questions={"passkey": TaskScores(figure)},
    )


def test_the_page_says_what_results_say_escapes_what_it_quotes_and_loads_nothing() -> None:
    pytest.importorskip("matplotlib")
    rows = contender("full", None, 2.0), contender("adaskip", "prefill", 0.5), contender("early_exit", "prefill", 5.0)
    command, notes = "adaskip-cpp evaluate 'a & b.gguf'", ("early_exit-6 is left out",)
    results = Results(3, 5, About("<b>model</b> & co.", "2 plans", {"Text": "a < b"}, command, {}, notes), rows)
    drawn = quality_picture(results)
    assert drawn is not None
    page = rendered(results, drawn)
    text = html.unescape(re.sub("<[^>]*>", "", page))
    for words in (
        "<b>model</b> & co.",
        "a < b",
        command,
        "1.25 (1.20–1.30)",
        "+0.500 ± 0.100",
        "Early Exit, 12",
        "not finished: 3 of 5 results",
        *notes,
    ):
        assert words in text
    assert page.count("<svg") == 1 and "@import" not in page
    assert not re.findall(r"<(b|script|link|iframe|object|embed|img)\b", page)
    assert not re.findall(r"\b(?:src|href|srcset|poster|data|action|background)=[\"']?[^\"'#]", page)
    assert not re.findall(r"url\(\s*[\"']?[^\"'#]", page)
