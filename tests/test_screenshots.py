# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The pages that people look at, in a real browser: `make screenshots` saves them in outputs/screenshots."""

import os
import socket
from pathlib import Path

import pytest
from helpers.analysis import make_image
from helpers.browser import SCREENS, check_page, chromium, open_browser, save_screenshot
from helpers.evaluation import work  # noqa: F401 - fixture

from vtlmm.analysis.app import IMAGE_FEATURES, OTHER_IMAGE, PSEUDO_IMAGE_FEATURES, build_page, launch
from vtlmm.analysis.visual_token_files import save_visual_tokens
from vtlmm.analysis.visual_token_page import CELL
from vtlmm.evaluation.report import SAMPLES_FILE, write_report
from vtlmm.inference.loading import load_model


pytest.importorskip("selenium", reason="the extra `screenshots` is not installed: run `make screenshots`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="Chromium is not installed: apt-get install chromium-driver"),
]
WAIT = 60  # seconds
FOLDER = Path(os.environ.get("SCREENSHOTS", "outputs/screenshots"))


@pytest.fixture(scope="module", params=SCREENS)
def screen(request):
    return request.param


@pytest.fixture(scope="module")
def browser(screen):
    with open_browser(screen) as started:
        yield started


@pytest.fixture(scope="module")
def model_and_processor(work):
    return load_model(work / "model0")


@pytest.fixture(scope="module")
def address(model_and_processor, tmp_path_factory):
    """Serve the app and return its address."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("examples")
    examples = []
    for i, question in enumerate(("what is in the image ?", "is it red ?", "is it blue ?")):
        make_image(i, 56).save(folder / f"{i}.png")
        examples.append((str(folder / f"{i}.png"), question))
    page = build_page(*model_and_processor, "tiny", max_new_tokens=8, examples=examples)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch(page, "127.0.0.1", port, prevent_thread_lock=True)
    yield f"http://127.0.0.1:{port}"
    page.close()


def wait_for(browser, condition):
    """Wait until a function of the browser returns something true, and return it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, WAIT).until(condition)


