"""The page of demo.py --web in a browser: what people see and press."""

import base64
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.photos import read_photo
from grounding.explain import Grounding, ask, encode, of_word, place
from grounding.pictures.overlay import overlay
from grounding.pictures.render import png
from grounding.web import fragments
from grounding.web.examples import BEFORE
from tests.grounding.web.conftest import PATIENCE, PHRASE, Site

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::Warning:gradio")]  # of what it uses
LAYERS = [f"✓ {layer}" for layer in ("0", "1", "2", "3 (usual)")]  # of mode itc, as Gradio lists them


def expected(site: Site, model: str, word: int = 0, threshold: float = 0.5) -> tuple[Grounding, bytes]:
    """What a model finds in the scene, computed directly, and its picture."""
    image, explainer = read_photo(site.scene), site.explainers[model]
    (answer,) = ask(explainer, encode(explainer, image), [PHRASE])
    found = place(of_word(answer, word - 1) if word else answer, image.height, image.width, threshold)
    return found, png(overlay(image, found, side=fragments.SIDE))


# ---- in a browser


def browser() -> str:
    """The browser's program; without one the test is skipped, or fails where it must not be (.ci/run)."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"no {', '.join(BROWSERS)} found: apt-get install chromium"
        assert os.environ.get("AMC_REQUIRE_BROWSER") != "1", reason
        pytest.skip(reason)
    return found


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float64)


def picture(page: Any, alt: str) -> bytes:
    """The content of a picture on the page, which is waited for."""
    image = page.get_by_alt_text(alt, exact=True)
    image.wait_for()
    return base64.b64decode(image.get_attribute("src").removeprefix("data:image/png;base64,"))


def choose(page: Any, size: int) -> None:
    """Choose a file of zeros in the upload's dialog."""
    page.locator("input[type=file]").set_input_files(
        {"name": "large.png", "mimeType": "image/png", "buffer": bytes(size)}
    )


def drop(page: Any, size: int) -> None:
    """Drop a file of zeros on the upload's box."""
    code = f"""() => {{
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array({size})], "large.png", {{type: "image/png"}}));
        return files;
    }}"""
    files = page.evaluate_handle(code)
    for event in ("dragover", "drop"):
        page.locator(".amc-upload").dispatch_event(event, {"dataTransfer": files})


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    program = browser()
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * PATIENCE)  # its own is 5 seconds, whatever the page's is
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=ARGUMENTS.split())
        yield started
        started.close()


@pytest.fixture
def page(chromium: Any, site: Site) -> Iterator[Any]:
    """The page as it is when its models are open; no script fails in the test, and no other host is asked."""
    requests: list[str] = []
    errors: list[str] = []
    page = chromium.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page.set_default_timeout(1000 * PATIENCE)
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(site.url)
    page.get_by_text("nothing of photographs").wait_for()
    yield page
    page.close()
    assert not errors
    assert {url for url in requests if not url.startswith((f"{site.url}/", "data:", "blob:"))} == set()
    assert len(requests) > 10


def expect(found: Any) -> Any:
    from playwright.sync_api import expect as expect_of

    return expect_of(found)


def press(page: Any, role: str, name: str) -> None:
    page.get_by_role(role, name=name, exact=True).click()


def options_of_layer(page: Any) -> Any:
    page.get_by_label("Layer").click()
    return page.get_by_role("option")


