"""The page in a real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_accel.compare.page import write_page
from dit_accel.compare.results import Results

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FRAMES, FPS, BIT = 17, 8.0, 12
ROW = "#clip-0-0"
WIDTHS = (1400, 700, 390)

Open = Callable[..., Any]

# The frame number that each visible video shows, read from the squares in its corner, beside its
# clock: what a viewer sees, not what the player says.
SAMPLE = """async ([row, milliseconds]) => {
  const videos = [...document.querySelectorAll(`${row} figure:not([hidden]) video`)];
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [96, 96];
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const number = (video) => {
    pen.drawImage(video, 0, 0, 96, 96);
    const bit = (i) => pen.getImageData(i * BIT + BIT / 2, 96 - BIT / 2, 1, 1).data[0] > 127;
    return [0, 1, 2, 3, 4].reduce((sum, i) => sum + (bit(i) << i), 0);
  };
  const samples = [];
  const end = performance.now() + milliseconds;
  do {
    const takes = videos.filter((video) => video.closest(".take"));
    samples.push({
      times: videos.map((video) => video.currentTime),
      shown: takes.map(number),
      paused: videos.map((video) => video.paused),
    });
    await new Promise(requestAnimationFrame);
  } while (performance.now() < end);
  return samples;
}""".replace("BIT", str(BIT))

CLOCKS = """
  const videos = [...document.querySelectorAll(`${row} figure:not([hidden]) video`)];
  const times = videos.map((video) => video.currentTime);
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; skipped where it or Playwright is not installed."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install -e '.[test]'"
    )
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium, or its path in CHROMIUM")
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox refuses to run as root, as in most containers.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = driver.chromium.launch(executable_path=found, args=options)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Any, page_path: Path) -> Iterator[Open]:
    """Opens the page; at the end nothing may have gone wrong or over the network."""
    contexts, troubles = [], []

    def go(width: int = 1400, height: int = 900, path: Path = page_path, **options: Any) -> Any:
        options.setdefault("reduced_motion", "reduce")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))

        def failed(request: Any) -> None:
            # A clip that is unloaded while it still loads ends its own request.
            if not (request.url.startswith("blob:") and request.failure == "net::ERR_ABORTED"):
                troubles.append(f"failed: {request.url[:80]}, {request.failure}")

        page.on("requestfailed", failed)

        def asked(request: Any) -> None:
            if request.url != path.as_uri() and not request.url.startswith(("blob:", "data:")):
                troubles.append(f"request: {request.url}")

        page.on("request", asked)
        page.goto(path.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert not troubles


def wait_until(page: Any, script: str, value: str = ROW) -> None:
    """Until a script is true. Playwright's own waiting evaluates text, which the page forbids."""
    for _ in range(500):
        if page.evaluate(script, value):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {script}")


def show(page: Any, row: str = ROW) -> None:
    """Bring a row into view and wait until its videos have a picture."""
    page.evaluate("row => document.querySelector(row).scrollIntoView()", row)
    ready = """row => [...document.querySelectorAll(`${row} figure:not([hidden]) video`)]
        .every((video) => video.readyState >= 2 && !video.seeking)"""
    wait_until(page, ready, row)


def wait_for_play(page: Any, row: str = ROW) -> None:
    """Until a row's clips run."""
    wait_until(page, "row => !document.querySelector(`${row} video`).paused", row)


def sample(page: Any, milliseconds: int = 0, row: str = ROW) -> list[dict[str, list]]:
    return page.evaluate(SAMPLE, [row, milliseconds])


def wait_for_frame(page: Any, number: int, row: str = ROW) -> None:
    """Until every clip of a row shows this frame, from 0."""
    for _ in range(200):
        shown = sample(page, 0, row)[-1]["shown"]
        if set(shown) == {number}:
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"expected frame {number}, not {shown}")


