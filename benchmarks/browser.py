"""Debian's chromium with its driver, without a window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
_PATIENCE_S = 60.0


class BrowserMissing(Exception):
    """This machine has no chromium, or no chromedriver."""


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser that has never been anywhere. Raises BrowserMissing."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        raise BrowserMissing("no browser: apt-get install chromium chromium-driver")
    options = Options()
    options.binary_location = program
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.set_script_timeout(_PATIENCE_S)
        browser.set_page_load_timeout(_PATIENCE_S)
        yield browser
    finally:
        browser.quit()


def emulate(driver: webdriver.Chrome, width: int, height: int, **features: str) -> None:
    """Size of the window in CSS pixels, and media features as `prefers_color_scheme="dark"`."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": told})
