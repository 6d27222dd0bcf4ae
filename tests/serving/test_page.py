"""The page that a server shows, in headless Chromium: what it tells, whom it serves, and what it asks for."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed: run pip install selenium")

from oracles.served import Server, frontier_of, serving
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from adaskip_cpp.model.plan_file import save_plan

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="there is no chromium with its chromedriver"),
    pytest.mark.slow,
]

NAME = "<i>tiny"
"""A model's name that is no markup, and looks like some."""

TEXT = "the of to an in error there other one " * 12
"""Some 200 tokens of the tiny vocabulary: more than a head and a tail."""

KEY = "a-key"


@pytest.fixture(scope="module")
def model(served_model: Path) -> Path:
    path = served_model.with_name(f"{NAME}.gguf")
    path.unlink(missing_ok=True)  # a worker may come back to this module
    path.symlink_to(served_model)
    return path


@pytest.fixture(scope="module")
def server(model: Path, served_plan: Path) -> Iterator[Server]:
    """A server with a plan that skips in the bulk."""
    with serving(model, "--plan", str(served_plan), "--ctx", "1024") as running:
        yield running


@pytest.fixture(scope="module")
def locked(model: Path) -> Iterator[Server]:
    """A server without a plan that wants a key."""
    with serving(model, "--plan", "none", "--ctx", "1024", environment={"ADASKIP_API_KEY": KEY}) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has none
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--disable-background-networking", *sandbox):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as opened:
        opened.command_executor.client_config.timeout = 60  # seconds for a command; none by default
        yield opened