def apart(samples: list[dict[str, list]]) -> tuple[float, int]:
    """The largest distance to the first video: of the clocks and of what is shown, in frames.

    The clips run round and round: the first frame is one after the last. A busy machine shows some
    frames late: the worst twentieth of what is shown does not count, all of the clocks do.
    """
    clocks = max(abs(t - s["times"][0]) * FPS for s in samples for t in s["times"])
    steps = [abs(n - s["shown"][0]) for s in samples for n in s["shown"]]
    around = sorted(min(step, FRAMES - step) for step in steps)
    return clocks, around[len(around) * 19 // 20 - 1]


def test_loads_without_errors_or_network(open_page):
    page = open_page()
    assert page.title() == "dit_accel comparison: demo"
    assert page.locator("article.clip").count() == 3
    for row in ("#clip-0-0", "#clip-1-0", "#clip-2-0"):
        show(page, row)
    sizes = page.evaluate("[...document.querySelectorAll('video')].map((v) => v.videoWidth)")
    assert sizes.count(96) >= 3


@pytest.mark.parametrize("choice", ["fast", "*"])
def test_clips_play_in_sync_and_over_the_end(open_page, choice):
    page = open_page()
    page.check(f'[name="profile"][value="{choice}"]')
    show(page)
    page.locator(f"{ROW} .timeline").fill("9")
    wait_for_frame(page, 9)
    page.locator(f"{ROW} .play").click()
    wait_for_play(page)
    samples = sample(page, 1700)
    assert len(samples[0]["times"]) == {"fast": 3, "*": 9}[choice]
    clocks, shown = apart(samples)
    assert clocks < 1
    assert shown <= 1
    frames = [s["shown"][0] for s in samples]
    assert len(set(frames)) >= 8, "the clip runs"
    assert any(b < a for a, b in pairwise(frames)), "and starts again"


def test_clips_that_drift_are_brought_back(open_page):
    page = open_page()
    show(page)
    page.locator(f"{ROW} .play").click()
    for _ in range(3):  # a busy machine may need another round
        wait_until(page, f"row => {{ {CLOCKS} return 0.1 < times[0] && times[0] < 0.4; }}")
        shift = "videos[1].currentTime += 0.7; videos[2].currentTime += 0.08;"
        page.evaluate(f"row => {{ {CLOCKS} {shift} }}", ROW)
        while apart(now := sample(page))[0] > 0.4 and now[0]["times"][0] < 1.2:
            page.wait_for_timeout(20)
        if now[0]["times"][0] < 1.2:  # not by starting again at the end
            return
    raise AssertionError("the clips were not brought back")


def test_quick_choices_end_with_the_last_one(open_page):
    page = open_page()
    show(page)
    names = ["balanced", "fast", "quality", "diffusers-pab", "fast"]
    page.evaluate(
        """names => {
            for (const name of names) document.querySelector(`[value="${name}"]`).click();
        }""",
        names,
    )
    show(page)
    assert len(sample(page)[0]["times"]) == 3
    page.locator(f"{ROW} .timeline").fill("7")
    wait_for_frame(page, 7)


def test_pause_all_and_play_all(open_page):
    page = open_page(reduced_motion="no-preference")
    show(page)
    wait_for_play(page)
    page.get_by_role("button", name="Pause all").click()
    assert all(sample(page)[0]["paused"])
    show(page, "#clip-2-0")
    page.wait_for_timeout(150)
    assert all(sample(page, row="#clip-2-0")[0]["paused"])
    page.get_by_role("button", name="Play all").click()
    wait_for_play(page, "#clip-2-0")


def test_reduced_motion_waits_for_the_reader(open_page):
    page = open_page()
    show(page)
    page.wait_for_timeout(200)
    assert all(sample(page)[0]["paused"])
    page.locator(f"{ROW} .play").click()
    wait_for_play(page)
    page.locator(f"{ROW} .play").click()
    assert all(sample(page)[0]["paused"])


def test_the_timeline_steps_frame_by_frame(open_page):
    page = open_page()
    page.check('[name="profile"][value="balanced"]')
    show(page)
    page.locator(f"{ROW} .timeline").focus()
    for number, key in ((1, "ArrowRight"), (2, "ArrowRight"), (1, "ArrowLeft"), (16, "End")):
        page.keyboard.press(key)
        wait_for_frame(page, number)
    assert page.locator(f"{ROW} output.frame").inner_text() == f"frame {FRAMES} of {FRAMES}"
    page.get_by_role("button", name="Next frame").first.click()
    wait_for_frame(page, 0)
    page.get_by_role("button", name="Previous frame").first.click()
    wait_for_frame(page, FRAMES - 1)
    for _ in range(9):  # faster than seeks are
        page.keyboard.press("Enter")
    wait_for_frame(page, FRAMES - 10)
    page.check('[name="profile"][value="fast"]')  # the frame stays
    wait_for_frame(page, FRAMES - 10)


def wiped(page: Any) -> np.ndarray:
    """What the wipe looks like, [height, width, 3]."""
    box = page.locator(f"{ROW} .wipe").bounding_box()
    picture = Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB")
    return np.asarray(picture).astype(int)


def test_the_wipe_follows_mouse_keyboard_and_touch(open_page):
    page = open_page(has_touch=True)
    page.check('[name="profile"][value="fast"]')
    page.check('[name="view"][value="wipe"]')
    show(page)
    wipe = page.locator(f"{ROW} .wipe input")
    box = wipe.bounding_box()
    assert box["width"] > 400
    value = wipe.input_value

    wipe.focus()
    page.keyboard.press("End")
    assert value() == "100"
    dense = wiped(page)
    page.keyboard.press("Home")
    assert value() == "0"
    fast = wiped(page)
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert value() == "3"
    assert wipe.get_attribute("aria-valuetext") == "3 % of the picture is dense"

    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 20, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.4 * box["width"], middle - 30, steps=4)
    page.mouse.up()
    assert abs(int(value()) - 40) <= 1

    both = wiped(page)
    edge, margin = round(0.4 * both.shape[1]), 30
    inner = slice(8, -8)  # the focus ring and the round corners lie outside
    left, right = slice(8, edge - margin), slice(edge + margin, -8)
    assert np.abs(dense - fast)[inner, 8:-8].max() > 30, "the two differ"
    assert np.abs(both - dense)[inner, left].max() <= 2
    assert np.abs(both - fast)[inner, right].max() <= 2
    assert np.abs(both - fast)[inner, left].max() > 10
    assert np.abs(both - dense)[inner, right].max() > 10

    page.touchscreen.tap(box["x"] + 0.8 * box["width"], middle)
    assert abs(int(value()) - 80) <= 1


