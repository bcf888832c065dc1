"""How soon a report can be used: from navigation to the last line of its script, in headless Chromium.

    python benchmarks/report_page.py report.html

Needs chromium, chromedriver and selenium (`pip install '.[dev]'`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from selenium import webdriver

# Milliseconds since navigation; the page is drawn when its script, the last thing in it, has run.
TIMES = """
const [navigation] = performance.getEntriesByType("navigation");
const [paint] = performance.getEntriesByName("first-contentful-paint");
const {domInteractive, domComplete} = navigation;
return {interactive: domInteractive, complete: domComplete, paint: paint ? paint.startTime : null};
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        parser.error("no chromium with its chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    runs = []
    try:
        for _ in range(arguments.rounds):
            browser.get("about:blank")
            browser.get(arguments.page.resolve().as_uri())
            if browser.execute_script("return document.documentElement.dataset.ready") != "true":
                parser.error(f"{arguments.page}: is no report of halfbyte, or its script failed")
            runs.append(browser.execute_script(TIMES))
    finally:
        browser.quit()
    medians = {name: statistics.median(run[name] or 0.0 for run in runs) for name in runs[0]}
    print(f"{arguments.page}: {arguments.page.stat().st_size / 1e6:.2f} MB; medians of {len(runs)}, ms")
    for name, value in medians.items():
        print(f"  {name:12} {value:8.0f}")
    print(json.dumps({"bytes": arguments.page.stat().st_size, "milliseconds": medians, "rounds": runs}))


if __name__ == "__main__":
    main()
