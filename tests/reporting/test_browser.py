"""The page in a real browser: its script runs under its own policy, and every control does what it says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harmoq_ao.reporting import Scene
from tests.reporting.conftest import HOSTILE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: one on PATH, or playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip("no Chromium on PATH, and playwright has none (playwright install chromium)")
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root otherwise
        running = playwright.chromium.launch(executable_path=found, args=as_root)
        yield running
        running.close()


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Any]:
    """The page, opened without a network; whatever it complains about or asks for fails the test."""
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900}, color_scheme="light")
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    tab.locator(".slide output").first.wait_for()
    tab.locator(".frame[style*='width']").nth(1).wait_for()  # the pictures are decoded and set up
    yield tab
    context.close()
    assert not complaints
    assert all(url.startswith(("file:", "data:")) for url in requests)


def at(tab: Any) -> float:
    """Where the divider of the first picture is, in percent of its width."""
    places = "e => { const b = e.parentElement.getBoundingClientRect(), h = e.getBoundingClientRect();"
    share: float = tab.locator(".handle").first.evaluate(f"{places} return 100 * (h.x + 1 - b.x) / b.width; }}")
    return share


def column(tab: Any, index: int) -> list[str]:
    """What a column of the table sorts by, from top to bottom."""
    values: list[str] = tab.locator("#site-table tbody tr").evaluate_all(
        f"rows => rows.map(r => r.cells[{index}].dataset.value)"
    )
    return values


def test_the_divider_follows_pointer_and_keyboard(opened: Any) -> None:
    assert at(opened) == pytest.approx(50, abs=0.5)
    opened.locator(".compare").first.scroll_into_view_if_needed()
    box = opened.locator(".compare").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    opened.mouse.move(box["x"] + 0.5 * box["width"], middle)
    opened.mouse.down()
    opened.mouse.move(box["x"] + 0.2 * box["width"], middle, steps=3)
    opened.mouse.up()
    assert at(opened) == pytest.approx(20, abs=1)
    opened.locator(".divider").first.focus()
    opened.keyboard.press("End")
    assert at(opened) == pytest.approx(100, abs=0.5)
    opened.keyboard.press("ArrowLeft")
    assert 99 < at(opened) < 100
    clip = opened.locator(".compare .before").first.evaluate("e => getComputedStyle(e).clipPath")
    assert "0.5%" in clip


def test_the_frame_chooses_what_is_magnified(opened: Any) -> None:
    lens, frame = opened.locator(".lens").first, opened.locator(".frame").first
    contents, start = [lens.evaluate("c => c.toDataURL()")], frame.bounding_box()
    opened.locator(".zoom").first.press("End")
    assert frame.bounding_box()["width"] < start["width"]
    assert opened.locator(".slide output").first.inner_text() == "16x"
    opened.locator(".map").first.click(position={"x": 2, "y": 2})
    contents.append(lens.evaluate("c => c.toDataURL()"))
    corner = frame.bounding_box()
    for key in ("ArrowRight", "ArrowDown"):
        frame.press(key)
    moved = frame.bounding_box()
    assert moved["x"] > corner["x"]
    assert moved["y"] > corner["y"]
    contents.append(lens.evaluate("c => c.toDataURL()"))
    assert len(set(contents)) == 3


def test_headings_sort_the_table(opened: Any) -> None:
    before = column(opened, 6)
    heading = opened.get_by_role("button", name="SQNR dB")
    heading.click()
    numbers = [float(value) for value in column(opened, 6) if value]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 3
    assert column(opened, 6)[: len(numbers)] == [v for v in column(opened, 6) if v]  # what has none comes last
    heading.click()
    assert [float(value) for value in column(opened, 6) if value] == sorted(numbers, reverse=True)
    assert opened.locator("#site-table th").nth(6).get_attribute("aria-sort") == "descending"
    heading.click()
    assert column(opened, 6) == before
    opened.get_by_role("button", name="site").click()
    assert column(opened, 0) != column(opened, 6)
    assert sorted(column(opened, 0)) == sorted(set(column(opened, 0)))


def test_the_filter_leaves_what_it_names(opened: Any, scene: Scene) -> None:
    rows = scene.model.report().rows
    opened.locator("#filter").fill("<SCRIPT>")
    visible = opened.locator("#site-table tbody tr:visible")
    assert visible.count() == 1
    assert HOSTILE in visible.inner_text()
    opened.locator("#filter").fill("")
    opened.locator("#only").check()
    assert visible.count() == sum(row.quantized for row in rows)
    assert opened.locator("#count").inner_text() == f"{visible.count()} of {len(rows)}"


@pytest.mark.parametrize("width", [320, 390, 768, 1600])
def test_no_width_scrolls_sideways(opened: Any, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    columns = opened.locator(".pair").first.evaluate("e => getComputedStyle(e).gridTemplateColumns.split(' ').length")
    assert columns == (1 if width <= 720 else 2)


def test_colours_follow_the_system_until_they_are_chosen(opened: Any) -> None:
    def background() -> str:
        colour: str = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    light = background()
    opened.emulate_media(color_scheme="dark")
    dark = background()
    assert dark != light
    button = opened.locator("#theme")
    button.click()
    assert (background(), button.inner_text()) == (light, "Colours: light")
    button.click()
    opened.emulate_media(color_scheme="light")
    assert (background(), button.inner_text()) == (dark, "Colours: dark")
    opened.reload()
    assert background() == dark
