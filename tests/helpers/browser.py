# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A real browser for the tests of web pages: Chromium without a window, and what is checked on each page."""

import base64
import shutil
from contextlib import contextmanager
from pathlib import Path


CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Screen: width in pixels, and whether the system is in dark mode
SCREENS = {"desktop": (1280, False), "phone": (390, False), "dark": (1280, True)}
HEIGHT = 900
MIN_CONTRAST = 4.5  # of WCAG 2.1, level AA, for text of normal size
# The colors are painted on a canvas, so that the browser resolves their spaces and transparency
LOW_CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function paint(color) {
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  return canvas.getImageData(0, 0, 1, 1).data;
}
function luminance([r, g, b]) {
  const linear = [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  const nodes = [...element.childNodes].filter(node => node.nodeType === 3);
  const text = nodes.map(node => node.data.trim()).join(" ").trim();
  const visible = element.checkVisibility({opacityProperty: true, visibilityProperty: true});
  if (!text || !visible || element.closest("svg, script, style, [disabled]")) continue;
  paint("white");
  const chain = [];
  for (let e = element; e; e = e.parentElement) chain.unshift(getComputedStyle(e).backgroundColor);
  let behind = chain.map(paint).pop();
  const front = paint(getComputedStyle(element).color);
  const [low, high] = [luminance(behind), luminance(front)].sort((a, b) => a - b);
  const contrast = (high + 0.05) / (low + 0.05);
  if (contrast < arguments[0]) found.push(`${text.slice(0, 40)}: ${contrast.toFixed(2)}`);
}
return found;
"""
# Not `innerWidth`, which grows with the content on a phone
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


def chromium() -> str | None:
    """Return the path of Chromium, or None if it is not installed."""
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


@contextmanager
def open_browser(screen: str):
    """Start Chromium with a window of one of `SCREENS` and close it at the end."""
    from selenium import webdriver

    width, is_dark = SCREENS[screen]
    options = webdriver.ChromeOptions()
    options.binary_location = chromium()
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(option)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield browser
    finally:
        browser.quit()


def check_page(browser) -> None:
    """Check that the page is not wider than the window and that all its text has enough contrast."""
    assert browser.execute_script(OVERFLOW) <= 0, "the page is wider than the window"
    assert browser.execute_script(LOW_CONTRAST, MIN_CONTRAST) == []


def save_screenshot(browser, path: Path) -> None:
    """Save the whole page, also what is below the window."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(image["data"]))