class Page:
    """The page as a reader has it before them."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def __getitem__(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [each.text for each in self.all(selector)]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    def devtools(self, command: str, **options: Any) -> dict[str, Any]:
        return self.browser.execute_cdp_cmd(command, options)

    def wait(self, name: str, text: str) -> None:
        """Wait until an element has this text in it."""
        WebDriverWait(self.browser, 30).until(lambda _: text in self[name].text, f"{name} is {self[name].text!r}")

    def fill(self, text: str = TEXT, most: int = 12) -> None:
        self.run("document.getElementById('text').value = arguments[0]", text)
        self["most"].clear()
        self["most"].send_keys(str(most))

    def ask(self, text: str = TEXT) -> None:
        """Ask, and wait for both answers."""
        self.fill(text)
        self["ask"].click()
        self.wait("status", "Both answers are complete.")

    def width(self, pixels: int) -> None:
        size = {"width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def network(self, *, is_offline: bool = False, latency: int = 0) -> None:
        rates = {"downloadThroughput": -1, "uploadThroughput": -1}
        self.devtools("Network.emulateNetworkConditions", offline=is_offline, latency=latency, **rates)


@pytest.fixture
def page(browser: webdriver.Chrome, server: Server) -> Iterator[Page]:
    """The page of the server with a plan, as it is when it was opened."""
    opened = Page(browser, server.url)
    opened.devtools("Network.enable")
    opened.wait("model", NAME)
    yield opened
    opened.network()
    opened.prefer("")
    opened.devtools("Emulation.clearDeviceMetricsOverride")


# -- what it tells -----------------------------------------------------------------------------------------------------


def test_the_header_names_the_model_and_its_context_and_takes_no_markup_from_the_server(page: Page) -> None:
    assert page["model"].text == f"{NAME}, context of 1,024 tokens"


def test_both_answers_arrive_with_their_figures(page: Page) -> None:
    """Each with its wait, its speed, and all tokens of its prompt; with skipping, all but 68 of them are the bulk."""
    page.ask()
    assert page.texts("article h3") == ["With skipping", "Whole model"]
    assert all(page.texts(".answer"))
    assert all(re.fullmatch(r"\d+(\.\d+)? s", each) for each in page.texts("[data-of=wait]"))
    assert all(float(each.replace(",", "")) > 0 for each in page.texts("[data-of=speed]"))
    figures = [list(map(int, re.findall(r"\d+", each))) for each in page.texts("[data-of=prompt]")]
    (read, in_bulk, reused), (read_whole, in_bulk_whole, reused_whole) = figures
    assert in_bulk == read + reused - 68 > 0 == in_bulk_whole
    assert read + reused == read_whole + reused_whole
    assert re.search(r"token is \d+\.\d times as (fast|slow): after .+ s instead of .+ s\.", page["summary"].text)


def test_a_bar_tells_how_far_the_prompt_is_and_the_time_left_until_the_first_token(page: Page) -> None:
    said = page.run(
        "const side = new Side('x'), told = [{processed: 100}, {processed: 512}, {processed: 900}];"
        "return told.map((each) => { side.reads({total: 900, cache: 100, time_ms: 6180, ...each});"
        "  return [side.root.querySelector('dd [data-of=prompt]').textContent,"
        "    side.root.querySelector('progress').value] })"
    )
    assert said == [["100 of 900", 0], ["512 of 900, 6 s left", 0.515], ["900 of 900, 0 s left", 1]]
    page.run(
        "window.seen = [];"
        "const keep = (changes) => changes.forEach(({target}) => target.hidden || seen.push(target.value));"
        "new MutationObserver(keep).observe(at('sides'), {subtree: true, attributeFilter: ['value']})"
    )
    page.ask()
    assert 1 in page.run("return seen")
    assert not any(bar.is_displayed() for bar in page.all("progress"))


def test_the_strip_and_its_words_tell_what_was_skipped(page: Page) -> None:
    """Attention 1 and FFN 2 are hollow and named; of the whole model all is filled."""
    page.ask()
    cells = [
        [[each.get_attribute("class") for each in row] for row in (boxes[::2], boxes[1::2])]
        for boxes in (side.find_elements(By.CSS_SELECTOR, "rect") for side in page.all("article"))
    ]
    runs, hollow = "runs", "hollow"
    assert cells == [[[runs, hollow, runs], [runs, runs, hollow]], [[runs] * 3, [runs] * 3]]
    assert page.texts("figcaption") == [
        "Attention of layer 1 and FFN of layer 2 skipped in the bulk of the prompt.",
        "Nothing skipped in the prompt.",
    ]


def test_a_window_is_drawn_as_half_a_cell_and_said(page: Page) -> None:
    words = page.run(
        "const side = new Side('x');"
        "side.strip(4, {attention: [0], ffn: []}, 'in the prompt', {windowed: [0, 2, 3], window_size: 1276});"
        "return [side.root.querySelectorAll('rect').length, side.root.querySelector('figcaption').textContent]"
    )
    said = "Attention of layer 0 skipped in the prompt. Attention of layers 0, 2-3 has a window of 1,276 tokens."
    assert words == [8 + 2, said]


def test_the_frontier_is_drawn_with_the_promise_and_the_plan_of_the_answer(
    model: Path, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    """A point for each plan and one for the whole model; filled is what ran, at the place of its time and its loss."""
    save_plan(tmp_path / "frontier.json", frontier_of(3))
    with serving(model, "--plan", str(tmp_path / "frontier.json"), "--max-loss", "0.04", "--ctx", "2048") as running:
        page = Page(browser, running.url)
        page.wait("model", NAME)
        page.ask(3 * TEXT)
        assert len(page.all("circle")) == 3 and len(page.all("circle.runs")) == 1 and len(page.all(".promise")) == 1
        across, up = ([float(str(each.get_attribute(name))) for each in page.all("circle")] for name in ("cx", "cy"))
        level = float(re.split("[ H]", str(page.all(".promise")[0].get_attribute("d")))[1])
        assert across == sorted(across, reverse=True) and up[0] > up[1] > level > up[2], "up is worse"
        assert page.all("circle")[1].get_attribute("class") == "runs"
        assert page.texts(".frontier ~ figcaption") == [
            "Promise: a loss of at most 0.04 nats per token. Of 2 plans, this one needs 83% of the whole model's time "
            "(predicted), and adds a loss of 0.030 (measured)."
        ]
        page.ask(TEXT[:60])
        assert "No plan keeps the promise for this prompt" in page["summary"].text
        assert page.all("circle")[0].get_attribute("class") == "runs"


@pytest.mark.parametrize(
    ("answers", "sentence", "marks"),
    [
        (["a b", "a b"], "The answers are the same.", [[], []]),
        (["a  b", "a b"], "The answers differ only in spaces and line breaks.", [[], []]),
        (["a b c d", "a b x d"], "They agree up to word 2; 1 of 4 words differs.", [["c"], ["x"]]),
        (["a b c d e", "a d e"], "They agree up to word 1; 2 of 5 words differ.", [["b c"], []]),
        (["x", "y z"], "They differ from the first word on; 2 of 2 words differ.", [["x"], ["y z"]]),
        (["", "<b>y</b>"], "They differ from the first word on; 1 of 1 words differs.", [[], ["<b>y</b>"]]),
    ],
)
def test_words_that_the_other_answer_lacks_are_marked_and_counted(
    page: Page, answers: list[str], sentence: str, marks: list[list[str]]
) -> None:
    """And marking leaves the text as it was."""
    said, marked, texts = page.run(
        "const sides = [new Side('x'), new Side('y')];"
        "sides.forEach((side, i) => (side.answer.textContent = arguments[0][i]));"
        "const said = compareTexts(sides, arguments[0]);"
        "const marks = sides.map(({answer}) => [...answer.querySelectorAll('mark')].map((each) => each.textContent));"
        "return [said, marks, sides.map(({answer}) => answer.textContent)]",
        answers,
    )
    assert (said, marked, texts) == (sentence, marks, answers)


def test_read_anew_neither_prompt_comes_from_the_cache_and_otherwise_that_is_said(page: Page) -> None:
    for _ in range(2):
        page.ask()
        assert "cache" not in page["answers"].text
    page["anew"].click()
    for _ in range(2):
        page.ask()
    assert "The times to the first token cannot be compared." in page["summary"].text
    assert "prompt tokens came from the cache" in page.all("article")[1].text


def test_without_a_plan_it_says_so(browser: webdriver.Chrome, locked: Server) -> None:
    page = unlocked(Page(browser, locked.url))
    page.ask()
    assert "This server has no plan: both answers are of the whole model." in page["summary"].text
    assert "The answers are the same." in page["summary"].text
    assert [figure.text for figure in page.all("figcaption")] == ["Nothing skipped in the prompt."] * 2


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_what_the_server_refuses_is_shown_and_can_be_asked_otherwise(page: Page) -> None:
    page.fill("x" * 3000)
    page["ask"].click()
    page.wait("error", "exceed context window of 1024")
    page.ask()
    assert page["error"].text == ""


def test_a_speed_up_that_cannot_be_had_is_refused_in_the_servers_words(page: Page) -> None:
    Select(page["wish"]).select_by_value("speedup")
    page.fill()
    page["ask"].click()
    page.wait("error", "a speed-up needs the plans of")


def test_a_server_that_is_gone_is_named_as_such(page: Page) -> None:
    page.network(is_offline=True)
    page.fill()
    page["ask"].click()
    page.wait("error", "the server cannot be reached")


def test_stop_ends_the_asking(page: Page) -> None:
    """And leaves the page ready to ask again."""
    page.network(latency=5000)
    page.fill()
    page["ask"].click()
    page["stop"].click()
    page.wait("status", "Stopped.")
    assert page["error"].text == ""
    assert page["ask"].is_enabled()


def test_the_key_that_a_server_wants_is_asked_for(browser: webdriver.Chrome, locked: Server) -> None:
    """It stays in the tab's storage and in a password field."""
    page = Page(browser, locked.url)
    page.run("sessionStorage.clear()")
    browser.refresh()
    page.wait("error", "this server needs an API key")
    page["key"].send_keys("wrong" + Keys.TAB)
    page.wait("error", "the API key is wrong")
    unlocked(page)
    assert page["error"].text == ""
    assert page["key"].get_attribute("type") == "password"
    assert page.run("return [localStorage.length, document.cookie, Object.values(sessionStorage)]") == [0, "", [KEY]]


