"""The report in a real browser, headless: what a reader can do with it, and what it must not do."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.explain.lessons import Options, explain
from halfbyte.report import Report, build_report
from tests.conftest import TEXT
from tests.report import documents

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[dev]'")
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'>"


@pytest.fixture(scope="module")
def report(quantized_llama: Path) -> Report:
    return build_report(
        quantized_llama,
        comparison=documents.comparison(),
        profile=documents.profile(),
        speculation={"run": documents.speculation()},
        lessons=[explain("packing", Options(progress=False)).to_dict(), documents.lesson()],
        calibration=[TEXT],
        n_samples=2,
        progress=False,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium with its chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    try:
        started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    except WebDriverException as error:
        pytest.skip(f"chromium does not start here: {error.msg}")
    yield started
    started.quit()


@pytest.fixture
def page(browser: Any, report: Report, tmp_path: Path) -> Iterator[Any]:
    """The report, opened; whatever a test does, the console stays silent and nothing is asked of any network."""
    open_report(browser, report, tmp_path)
    yield browser
    assert_quiet(browser)


def open_report(browser: Any, report: Report, folder: Path) -> None:
    for kind in ("performance", "browser"):
        browser.get_log(kind)
    browser.get(report.write(folder / "report.html").as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready") == "true"


def assert_quiet(browser: Any) -> None:
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("file:")] == []
    assert len(asked) == 1


def find(browser: Any, selector: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, selector)


def column(browser: Any, section: str, place: int) -> list[str]:
    cells = browser.find_elements(
        By.CSS_SELECTOR, f"#{section} table.data:first-of-type tbody tr td:nth-child({place})"
    )
    return [cell.text for cell in cells]


def test_everything_is_there(page: Any) -> None:
    headings = [node.text for node in page.find_elements(By.CSS_SELECTOR, "h2")]
    assert headings == [
        "Summary", "Comparison", "Layers", "Profile and roofline", "Speculative decoding", "Manifest", "Lessons"
    ]  # fmt: skip
    links = page.find_elements(By.CSS_SELECTOR, "nav a")
    assert [link.text for link in links] == headings
    assert "B has 15.63 % higher perplexity than A." in find(page, "#summary").text
    assert "Provisional" in find(page, "#summary").text
    assert len(page.find_elements(By.CSS_SELECTOR, "[role=gridcell]")) == 14
    assert "NaN" not in find(page, "main").get_attribute("innerHTML")
    assert "undefined" not in find(page, "main").text


def test_a_click_on_a_head_sorts_and_another_one_turns_it_round(page: Any, report: Report) -> None:
    table = page.find_elements(By.CSS_SELECTOR, "#layers .tall table")[0]
    errors = report.data["models"][0]["columns"]
    by_error = [name for _, name in sorted(zip(errors["output_error"], errors["name"], strict=True), reverse=True)]
    names = lambda: [node.text for node in table.find_elements(By.CSS_SELECTOR, "tbody tr td:first-child")]  # noqa: E731
    heads = table.find_elements(By.CSS_SELECTOR, "thead th")
    assert names() == by_error
    assert heads[2].get_attribute("aria-sort") == "descending"
    heads[0].find_element(By.TAG_NAME, "button").click()
    assert names() == sorted(errors["name"])
    assert [head.get_attribute("aria-sort") for head in heads[:3]] == ["ascending", "none", "none"]
    heads[0].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert names() == sorted(errors["name"], reverse=True)
    assert heads[0].get_attribute("aria-sort") == "descending"


def test_a_click_on_a_layer_opens_its_panel(page: Any) -> None:
    cell = page.find_elements(By.CSS_SELECTOR, "[role=gridcell]")[3]
    cell.click()
    panel = find(page, "#panel")
    assert panel.is_displayed()
    assert find(page, "#panel-title").text == "model.layers.1.self_attn.k_proj"
    captions = [node.text.split("\n")[0] for node in panel.find_elements(By.CSS_SELECTOR, "figcaption")]
    assert captions == [
        "Error after each stage, % of the output", "Search curve: error over the scale ratio r",
        "Activations and scales", "Error by channel", "Weights before and after", "Rounding error", "Codes of 4 bits",
    ]  # fmt: skip
    for expected in ("32 outputs × 64 inputs", "4 bits, groups of 32", "% up", "SNR"):
        assert expected in panel.text
    assert "NaN" not in panel.get_attribute("innerHTML")
    find(page, "#panel [data-close]").click()
    assert not panel.is_displayed()


def test_the_heat_map_by_keys_alone(page: Any) -> None:
    cells = page.find_elements(By.CSS_SELECTOR, "[role=gridcell]")
    assert [cell.get_attribute("tabindex") for cell in cells].count("0") == 1
    page.execute_script("arguments[0].focus()", cells[0])
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_LEFT, Keys.ARROW_LEFT):
        ActionChains(page).send_keys(key).perform()
    assert page.switch_to.active_element == cells[4]
    assert [cell.get_attribute("tabindex") for cell in cells].count("0") == 1
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert find(page, "#panel-title").text == "model.layers.0.self_attn.v_proj"
    assert page.switch_to.active_element.text == "Close"
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not find(page, "#panel").is_displayed()
    assert page.switch_to.active_element == cells[4]
    ActionChains(page).send_keys(Keys.END, Keys.PAGE_DOWN, " ").perform()
    assert find(page, "#panel-title").text == "model.layers.1.mlp.down_proj"


def test_tab_reaches_every_control_and_focus_shows(page: Any) -> None:
    page.execute_script("document.activeElement.blur()")
    seen = []
    for _ in range(200):
        ActionChains(page).send_keys(Keys.TAB).perform()
        active = page.switch_to.active_element
        if active.tag_name == "body":
            break
        seen.append(active.get_attribute("outerHTML")[:40])
        assert active.value_of_css_property("outline-style") != "none", active.get_attribute("outerHTML")
    joined = "\n".join(seen)
    for wanted in (
        '<a class="skip"',
        '<button id="theme"',
        '<a href="#layers"',
        'role="gridcell"',
        "<select",
        "<summary",
    ):
        assert wanted in joined


def test_another_measure_recolours_the_map(page: Any) -> None:
    cell = page.find_elements(By.CSS_SELECTOR, "[role=gridcell]")[0]
    before = cell.get_attribute("aria-label"), cell.value_of_css_property("background-color")
    select = find(page, "#layers select")
    for option in select.find_elements(By.TAG_NAME, "option"):
        if option.text == "rounding bias, steps":
            option.click()
    after = cell.get_attribute("aria-label"), cell.value_of_css_property("background-color")
    assert before[0] != after[0]
    assert "self_attn.q_proj, block 0: " in after[0]


def test_dark_by_the_system_and_by_the_button(page: Any) -> None:
    ground = lambda: find(page, "body").value_of_css_property("background-color")  # noqa: E731
    setting = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    light = ground()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", setting)
    dark = ground()
    assert light != dark
    find(page, "#theme").click()
    assert ground() == light
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_itself_never_scrolls_sideways(page: Any, width: int) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    found = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert found[0] <= found[1] == width


def test_hostile_names_are_shown_and_not_run(browser: Any, report: Report, tmp_path: Path) -> None:
    data = copy.deepcopy(report.data)
    model = data["models"][0]
    model["columns"]["name"] = [f"{HOSTILE}{name}" for name in model["columns"]["name"]]
    model["columns"]["kind"] = [f"{HOSTILE}{kind}" for kind in model["columns"]["kind"]]
    model["name"] = data["comparison"]["names"][0] = data["comparison"]["verdicts"][0] = HOSTILE
    data["notes"] = [HOSTILE]
    data["lessons"][1]["steps"][0]["blocks"][1]["statement"] = HOSTILE
    model["manifest"]["warnings"] = [HOSTILE]
    open_report(browser, Report(HOSTILE, data), tmp_path)
    page = browser
    page.find_elements(By.CSS_SELECTOR, "[role=gridcell]")[0].click()
    assert find(page, "#panel-title").text == f"{HOSTILE}model.layers.0.self_attn.q_proj"
    find(page, "#panel").send_keys(Keys.ESCAPE)
    page.find_elements(By.CSS_SELECTOR, "#lessons summary")[1].click()
    assert HOSTILE in find(page, "#lesson-made").text
    assert page.title == HOSTILE
    assert page.find_elements(By.CSS_SELECTOR, "img") == []
    assert len(page.find_elements(By.CSS_SELECTOR, "script")) == 2
    assert_quiet(page)


def test_a_lesson_is_drawn_when_it_is_opened(page: Any) -> None:
    assert page.find_elements(By.CSS_SELECTOR, "#lessons h3") == []
    first, second = page.find_elements(By.CSS_SELECTOR, "#lessons summary")
    first.click()
    packing = find(page, "#lesson-packing")
    told = explain("packing", Options(progress=False))
    assert [node.text for node in packing.find_elements(By.CSS_SELECTOR, "h3")] == [step.heading for step in told.steps]
    checked = [node.text for node in packing.find_elements(By.CSS_SELECTOR, ".check")]
    assert checked == [f"✓ {' '.join(check.split())}" for check in told.checks]
    assert "halfbyte explain kernel" in [node.text for node in packing.find_elements(By.CSS_SELECTOR, "p code")]
    marks = {node.value_of_css_property("color") for node in packing.find_elements(By.CSS_SELECTOR, "pre b")}
    assert len(marks) == 8
    first.click()
    first.click()
    assert len(packing.find_elements(By.CSS_SELECTOR, "h3")) == len(told.steps)
    second.click()
    made = find(page, "#lesson-made")
    assert made.find_element(By.CSS_SELECTOR, "td").text == "cell"
    assert made.find_element(By.CSS_SELECTOR, "figcaption").text.startswith("A curve")
    assert "NaN" not in made.get_attribute("innerHTML")


def test_parts_that_are_missing_leave_no_gap(browser: Any, tmp_path: Path) -> None:
    open_report(browser, build_report(profile=documents.profile()), tmp_path)
    assert [node.text for node in browser.find_elements(By.CSS_SELECTOR, "h2")] == ["Profile and roofline"]
    assert_quiet(browser)


def test_of_a_thousand_experts_the_first_are_shown(browser: Any, report: Report, tmp_path: Path) -> None:
    """1,400 linears, a hundred to each cell: the table is cut off behind the order, the panel offers all of a cell."""
    data = copy.deepcopy(report.data)
    (model,) = data["models"]
    model["columns"] = {key: values * 100 for key, values in model["columns"].items()}
    model["columns"]["output_error"] = [n / 1400 for n in range(1, 1401)]
    model["columns"]["name"] = [f"{name}.{n}" for n, name in enumerate(model["columns"]["name"])]
    model["details"] = model["details"] + [None] * 1386
    open_report(browser, Report("experts", data), tmp_path)
    rows = browser.find_elements(By.CSS_SELECTOR, "#layers .tall tbody tr")
    assert len(rows) == 1000
    assert rows[0].text.startswith(model["columns"]["name"][1399])
    assert "the first 1000" in find(browser, "#layers .tall caption").text
    cell = browser.find_elements(By.CSS_SELECTOR, "[role=gridcell]")[0]
    assert cell.get_attribute("aria-label").endswith("(mean of 100)")
    cell.click()
    options = browser.find_elements(By.CSS_SELECTOR, "#panel select option")
    assert len(options) == 100
    options[99].click()
    assert find(browser, "#panel-title").text == model["columns"]["name"][1386]
    assert "Histograms and curves are kept of the linears" in find(browser, "#panel").text
    assert_quiet(browser)
