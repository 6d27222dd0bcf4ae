"""The report: one page that is well-formed, loads nothing, and says what the results say."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from adaskip_cpp.evaluation.report import rendered
from adaskip_cpp.evaluation.results import SPEED_NAMES, About, Figure, Results, Row, Speed, TaskScores
from adaskip_cpp.intervals import Interval

VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use"}
LOADS = {"src", "href", "xlink:href", "srcset", "poster", "data", "action", "background"}


class Page(HTMLParser):
    """Checks nesting, and collects what a browser would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in LOADS and value and not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def contender(strategy: str, mode: Any, loss: float) -> Row:
    figure, share = Figure(loss, 0.1, 4), Figure(0.5, 0.1, 4)
    figures = {"loss": figure, "added_loss": figure, "kl": figure, "agreement": share}
    return Row(
        name=f"{strategy}-{mode}",
        strategy=strategy,
        budget="12",
        mode=mode,
        compensation="affine" if strategy == "adaskip" else "none",
        n_skip_prefill=12,
        n_skip_decode=12,
        speed={name: Speed(Interval(1.25, 1.2, 1.3, 5), figure) for name in SPEED_NAMES},
        text={"all": figures},
        questions={"passkey": TaskScores(figure)},
    )


@pytest.fixture
def results() -> Results:
    rows = contender("full", None, 2.0), contender("adaskip", "prefill", 0.5), contender("early_exit", "prefill", 5.0)
    configuration = {"Text": "a < b", "Machine": "c"}
    about = About("<b>model</b> & co.", "2 plans", configuration, "adaskip-cpp evaluate 'a & b.gguf'", {})
    return Results(5, 5, about, rows)


def test_the_page_is_well_formed_says_what_results_say_and_escapes_what_it_quotes(results: Results) -> None:
    page = Page(rendered(results, None))
    assert "<b>model</b> & co." in page.text
    assert "b" not in page.tags
    assert "a < b" in page.text
    assert "adaskip-cpp evaluate 'a & b.gguf'" in page.text
    for figure in ("1.25 (1.20–1.30)", "+0.500 ± 0.100", "Early Exit, 12"):
        assert figure in page.text


def test_the_page_loads_nothing(results: Results) -> None:
    pytest.importorskip("matplotlib")
    from adaskip_cpp.evaluation.plots import quality_picture

    drawn = quality_picture(results)
    assert drawn is not None
    html = rendered(results, drawn)
    page = Page(html)
    assert page.tags.count("svg") == 1
    assert page.loads == []
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(page.tags)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?([^)]*)", html))


def test_it_has_a_style_for_light_and_dark_and_for_narrow_windows(results: Results) -> None:
    html = rendered(results, None)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert html.count("<table>") == html.count('class="scroll"')


def test_results_that_are_not_finished_say_so(results: Results) -> None:
    about = replace(results.about, notes=("early_exit-6 is left out",))
    text = Page(rendered(replace(results, n_done=3, about=about), None)).text
    assert "not finished: 3 of 5 results" in text and "early_exit-6 is left out" in text