def test_views_and_the_difference_map(open_page):
    page = open_page()
    show(page)
    figures = page.locator(f"{ROW} figure:visible")
    names = lambda: [text.split()[0] for text in figures.locator("figcaption").all_inner_texts()]  # noqa: E731
    assert names() == ["dense", "quality", "difference"]
    page.uncheck('[name="difference"]')
    assert names() == ["dense", "quality"]
    page.check('[name="view"][value="wipe"]')
    places = [figure.bounding_box() for figure in figures.all()]
    assert (places[0]["x"], places[0]["y"]) == (places[1]["x"], places[1]["y"])
    page.check('[name="profile"][value="*"]')
    assert names() == ["dense", "quality", "balanced", "fast", "diffusers-pab"]
    assert page.locator('[name="view"][value="wipe"]').is_disabled()
    page.check('[name="difference"]')
    assert figures.count() == 9
    captions = page.locator(f"{ROW} .difference:visible figcaption").all()
    assert len({round(caption.bounding_box()["y"]) for caption in captions}) == 1


def test_links_lead_to_the_worst_clip_and_the_failed_one(open_page):
    page = open_page()
    link = page.locator("table.summary a[data-show='fast']").first
    target = link.get_attribute("href")
    link.click()
    assert page.locator('[name="profile"][value="fast"]').is_checked()
    place = "row => Math.abs(document.querySelector(row).getBoundingClientRect().top - 60) < 60"
    wait_until(page, place, target)
    page.locator(".notice a").click()
    page.check('[name="view"][value="wipe"]')
    failed = page.locator("#clip-2-0")
    assert "OutOfMemoryError" in failed.locator(".missing:visible").inner_text()
    assert not failed.locator(".wipe").is_visible(), "there is nothing to wipe to"
    assert page.locator(f"{ROW} .wipe").is_visible()


def test_plots_tell_their_figures(open_page):
    page = open_page()
    shown = page.locator(".plot:visible")
    assert shown.count() == 1
    point = shown.locator(".point", has_text="fast")
    point.focus()
    text = shown.locator(".readout").inner_text()
    assert text.startswith("fast: ") and "PSNR" in text and " dB (" in text
    page.check('[name="plot"][value="ssim"]')
    assert shown.count() == 1
    shown.locator(".point", has_text="diffusers-pab").locator(".mark").hover()
    assert "diffusers-pab" in shown.locator(".readout").inner_text()
    assert "SSIM" in shown.locator(".readout").inner_text()