def test_the_start(page: Any) -> None:
    expect(page.get_by_label("Layer")).to_have_value("3 (usual)")
    expect(page.get_by_text("nothing of photographs")).to_contain_text(f"{BEFORE} and changed: trained on")
    expect(page.get_by_text("by its owner, CC0")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    press(page, "button", "Show")
    expect(page.get_by_text("choose a picture first")).to_be_visible()


@pytest.mark.parametrize("way", [choose, drop])
def test_uploads_that_are_refused(way: Callable[[Any, int], None], page: Any) -> None:
    """A large one is refused before it is sent."""
    way(page, 10 * 2**20 + 1)
    expect(page.get_by_text("large.png: 10.1 MB, and at most 10 MB are read; save it as JPEG")).to_be_visible()
    way(page, 10)
    expect(page.get_by_text("large.png: not an image, or of another kind")).to_be_visible()
    expect(page.get_by_text("at most 10 MB are read")).to_have_count(0)
    press(page, "button", "cat")
    expect(page.get_by_text("large.png")).to_have_count(0)
    assert not page.get_by_text("Error", exact=True).count()


def test_two_models_side_by_side(page: Any, site: Site) -> None:
    site.answers.encodings.values.clear()  # of other tests
    site.answers.answers.values.clear()
    page.get_by_label("Phrases").fill(PHRASE)
    page.locator("input[type=file]").set_input_files(site.scene)
    for model in site.explainers:
        found, content = expected(site, model)
        shown = picture(page, f"map of {PHRASE}, {model}")
        assert np.array_equal(pixels(shown), pixels(content)), model
        caption = page.locator("figcaption", has_text=f"match probability {found.match:.3f}")
        expect(caption).to_contain_text(f"{model}: ")
        expect(caption).to_contain_text(f"best box [{', '.join(map(str, found.boxes[0].box))}]")
    expect(page.get_by_text(re.compile(r"pictures \d+\.\d\d s"))).to_contain_text(re.compile(r"image \d+\.\d\d s"))
    expect(page.get_by_text("100000.jpg · 84 x 112 pixels").first).to_be_visible()
    drawn = page.get_by_alt_text(f"map of {PHRASE}, changed")
    drawn.evaluate("image => image.decode()")  # what is not decoded yet is not on the screen
    page.locator(".pending").first.wait_for(state="detached")
    on_screen = pixels(drawn.screenshot())
    height, width = on_screen.shape[:2]
    wanted = Image.open(io.BytesIO(expected(site, "changed")[1])).convert("RGB").resize((width, height))
    assert np.abs(on_screen - np.asarray(wanted, np.float64)).mean() < 6
    assert min(width, height) > 300


def test_a_word_a_threshold_and_a_picture_to_keep(page: Any, site: Site, tmp_path: Path) -> None:
    press(page, "button", "scene 1")
    press(page, "radio", "red")
    alt = f"map of red (in: {PHRASE}), {BEFORE}"
    assert np.array_equal(pixels(picture(page, alt)), pixels(expected(site, BEFORE, 4)[1]))
    expect(page.get_by_role("radio", name="red", exact=True)).to_have_attribute("aria-checked", "true")
    expect(page.get_by_role("radio", name="whole phrase")).to_have_attribute("aria-checked", "false")
    page.get_by_label("number input for Threshold").fill("0.8")
    page.get_by_label("number input for Threshold").press("Enter")
    found, content = expected(site, BEFORE, 4, 0.8)
    expect(page.locator("figcaption", has_text=f"best box [{', '.join(map(str, found.boxes[0].box))}]")).to_have_count(
        1
    )
    assert np.array_equal(pixels(picture(page, alt)), pixels(content))
    with page.expect_download() as download:
        page.locator("figure", has=page.get_by_alt_text(alt)).get_by_text("download PNG").click()
    assert download.value.suggested_filename == "100000_the-small-red-triangle_red_stage-1-before-amc.png"
    download.value.save_as(tmp_path / "kept.png")
    assert np.array_equal(pixels((tmp_path / "kept.png").read_bytes()), pixels(content))


def test_an_example_brings_its_phrases_and_a_mode_its_layers(page: Any) -> None:
    press(page, "button", "cat")
    picture(page, "map of the cat, changed")
    expect(page.get_by_label("Phrases")).to_have_value("the cat")
    page.get_by_role("radio", name="itc").check()
    expect(page.get_by_role("radio", name="cat", exact=True)).to_have_count(0)  # its maps have no words
    expect(options_of_layer(page)).to_have_text(LAYERS)


def test_what_is_pressed_while_an_answer_is_under_way(page: Any, site: Site) -> None:
    def busy(*actions: Callable[[], None]) -> None:
        with site.answers.lock:
            for action in actions:
                action()
                page.wait_for_timeout(200)

    def pressing(role: str, name: str) -> Callable[[], None]:
        return lambda: press(page, role, name)

    def writing(phrase: str) -> Callable[[], None]:
        return lambda: page.get_by_label("Phrases").fill(phrase)

    press(page, "button", "cat")
    page.get_by_role("radio", name="cat", exact=True).wait_for()
    busy(pressing("radio", "the"), pressing("radio", "cat"))
    picture(page, "map of cat (in: the cat), changed")
    show = pressing("button", "Show")
    busy(writing("a star"), show, writing("a circle"), show)
    picture(page, "map of a circle, changed")
    busy(pressing("button", "cat"), pressing("button", "scene 1"))
    picture(page, f"map of {PHRASE}, changed")
    expect(page.get_by_label("Phrases")).to_have_value(PHRASE)
    press(page, "button", "cat")
    picture(page, "map of the cat, changed")
    busy(pressing("radio", "itc"), pressing("radio", "itm"), pressing("radio", "itc"))
    expect(page.get_by_label("Layer")).to_have_value("3 (usual)")
    expect(options_of_layer(page)).to_have_text(LAYERS)


def test_long_words_and_high_pictures_stay_within_the_page(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (10, 1000)).save(tmp_path / "high.png")
    page.get_by_label("Phrases").fill("x" * 300)
    page.locator("input[type=file]").set_input_files(tmp_path / "high.png")
    page.get_by_text("high.png · 10 x 1000 pixels").nth(1).wait_for()
    assert page.locator(".amc-row .amc-plain img").bounding_box()["height"] <= 800
    assert page.get_by_text("x" * 300, exact=True).last.bounding_box()["width"] < 1280


def test_a_narrow_window(page: Any) -> None:
    press(page, "button", "cat")
    picture(page, "map of the cat, changed")
    page.set_viewport_size({"width": 420, "height": 900})
    page.wait_for_function("document.documentElement.scrollWidth <= 420")  # scripts lay out some of it, later
    assert page.get_by_alt_text("map of the cat, changed").bounding_box()["width"] > 280  # below each other
