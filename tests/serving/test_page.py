"""The page that a server shows, in headless Chromium: what it tells, whom it serves, and what it asks for."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

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

pytestmark = [pytest.mark.skipif(not (BROWSER and DRIVER), reason="there is no chromedriver"), pytest.mark.slow]

NAME = "<i>tiny"  # a model's name that is no markup, and looks like some
TEXT = "the of to an in error there other one " * 12  # some 200 tokens: more than a head and a tail


@pytest.fixture(scope="module")
def server(served_model: Path, served_plan: Path) -> Iterator[Server]:
    with serving(served_model, "--plan", str(served_plan), "--ctx", "1024", "--alias", NAME) as running:
        yield running


class Browser(webdriver.Chrome):
    def __getitem__(self, name: str) -> WebElement:
        return self.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [each.text for each in self.all(selector)]

    def wait(self, name: str, text: str) -> None:
        WebDriverWait(self, 30).until(lambda _: text in self[name].text, f"{name} is {self[name].text!r}")

    def ask(self, text: str = TEXT, *, words: str = "Both answers are complete.", where: str = "status") -> None:
        """Ask, and wait for both answers, or for other words."""
        self.execute_script("document.getElementById('text').value = arguments[0]", text)
        self["most"].clear()
        self["most"].send_keys("12")
        self["ask"].click()
        self.wait(where, words)

    def connect(self, *, is_offline: bool = False, latency: int = 0) -> None:
        how = {"offline": is_offline, "latency": latency, "downloadThroughput": -1, "uploadThroughput": -1}
        self.execute_cdp_cmd("Network.emulateNetworkConditions", how)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has none
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--disable-background-networking", *sandbox):
        options.add_argument(argument)
    with Browser(options, webdriver.ChromeService(DRIVER)) as opened:
        opened.command_executor.client_config.timeout = 60  # seconds for a command; none by default
        yield opened


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Browser]:
    browser.get(server.url)
    browser.execute_cdp_cmd("Network.enable", {})
    browser.wait("model", NAME)
    yield browser
    browser.connect()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_both_answers_arrive_with_their_figures_and_what_was_skipped(page: Browser) -> None:
    """With skipping, all but 68 tokens of the prompt are the bulk; attention 1 and FFN 2 are hollow and named."""
    assert page["model"].text == f"{NAME}, context of 1,024 tokens"
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
    cells = [
        [[each.get_attribute("class") for each in row] for row in (boxes[::2], boxes[1::2])]
        for boxes in (side.find_elements(By.CSS_SELECTOR, "rect") for side in page.all("article"))
    ]
    assert cells == [[["runs", "hollow", "runs"], ["runs", "runs", "hollow"]], [["runs"] * 3] * 2]
    assert page.texts("figcaption") == [
        "Attention of layer 1 and FFN of layer 2 skipped in the bulk of the prompt.",
        "Nothing skipped in the prompt.",
    ]


def test_a_bar_tells_how_far_the_prompt_is_and_the_time_left_until_the_first_token(page: Browser) -> None:
    said = page.execute_script(
        "const side = new Side('x'), told = [{processed: 100}, {processed: 512}, {processed: 900}];"
        "return told.map((each) => { side.reads({total: 900, cache: 100, time_ms: 6180, ...each});"
        "  return [side.root.querySelector('dd [data-of=prompt]').textContent,"
        "    side.root.querySelector('progress').value] })"
    )
    assert said == [["100 of 900", 0], ["512 of 900, 6 s left", 0.515], ["900 of 900, 0 s left", 1]]
    page.execute_script(
        "window.seen = [];"
        "const keep = (changes) => changes.forEach(({target}) => target.hidden || seen.push(target.value));"
        "new MutationObserver(keep).observe(at('sides'), {subtree: true, attributeFilter: ['value']})"
    )
    page.ask()
    assert 1 in page.execute_script("return seen")
    assert not any(bar.is_displayed() for bar in page.all("progress"))


def test_a_window_is_drawn_as_half_a_cell_and_said(page: Browser) -> None:
    words = page.execute_script(
        "const side = new Side('x');"
        "side.strip(4, {attention: [0], ffn: []}, 'in the prompt', {windowed: [0, 2, 3], window_size: 1276});"
        "return [side.root.querySelectorAll('rect').length, side.root.querySelector('figcaption').textContent]"
    )
    said = "Attention of layer 0 skipped in the prompt. Attention of layers 0, 2-3 has a window of 1,276 tokens."
    assert words == [8 + 2, said]


def test_the_frontier_is_drawn_with_promise_and_plan(served_model: Path, browser: Browser, tmp_path: Path) -> None:
    """A point for each plan and one for the whole model; filled is what ran, at the place of its time and its loss."""
    plan = tmp_path / "frontier.json"
    save_plan(plan, frontier_of(3))
    with serving(served_model, "--plan", str(plan), "--max-loss", "0.04", "--ctx", "2048") as running:
        browser.get(running.url)
        browser.wait("model", "tiny")
        browser.ask(3 * TEXT)
        assert (
            len(browser.all("circle")) == 3
            and len(browser.all("circle.runs")) == 1
            and len(browser.all(".promise")) == 1
        )
        across, up = ([float(str(each.get_attribute(name))) for each in browser.all("circle")] for name in ("cx", "cy"))
        level = float(re.split("[ H]", str(browser.all(".promise")[0].get_attribute("d")))[1])
        assert across == sorted(across, reverse=True) and up[0] > up[1] > level > up[2], "up is worse"
        assert browser.all("circle")[1].get_attribute("class") == "runs"
        assert browser.texts(".frontier ~ figcaption") == [
            "Promise: a loss of at most 0.04 nats per token. Of 2 plans, this one needs 83% of the whole model's time "
            "(predicted), and adds a loss of 0.030 (measured)."
        ]
        browser.ask(TEXT[:60])
        assert "No plan keeps the promise for this prompt" in browser["summary"].text
        assert browser.all("circle")[0].get_attribute("class") == "runs"


@pytest.mark.parametrize(
    ("answers", "sentence", "marks"),
    [
        (["a  b", "a b"], "The answers differ only in spaces and line breaks.", [[], []]),
        (["a b c d", "a b x d"], "They agree up to word 2; 1 of 4 words differs.", [["c"], ["x"]]),
        (["a b c d e", "a d e"], "They agree up to word 1; 2 of 5 words differ.", [["b c"], []]),
        (["", "<b>y</b>"], "They differ from the first word on; 1 of 1 words differs.", [[], ["<b>y</b>"]]),
    ],
)
def test_words_are_compared_and_marked(
    page: Browser, answers: list[str], sentence: str, marks: list[list[str]]
) -> None:
    said, marked, texts = page.execute_script(
        "const sides = [new Side('x'), new Side('y')];"
        "sides.forEach((side, i) => (side.answer.textContent = arguments[0][i]));"
        "const said = compareTexts(sides, arguments[0]);"
        "const marks = sides.map(({answer}) => [...answer.querySelectorAll('mark')].map((each) => each.textContent));"
        "return [said, marks, sides.map(({answer}) => answer.textContent)]",
        answers,
    )
    assert (said, marked, texts) == (sentence, marks, answers)


def test_read_anew_neither_prompt_comes_from_the_cache_and_otherwise_that_is_said(page: Browser) -> None:
    for _ in range(2):
        page.ask()
        assert "cache" not in page["answers"].text
    page["anew"].click()
    for _ in range(2):
        page.ask()
    assert "The times to the first token cannot be compared." in page["summary"].text
    assert "prompt tokens came from the cache" in page.all("article")[1].text


def test_a_server_without_a_plan_and_with_a_key_says_so(served_model: Path, browser: Browser) -> None:
    """The key stays in the tab's storage and in a password field."""
    with serving(served_model, "--plan", "none", environment={"ADASKIP_API_KEY": "a-key"}) as locked:
        browser.get(locked.url)
        browser.wait("error", "this server needs an API key")
        for key, name, words in (("wrong", "error", "the API key is wrong"), ("a-key", "model", "tiny")):
            browser["key"].clear()
            browser["key"].send_keys(key + Keys.TAB)
            browser.wait(name, words)
        assert browser["error"].text == "" and browser["key"].get_attribute("type") == "password"
        kept = browser.execute_script("return [localStorage.length, document.cookie, Object.values(sessionStorage)]")
        assert kept == [0, "", ["a-key"]]
        browser.ask()
        assert "This server has no plan: both answers are of the whole model." in browser["summary"].text
        assert "The answers are the same." in browser["summary"].text
        assert browser.texts("figcaption") == ["Nothing skipped in the prompt."] * 2