def test_maps_tell_their_cells(open_page, compared: tuple[Results, Path]):
    results, _ = compared
    maps = [c.density_map for c in results.clips if c.profile == "balanced" and c.status == "done"]
    cell = sum(each[2][3] for each in maps) / len(maps)
    page = open_page()
    article = page.locator(".profile-maps", has=page.get_by_role("heading", name="balanced"))
    picture = article.locator(".map.density svg")
    told = article.locator(".map.density output")
    picture.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert told.inner_text() == f"blocks.2.attn1, step 4: {float(f'{cell:.4g}'):g}"
    for _ in range(20):
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
    assert told.inner_text() == "blocks.7.attn1, step 12: no value"
    boxes = picture.locator(".cells").bounding_box()
    page.mouse.move(boxes["x"] + 3.5 / 12 * boxes["width"], boxes["y"] + 2.5 / 8 * boxes["height"])
    assert told.inner_text() == f"blocks.2.attn1, step 4: {float(f'{cell:.4g}'):g}"
    page.mouse.move(5, 5)
    assert told.inner_text().startswith("mean ")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(open_page, width):
    page = open_page(width)
    for profile, view in (("fast", "pair"), ("fast", "wipe"), ("*", None)):
        page.check(f'[name="profile"][value="{profile}"]')
        if view:
            page.check(f'[name="view"][value="{view}"]')
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            """() => [...document.querySelectorAll("main *, header *")]
                .filter((e) => e.getClientRects().length)
                .filter((e) => !e.closest(".hidden, thead, pre, .scroll"))
                .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)
                .map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert not outside


COLOURS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !element.getClientRects().length) continue;
    if (element.matches("script, title, desc")) continue;
    const style = getComputedStyle(element);
    const grounds = [];
    for (let e = element; e; e = e.parentElement) grounds.push(getComputedStyle(e).backgroundColor);
    const colour = element.closest("svg") ? style.fill : style.color;
    found.push({ text: text.slice(0, 40), colour, grounds, size: parseFloat(style.fontSize) });
  }
  for (const mark of document.querySelectorAll(".point .mark, .front, button, .choice span")) {
    const style = getComputedStyle(mark);
    if (!mark.getClientRects().length) continue;
    if (mark.closest("label")?.querySelector(":disabled")) continue;
    const drawn = style.stroke !== "none" ? style.stroke : style.fill;
    const colour = mark.closest("svg") ? drawn : style.borderTopColor;
    const grounds = [getComputedStyle(document.body).backgroundColor];
    found.push({ text: `edge of ${mark.className.baseVal ?? mark.textContent}`, colour, grounds });
  }
  return found;
}"""


def rgba(text: str) -> tuple[np.ndarray, float]:
    """A computed colour as channels in [0, 1] and opacity."""
    numbers = [float(each) for each in text[text.index("(") + 1 : -1].replace(",", " ").split()]
    assert text.startswith("rgb"), text
    return np.array(numbers[:3]) / 255, numbers[3] if len(numbers) > 3 else 1.0


def luminance(colour: np.ndarray) -> float:
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(colour: str, grounds: list[str]) -> float:
    """WCAG 2's contrast ratio of a colour on the backgrounds below it, nearest first."""
    below = np.ones(3)
    for ground in reversed(grounds):
        paint, opacity = rgba(ground)
        below = paint * opacity + below * (1 - opacity)
    paint, opacity = rgba(colour)
    pair = sorted(map(luminance, (paint * opacity + below * (1 - opacity), below)))
    return (pair[1] + 0.05) / (pair[0] + 0.05)