def unlocked(page: Page) -> Page:
    """The page with the key entered."""
    WebDriverWait(page.browser, 30).until(lambda _: page["key"].is_displayed())
    page["key"].clear()
    page["key"].send_keys(KEY + Keys.TAB)
    page.wait("model", NAME)
    return page


# -- whom it serves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pixels", "columns"), [(320, 1), (1200, 2)])
def test_nothing_is_wider_than_the_window(page: Page, pixels: int, columns: int) -> None:
    """Answers are side by side where there is room."""
    page.width(pixels)
    page.ask()
    inner, outer = page.run("const it = document.documentElement; return [it.scrollWidth, it.clientWidth]")
    assert inner == outer <= pixels
    assert len({each.rect["x"] for each in page.all("article")}) == columns


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_either_scheme(page: Page, scheme: str) -> None:
    """By WCAG's contrast of at least 4.5."""
    page.prefer(scheme)
    page.ask()
    page.run("document.querySelector('.answer').append(element('mark', 'x')); at('error').textContent = 'x'")
    colours = page.run(
        "const ground = (of) => { const it = getComputedStyle(of).backgroundColor;"
        "  return it === 'rgba(0, 0, 0, 0)' ? ground(of.parentElement) : it };"
        "return [...document.querySelectorAll('p, label, input, textarea, select, button:enabled, dt, dd, mark,"
        "  figcaption, h1, h2, h3')].map((each) => [getComputedStyle(each).color, ground(each), each.outerHTML])"
    )
    assert (luminance(page.run("return getComputedStyle(document.body).backgroundColor")) < 0.5) == (scheme == "dark")
    assert len(colours) > 20
    for ink, ground, what in colours:
        dark, light = sorted((luminance(ink), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, what


def luminance(colour: str) -> float:
    """WCAG's relative luminance of ``rgb(r, g, b)``."""
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_keyboard_alone_does_all(page: Page) -> None:
    """Tab goes from field to field, each shows that it has the focus, and Ctrl+Enter asks from any."""
    visited = []
    for keys in (TEXT, "", "", Keys.CONTROL + "a" + Keys.NULL + "12", "", ""):
        webdriver.ActionChains(page.browser).send_keys(Keys.TAB, keys).perform()
        focused = page.browser.switch_to.active_element
        visited.append(focused.get_attribute("id"))
        assert focused.value_of_css_property("outline-style") == "solid", visited
    assert visited == ["text", "question", "wish", "most", "anew", "ask"]
    assert page["text"].get_attribute("value") == TEXT
    chain = webdriver.ActionChains(page.browser)
    chain.key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.wait("status", "Both answers are complete.")
    assert page.browser.switch_to.active_element.get_attribute("id") == "ask"


def test_every_control_has_a_name(page: Page) -> None:
    """Those that are hidden at first, too."""
    Select(page["wish"]).select_by_value("speedup")
    page.run("at('key-field').hidden = false")
    controls = {"textbox", "spinbutton", "combobox", "checkbox", "button"}
    nodes = page.devtools("Accessibility.getFullAXTree")["nodes"]
    named = [each["name"]["value"] for each in nodes if each.get("role", {}).get("value") in controls]
    names = ["Text", "Question", "Plan", "Speed-up", "Most tokens in an answer", "API key"]
    names += ["Read the whole prompt again", "Ask", "Stop"]
    assert sorted(named) == sorted(names)


# -- what it asks for --------------------------------------------------------------------------------------------------


def test_it_asks_its_own_server_alone_and_its_policy_hinders_nothing(page: Page, server: Server) -> None:
    """In the browser's log are requests of the page, its models and its two answers, and no complaints."""
    page.browser.get_log("performance")
    page.browser.get_log("browser")
    page.browser.refresh()
    page.wait("model", NAME)
    page.ask()
    log = [json.loads(each["message"])["message"] for each in page.browser.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in log if each["method"] == "Network.requestWillBeSent"]
    answers = [f"{server.url}/v1/chat/completions"] * 2
    assert [each for each in asked if each != "data:,"] == [f"{server.url}/", f"{server.url}/v1/models", *answers]
    assert page.browser.get_log("browser") == []