def find(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def wait_for_element(browser, selector: str):
    return wait_for(browser, lambda b: next((e for e in find(b, selector) if e.is_displayed()), None))


def click(browser, element) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def click_patch(browser, drawing, row: int, column: int, side: int) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", drawing)
    size = drawing.size
    right, down = (int(size[name] * ((i + 0.5) / side - 0.5)) for name, i in (("width", column), ("height", row)))
    ActionChains(browser).move_to_element_with_offset(drawing, right, down).click().perform()


def check_viewer(browser) -> None:
    """Choose patches by click and arrow keys, and switch what is shown on the image."""
    from selenium.webdriver.common.keys import Keys

    drawing, panel = find(browser, ".viewer svg")[0], find(browser, ".panel")[0]
    widest = "return Math.max(...[...document.querySelectorAll('svg text')].map(text => text.getBBox().width))"
    assert browser.execute_script(widest) <= CELL, "a word is wider than its patch"
    click_patch(browser, drawing, 1, 0, 2)
    assert panel.get_attribute("data-patch") == "2" and "Patch in row 2, column 1" in panel.text
    assert len(find(browser, ".viewer")[0].find_elements("css selector", ".bars")) == 3
    for key, patch in ((Keys.ARROW_RIGHT, "3"), (Keys.ARROW_RIGHT, "3"), (Keys.ARROW_UP, "1"), (Keys.ARROW_LEFT, "0")):
        drawing.send_keys(key)
        assert panel.get_attribute("data-patch") == patch
    for mode, words, scale in (("entropy", False, True), ("none", False, False), ("words", True, False)):
        click(browser, find(browser, f"input[value={mode}]")[0])
        assert find(browser, ".words text")[0].is_displayed() == words
        assert find(browser, ".scale")[0].is_displayed() == scale


def test_tokens_page(browser, screen, model_and_processor, tmp_path):
    pytest.importorskip("matplotlib")
    save_visual_tokens(*model_and_processor, tmp_path, images=[make_image(i) for i in range(2)])
    browser.get((tmp_path / "tokens.html").as_uri())
    check_page(browser)
    check_viewer(browser)
    save_screenshot(browser, FOLDER / f"tokens_{screen}.png")


def test_app(browser, screen, address):
    browser.get(address)
    example = wait_for_element(browser, "button.example")
    wait_for(browser, lambda b: "No image: answering from text only" in b.find_element("tag name", "body").text)
    check_page(browser)
    save_screenshot(browser, FOLDER / f"app_start_{screen}.png")
    click(browser, example)
    frame = wait_for_element(browser, "iframe")
    wait_for(browser, lambda b: find(b, "textarea")[0].get_attribute("value") == "what is in the image ?")
    browser.switch_to.frame(frame)
    wait_for_element(browser, ".panel h2")
    check_page(browser)
    check_viewer(browser)
    height = browser.execute_script("return document.body.scrollHeight")
    browser.switch_to.default_content()
    assert height <= frame.size["height"], "the frame cuts its content off"
    click(browser, find(browser, ".submit-button")[0])
    wait_for_element(browser, ".message.bot")
    click(browser, browser.find_element("xpath", "//button[contains(., 'Compare what')]"))
    click(
        browser, wait_for(browser, lambda b: b.find_element("xpath", "//button[contains(., 'Answer the question')]"))
    )
    cells = wait_for(browser, lambda b: find(b, ".comparison > div"))
    assert [cell.text.split("\n")[0] for cell in cells] == [IMAGE_FEATURES, PSEUDO_IMAGE_FEATURES, OTHER_IMAGE]
    check_page(browser)
    save_screenshot(browser, FOLDER / f"app_{screen}.png")


def test_evaluation_report(browser, screen, work, tmp_path):
    """Filters, an enlarged image, and an answer that is long and has no space."""
    long = "x" * 4000
    images = {str(i): make_image(i) for i in range(3)}
    questions = [
        {"question": "what ?", "answer": "a cat", "images": [str(i % 3)], "kind": f"kind {i % 2}", "row": i}
        for i in range(6)
    ]
    answers = ["a cat", long, "a dog", "a cat", long + " a", "a cat"]
    results = write_report(
        tmp_path,
        questions,
        questions,
        answers,
        ["a dog"] * 6,
        [0.9, 0.2, 0.6, 0.95, 0.1, 0.7],
        "exact",
        images.__getitem__,
        {"data": "rows.jsonl"},
    )
    assert results["kinds"][-1]["score"] == 0.5
    browser.get((tmp_path / SAMPLES_FILE).as_uri())
    check_page(browser)
    cut = "return [...document.querySelectorAll('article, dd')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert browser.execute_script(cut) == 0, "a text is wider than its card"
    click(browser, find(browser, "summary")[0])
    save_screenshot(browser, FOLDER / f"samples_{screen}.png")
    click(browser, find(browser, "summary")[0])

    def shown():
        cards = [card for card in find(browser, "article") if card.is_displayed()]
        assert find(browser, "#shown")[0].text == ("" if len(cards) == 6 else f"{len(cards)} of 6 shown.")
        return [int(card.get_attribute("id").removeprefix("question-")) for card in cards]

    assert shown() == [0, 1, 2, 3, 4, 5]
    click(browser, find(browser, "#wrong")[0])
    assert shown() == [1, 2, 4]
    find(browser, "#kind option")[1].click()
    assert shown() == [2, 4]
    image, enlarged = find(browser, "#question-2 img")[0], find(browser, "dialog")[0]
    assert not enlarged.is_displayed()
    click(browser, image)
    assert enlarged.is_displayed() and enlarged.rect["width"] > image.rect["width"]
    enlarged.click()
    assert not enlarged.is_displayed()
