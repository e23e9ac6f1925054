"""The page in a real browser: as a file, without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from eval.report import HTML
from tests.eval.report.conftest import SCRIPT

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        started.get("about:blank")
        yield started
    finally:
        started.quit()


@pytest.fixture(scope="module")
def url(odd) -> str:
    return (odd / HTML).as_uri()


@pytest.fixture
def page(browser, url) -> Any:
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # of what was before
    browser.get(url)
    return browser


def visible(page: Any, selector: str) -> list[Any]:
    script = "return [...document.querySelectorAll(arguments[0])].filter((each) => each.checkVisibility())"
    return list(page.execute_script(script, selector))


def test_nothing_is_fetched_and_nothing_is_complained_about(page, url):
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    requests = [each["params"] for each in events if each["method"] == "Network.requestWillBeSent"]
    asked = [each["request"]["url"] for each in requests if each["documentURL"] == url]  # not the browser's own pages
    assert [address for address in asked if not address.startswith("data:")] == [url]


def test_what_was_injected_does_nothing(page):
    assert page.title.startswith("Incomplete: made by hand")
    assert page.execute_script("return document.images.length + document.scripts.length") == 1
    assert SCRIPT in page.execute_script("return document.body.innerText")


def test_all_pictures_have_a_size(page):
    page.execute_script("document.querySelectorAll('[hidden]').forEach((each) => { each.hidden = false; })")
    sizes = page.execute_script(
        """return [...document.querySelectorAll("figure svg")].map((each) => {
             const { width, height } = each.getBoundingClientRect();
             return [width, height, each.querySelectorAll("text").length];
           })"""
    )
    assert len(sizes) > 15
    assert all(width > 100 and height > 50 and texts > 3 for width, height, texts in sizes)


def test_the_banner_is_the_first_thing_to_see(page):
    banner = page.find_element("css selector", ".banner")
    assert banner.is_displayed()
    assert banner.location["y"] < 250
    assert "20 records of router-03" in banner.text
    assert visible(page, ".bar .alarm")


def column(page: Any, number: int) -> list[str]:
    table = visible(page, "table.results")[0]
    return [
        row.find_elements("css selector", "th, td")[number].text
        for row in table.find_elements("css selector", "tbody tr")
    ]


def test_a_click_on_a_head_sorts_the_table_and_another_one_turns_it_round(page):
    heads = visible(page, "table.results thead button")
    names = [head.text.replace("\N{NON-BREAKING HYPHEN}", "-").split("\n")[0] for head in heads]
    at = names.index("p95")
    figures = [float(text.split("\n")[0]) for text in column(page, at)]
    for expected in (sorted(figures), sorted(figures, reverse=True)):  # less is better: first
        heads[at].click()
        assert [float(text.split("\n")[0]) for text in column(page, at)] == expected
    heads[names.index("Top-1")].click()
    told = [text.split("\n")[0] for text in column(page, names.index("Top-1"))]
    there = [text for text in told if text]
    assert told[: len(there)] == sorted(there, reverse=True)
    assert set(told[len(there) :]) == {""}  # who ranks nobody stays last
    heads[0].click()
    routers = [text.split("\n")[0].lower() for text in column(page, 0)]
    assert routers.index("base") < routers.index("oracle") < routers.index("uniform")


def test_one_regime_at_a_time_or_all(page):
    tables = "table.results"
    assert [len(visible(page, tables)), len(visible(page, "[data-regime='ood']"))] == [1, 0]
    labels = {label.text: label for label in page.find_elements("css selector", ".bar label")}
    labels["ood"].click()
    assert len(visible(page, tables)) == 1
    assert visible(page, "[data-regime='ood']")
    labels["all"].click()
    assert len(visible(page, tables)) == 3


def test_one_router_s_confusion_is_chosen(page):
    from selenium.webdriver.support.select import Select

    chooser = Select(page.find_element("css selector", "#experts select"))
    names = [option.text for option in chooser.options]
    assert len(names) == 5
    for name in names[:2]:
        chooser.select_by_visible_text(name)
        assert [each.get_attribute("data-choice") for each in visible(page, "#experts [data-choice]")] == [
            option.get_attribute("value") for option in chooser.options if option.text == name
        ]


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_as_wide_as_its_window(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.execute_script("return document.querySelector('figcaption').getBoundingClientRect().right") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_is_dark_and_pictures_follow(page):
    ink = "return getComputedStyle(document.querySelector('figure svg text')).fill"
    paper = "return getComputedStyle(document.body).backgroundColor"
    seen = []
    for scheme in ("light", "dark"):
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        seen.append([_brightness(page.execute_script(script)) for script in (ink, paper)])
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    (light_ink, light_paper), (dark_ink, dark_paper) = seen
    assert light_ink < 100 < 200 < light_paper
    assert dark_paper < 100 < 140 < dark_ink


def _brightness(colour: str) -> float:
    red, green, blue = (int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    return (red + green + blue) / 3


def test_without_scripts_everything_is_there(browser, url):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(url)
        assert (
            len([table for table in browser.find_elements("css selector", "table.results") if table.is_displayed()])
            == 3
        )
        assert not browser.find_element("css selector", ".bar").is_displayed()
        assert browser.find_element("css selector", ".banner").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