def test_contrast_is_computed_as_wcag_says():
    assert contrast("rgb(0, 0, 0)", ["rgb(255, 255, 255)"]) == pytest.approx(21)
    white = ["rgba(0, 0, 0, 0)", "rgb(255, 255, 255)"]
    assert contrast("rgb(119, 119, 119)", white) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out(open_page, scheme):
    page = open_page(color_scheme=scheme)
    page.check('[name="profile"][value="fast"]')
    found = page.evaluate(COLOURS)
    assert len(found) > 200
    grounds = contrast("rgb(255, 255, 255)", [found[0]["grounds"][-2]])
    assert (grounds < 2) == (scheme == "light")
    for each in found:
        least = 4.5 if "size" in each else 3.0
        ratio = contrast(each["colour"], each["grounds"])
        assert ratio >= least, f"{each['text']!r}: {ratio:.2f}"


FOCUSABLE = """() => [...document.querySelectorAll(
    'a[href], button, input, summary, [tabindex="0"]')]
  .filter((e) => e.checkVisibility() && !e.disabled)
  .filter((e) => e.type !== "radio" || e.checked)
  .map((e, index) => (e.dataset.stop = index))"""
FOCUSED = """() => {
  const e = document.activeElement;
  const seen = [e, e.nextElementSibling, e.parentElement, e.querySelector(".halo")];
  const marked = seen.some((each) => {
    const style = each && getComputedStyle(each);
    return style && (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2
      || (each.matches(".halo") && style.stroke !== "rgba(0, 0, 0, 0)"));
  });
  return [e.dataset.stop ?? e.tagName, marked];
}"""


def test_everything_is_reached_by_tab_and_shows_focus(open_page):
    page = open_page()
    page.locator('[name="view"][value="wipe"]').focus()
    page.keyboard.press("Space")
    stops = page.evaluate(FOCUSABLE)
    assert len(stops) > 50
    page.locator("a.skip").focus()
    reached = []
    for _ in stops:
        stop, marked = page.evaluate(FOCUSED)
        assert marked, page.evaluate("document.activeElement.outerHTML.slice(0, 120)")
        reached.append(stop)
        page.keyboard.press("Tab")
    assert sorted(map(int, reached)) == stops
    assert [int(stop) for stop in reached] == stops, "in the order of the page"


def test_controls_and_pictures_have_names(open_page):
    page = open_page()
    page.check('[name="view"][value="wipe"]')
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            role = node["role"]["value"]
            roles.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    for role in ("link", "button", "radio", "checkbox", "slider", "image", "application", "group"):
        names = roles.get(role, [])
        assert role == "group" or names, role
        assert all(names) or role == "group", (role, names)
    assert "Wipe between dense (left) and quality (right)" in roles["slider"]
    assert "PSNR against denoising time" in str(roles)
    assert {"columnheader", "rowheader", "cell"} <= set(roles)


def test_tables_keep_their_roles_as_cards(open_page):
    page = open_page(700)
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert roles.count("rowheader") >= 10
    assert "columnheader" in roles


@pytest.mark.parametrize("width", [420, 1400])
def test_a_row_that_is_not_rated_keeps_the_columns(open_page, compared, tmp_path, width):
    results, _ = compared
    calls = {"dense: below break-even": 96, "dense: profile": 1904}
    clips = [
        replace(clip, calls=calls, video=None, difference=None)
        if clip.profile == "balanced"
        else replace(clip, video=None, difference=None)
        for clip in results.clips
    ]
    page = open_page(width, path=write_page(replace(results, clips=clips), tmp_path))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    rows = page.locator("table.summary tbody tr")
    unrated = rows.nth(2).locator("td")
    assert unrated.count() == 3 and "ran dense" in unrated.first.inner_text()
    density = [rows.nth(row).locator("td").nth(-2).bounding_box() for row in (1, 2)]
    if width == 1400:  # a table: figures stand below each other
        assert density[0]["x"] == density[1]["x"]
        assert density[0]["width"] == density[1]["width"]
    else:  # a card: everything begins at the left edge of its place
        align = "e => [getComputedStyle(e).textAlign, getComputedStyle(e).paddingLeft]"
        assert unrated.nth(1).evaluate(align) == ["left", "0px"]
        assert unrated.first.evaluate(align) == ["left", "0px"]


def test_without_scripts_the_figures_are_there(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("table.summary tbody tr").count() == 5
    assert page.locator(".plot:visible").count() == 4
    assert page.locator(".map:visible").count() == 6
    assert not page.locator(".toolbar").is_visible()
    assert not page.locator(".transport").first.is_visible()
    assert "needs JavaScript" in page.locator("#clips noscript").inner_text()