def test_what_goes_wrong_is_shown_and_what_is_stopped_ends(page: Browser) -> None:
    page.ask("x" * 3000, words="exceed context window of 1024", where="error")
    page.ask()
    assert page["error"].text == ""
    Select(page["wish"]).select_by_value("speedup")
    page.ask(words="a speed-up needs the plans of", where="error")
    page.connect(is_offline=True)
    page.ask(words="the server cannot be reached", where="error")
    page.connect(latency=5000)
    Select(page["wish"]).select_by_value("auto")
    page.ask(words="reading")
    page["stop"].click()
    page.wait("status", "Stopped.")
    assert page["error"].text == "" and page["ask"].is_enabled()


@pytest.mark.parametrize(("scheme", "pixels", "columns"), [("light", 320, 1), ("dark", 1200, 2)])
def test_it_can_be_read_in_any_scheme_and_width(page: Browser, scheme: str, pixels: int, columns: int) -> None:
    """With WCAG's contrast of at least 4.5. Nothing is wider than the window, and answers are side by side in it."""
    size = {"width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.ask()
    inner, outer = page.execute_script("const it = document.documentElement; return [it.scrollWidth, it.clientWidth]")
    assert inner == outer <= pixels
    assert len({each.rect["x"] for each in page.all("article")}) == columns
    page.execute_script("document.querySelector('.answer').append(element('mark', 'x')); at('error').textContent = 'x'")
    colours = page.execute_script(
        "const ground = (of) => { const it = getComputedStyle(of).backgroundColor;"
        "  return it === 'rgba(0, 0, 0, 0)' ? ground(of.parentElement) : it };"
        "return [...document.querySelectorAll('p, label, input, textarea, select, button:enabled, dt, dd, mark,"
        "  figcaption, h1, h2, h3')].map((each) => [getComputedStyle(each).color, ground(each), each.outerHTML])"
    )
    assert (luminance(page.execute_script("return getComputedStyle(document.body).backgroundColor")) < 0.5) == (
        scheme == "dark"
    )
    assert len(colours) > 20
    for ink, ground, what in colours:
        dark, light = sorted((luminance(ink), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, what


def luminance(colour: str) -> float:
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_keyboard_alone_does_all_and_controls_have_names(page: Browser) -> None:
    """Tab goes from field to field, each shows that it has the focus, and Ctrl+Enter asks from any."""
    visited = []
    for keys in (TEXT, "", "", Keys.CONTROL + "a" + Keys.NULL + "12", "", ""):
        webdriver.ActionChains(page).send_keys(Keys.TAB, keys).perform()
        focused = page.switch_to.active_element
        visited.append(focused.get_attribute("id"))
        assert focused.value_of_css_property("outline-style") == "solid", visited
    assert visited == ["text", "question", "wish", "most", "anew", "ask"]
    assert page["text"].get_attribute("value") == TEXT
    webdriver.ActionChains(page).send_keys(Keys.CONTROL, Keys.ENTER, Keys.NULL).perform()
    page.wait("status", "Both answers are complete.")
    assert page.switch_to.active_element.get_attribute("id") == "ask"
    Select(page["wish"]).select_by_value("speedup")
    page.execute_script("at('key-field').hidden = false")
    controls = {"textbox", "spinbutton", "combobox", "checkbox", "button"}
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {each["name"]["value"] for each in nodes if each.get("role", {}).get("value") in controls}
    names = {"Text", "Question", "Plan", "Speed-up", "Most tokens in an answer", "API key", "Ask", "Stop"}
    assert named == names | {"Read the whole prompt again"}


def test_it_asks_its_own_server_alone_and_its_policy_hinders_nothing(page: Browser, server: Server) -> None:
    """In the browser's log are requests of the page, its models and its two answers, and no complaints."""
    page.get_log("performance")
    page.get_log("browser")
    page.refresh()
    page.wait("model", NAME)
    page.ask()
    log = [json.loads(each["message"])["message"] for each in page.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in log if each["method"] == "Network.requestWillBeSent"]
    answers = [f"{server.url}/v1/chat/completions"] * 2
    assert [each for each in asked if each != "data:,"] == [f"{server.url}/", f"{server.url}/v1/models", *answers]
    assert page.get_log("browser") == []
