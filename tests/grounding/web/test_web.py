"""The page of demo.py --web as it is served: who is let in, what a browser shows, what the command line makes of it."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import demo
from dataset.photos import read_photo
from dataset.scenes import files as scenes_files
from grounding.explain import Answer, Explainer, Grounding, ask, encode, of_word, place
from grounding.load import open_model
from grounding.pictures import overlay
from grounding.web import fragments, layout, request_guard, server
from grounding.web.examples import BEFORE, SHIPPED, SHIPPED_CONFIG, Example, Offer
from grounding.web.request_guard import Gate
from grounding.web.session import Answers, Picture, Reply, reduced
from utils import UserError

pytest.importorskip("gradio", reason="the page needs requirements-web.txt")
httpx = pytest.importorskip("httpx", reason="comes with Gradio")
PHRASE = "the small red triangle"
FORM = "multipart/form-data; boundary=X"
PATIENCE = 120  # seconds to wait for what will come; a machine may be slow, and it is no test of speed
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")  # of what it uses
CROSS_ATTENTION = "text_encoder.bert.encoder.layer.3.crossattention.self.query.weight"


class Site(NamedTuple):
    """A page that is served: its address, folder and answers, the scene that is its example, and its models by name."""

    url: str
    folder: Path
    scene: Path
    explainers: dict[str, Explainer]
    answers: Answers


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The shipped model before AMC, and the same with other cross-attention."""
    folder = tmp_path_factory.mktemp("web")
    scenes_files.generate(folder / "scenes", seed=0, train=1, annotated=1, evaluation=1)
    weights = load_file(SHIPPED)
    noise = torch.randn(weights[CROSS_ATTENTION].shape, generator=torch.Generator().manual_seed(1))
    save_file({**weights, CROSS_ATTENTION: weights[CROSS_ATTENTION] + 0.2 * noise}, folder / "changed.safetensors")

    def open_offer(offer: Offer) -> Any:
        return open_model(offer.checkpoint, offer.config, str(folder / "scenes/text_encoder"), "cpu")

    offers = [Offer(BEFORE, SHIPPED, str(SHIPPED_CONFIG))]
    offers.append(Offer("changed", folder / "changed.safetensors", str(SHIPPED_CONFIG)))
    scene = folder / "scenes/images/100000.jpg"
    examples = [Example("scene 1", scene, (PHRASE,)), Example("cat", scene, ("the cat",), "by its owner, CC0")]
    explainers = {offer.name: open_offer(offer).explainer() for offer in offers}
    answers = Answers(offers, open_offer)
    with server.running(answers, examples) as url:
        yield Site(url.rstrip("/"), Path(os.environ["GRADIO_TEMP_DIR"]), scene, explainers, answers)


def expected(site: Site, model: str, word: int = 0, threshold: float = 0.5) -> tuple[Grounding, bytes]:
    """What a model finds in the scene, computed directly, and its picture."""
    image, explainer = read_photo(site.scene), site.explainers[model]
    (answer,) = ask(explainer, encode(explainer, image), [PHRASE])
    found = place(of_word(answer, word - 1) if word else answer, image.height, image.width, threshold)
    return found, overlay.png(overlay.overlay(image, found, side=fragments.SIDE))


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
    for event in ("dragenter", "dragover", "drop"):
        page.get_by_label("Click to upload or drop files").dispatch_event(event, {"dataTransfer": files})


def visit(program: str, site: Site, folder: Path) -> None:
    """Use the page as people do, and look at what it shows."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * PATIENCE)  # its own is 5 seconds, whatever the page's is
    requests: list[str] = []
    errors: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=ARGUMENTS.split())
        page = chromium.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        page.set_default_timeout(1000 * PATIENCE)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(site.url)
        expect(page.get_by_label("Layer")).to_have_value("3 (usual)")
        expect(page.get_by_text("nothing of photographs")).to_contain_text(f"{BEFORE} and changed: trained on")
        expect(page.get_by_text("by its owner, CC0")).to_be_visible()

        # nothing is asked of nothing; what is no picture is said to be none
        page.get_by_role("button", name="Show").click()
        expect(page.get_by_role("alert")).to_have_text("choose a picture first")
        page.get_by_label("Phrases").fill(PHRASE)
        upload = page.locator("input[type=file]")
        upload.set_input_files({"name": "bad.png", "mimeType": "image/png", "buffer": b"<html>"})
        expect(page.get_by_text("bad.png: not an image, or of another kind")).to_be_visible()
        for way in (choose, drop):  # in words of ours, and the box stays as it was
            way(page, 10 * 2**20 + 1)
            expect(page.get_by_text("large.png: 10.1 MB, and at most 10 MB are read; save it as JPEG")).to_be_visible()
            expect(page.get_by_text("bad.png")).to_be_hidden()
            way(page, 10)
            expect(page.get_by_text("large.png: not an image")).to_be_visible()
            expect(page.get_by_text("at most 10 MB are read")).to_have_count(0)
        assert not page.get_by_text("Error", exact=True).count()

        # two models side by side
        upload.set_input_files(site.scene)
        for model in site.explainers:
            found, content = expected(site, model)
            shown = picture(page, f"map of {PHRASE}, {model}")
            assert np.array_equal(pixels(shown), pixels(content)), model
            caption = page.locator("figcaption", has_text=f"match probability {found.match:.3f}")
            expect(caption).to_contain_text(f"{model}: ")
            expect(caption).to_contain_text(f"best box [{', '.join(map(str, found.boxes[0].box))}]")
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(page.get_by_text(re.compile(r"pictures \d+\.\d\d s"))).to_contain_text(re.compile(r"image \d+\.\d\d s"))
        expect(page.get_by_text("100000.jpg · 84 x 112 pixels").first).to_be_visible()
        drawn = page.get_by_alt_text(f"map of {PHRASE}, changed")
        drawn.evaluate("image => image.decode()")  # what is not decoded yet is not on the screen
        on_screen = pixels(drawn.screenshot())
        height, width = on_screen.shape[:2]
        wanted = Image.open(io.BytesIO(expected(site, "changed")[1])).convert("RGB").resize((width, height))
        assert np.abs(on_screen - np.asarray(wanted, np.float64)).mean() < 6
        assert min(width, height) > 300

        # a word, a threshold, a picture to keep
        page.get_by_role("radio", name="red", exact=True).check()
        alt = f"map of red (in: {PHRASE}), {BEFORE}"
        assert np.array_equal(pixels(picture(page, alt)), pixels(expected(site, BEFORE, 4)[1]))
        page.get_by_label("number input for Threshold").fill("0.8")
        page.get_by_label("number input for Threshold").press("Enter")
        found, content = expected(site, BEFORE, 4, 0.8)
        expect(
            page.locator("figcaption", has_text=f"best box [{', '.join(map(str, found.boxes[0].box))}]")
        ).to_have_count(1)
        assert np.array_equal(pixels(picture(page, alt)), pixels(content))
        with page.expect_download() as download:
            page.locator("figure", has=page.get_by_alt_text(alt)).get_by_text("download PNG").click()
        assert download.value.suggested_filename == "100000_the-small-red-triangle_red_stage-1-before-amc.png"
        download.value.save_as(folder / "kept.png")
        assert np.array_equal(pixels((folder / "kept.png").read_bytes()), pixels(content))

        # an example brings its phrases; another mode has other layers and no words
        page.get_by_label("Thumbnail 2 of 2").click()
        picture(page, "map of the cat, changed")
        expect(page.get_by_label("Phrases")).to_have_value("the cat")
        page.get_by_role("radio", name="itc").check()
        expect(page.get_by_role("radio", name="cat", exact=True)).to_have_count(0)
        page.get_by_label("Layer").click()
        expect(page.get_by_role("option")).to_have_text([f"✓ {layer}" for layer in ("0", "1", "2", "3 (usual)")])

        # what is pressed while an answer is under way is answered as well
        page.keyboard.press("Escape")
        page.get_by_role("radio", name="itm").check()
        page.get_by_role("radio", name="cat", exact=True).wait_for()

        def busy(*actions: Callable[[], None]) -> None:
            with site.answers.lock:
                for action in actions:
                    action()
                    page.wait_for_timeout(200)

        def press(role: str, name: str) -> Callable[[], None]:
            return lambda: page.get_by_role(role, name=name, exact=True).click()

        def write(phrase: str) -> Callable[[], None]:
            return lambda: page.get_by_label("Phrases").fill(phrase)

        def thumbnail(number: int) -> Callable[[], None]:
            return lambda: page.get_by_label(f"Thumbnail {number} of 2").click()

        busy(press("radio", "the"), press("radio", "cat"))
        picture(page, "map of cat (in: the cat), changed")
        show = press("button", "Show")
        busy(write("a star"), show, write("a circle"), show)
        picture(page, "map of a circle, changed")
        busy(thumbnail(2), thumbnail(1))
        picture(page, f"map of {PHRASE}, changed")
        expect(page.get_by_label("Phrases")).to_have_value(PHRASE)
        page.get_by_label("Thumbnail 2 of 2").click()
        picture(page, "map of the cat, changed")
        busy(press("radio", "itc"), press("radio", "itm"), press("radio", "itc"))
        expect(page.get_by_label("Layer")).to_have_value("3 (usual)")
        page.get_by_label("Layer").click()
        expect(page.get_by_role("option")).to_have_text([f"✓ {layer}" for layer in ("0", "1", "2", "3 (usual)")])

        # long words and high pictures stay within the page
        page.keyboard.press("Escape")
        high = Image.new("RGB", (10, 1000))
        high.save(folder / "high.png")
        page.get_by_label("Phrases").fill("x" * 300)
        upload.set_input_files(folder / "high.png")
        page.get_by_text("high.png · 10 x 1000 pixels").nth(1).wait_for()
        box = page.locator(".amc-row .amc-plain img").bounding_box()
        assert box is not None
        assert box["height"] <= 800
        label = page.get_by_text("x" * 300, exact=True).first.bounding_box()
        assert label is not None
        assert label["width"] < 1280
        page.get_by_label("Thumbnail 2 of 2").click()
        picture(page, "map of the cat, changed")

        # a narrow window; nobody else is asked for anything
        page.keyboard.press("Escape")
        page.set_viewport_size({"width": 420, "height": 900})
        page.wait_for_function("document.documentElement.scrollWidth <= 420")  # scripts lay out some of it, later
        box = page.get_by_alt_text("map of the cat, changed").bounding_box()
        assert box is not None
        assert box["width"] > 280  # below each other
        page.screenshot(path=folder / "narrow.png")
        chromium.close()
    assert not errors
    assert {url for url in requests if not url.startswith((f"{site.url}/", "data:", "blob:"))} == set()
    assert len(requests) > 10


def test_the_page_in_a_browser(site: Site, tmp_path: Path) -> None:
    program = browser()
    with ThreadPoolExecutor(1) as pool:  # playwright's loop is for a thread of its own
        pool.submit(visit, program, site, tmp_path).result()


def test_a_browser_can_be_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("AMC_REQUIRE_BROWSER", "1")
    with pytest.raises(AssertionError, match="apt-get install chromium"):
        browser()
    monkeypatch.setenv("AMC_REQUIRE_BROWSER", "")
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        browser()


# ---- who is let in


def test_no_file_of_the_server_is_served(site: Site) -> None:
    (thumbnail, *_) = site.folder.rglob("*.webp")
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        assert client.get(f"/gradio_api/file={thumbnail}").status_code == 200
        secrets = ["/etc/passwd", "README.md", str(Path("README.md").resolve()), str(SHIPPED.resolve())]
        secrets += [f"{site.folder}/../{site.folder.name}x", f"{site.folder}/%2e%2e/%2e%2e/etc/passwd", str(site.scene)]
        for path in [*secrets, "http://127.0.0.1/", "https://example.com/x.png"]:
            for way in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"):
                assert client.get(f"{way}{path}").status_code in (403, 404), (way, path)
        for path in ("/gradio_api/proxy=http://x.hf.space/", "/monitoring", "/docs", "/gradio_api/info", "/login"):
            assert client.get(path).status_code == 404, path
        for path in ("/gradio_api/run/answer", "/gradio_api/call/answer", "/gradio_api/process_recording", "/"):
            assert client.post(path, json={"data": []}).status_code == 404, path
        for name in ("evil.example", "127.0.0.1.evil.example", "evil.example:80"):
            assert client.get("/", headers={"Host": name}).status_code == 403
        assert client.get("/", headers={"Host": "localhost:1"}).status_code == 200
        assert client.post("/gradio_api/queue/join", content=b" " * 1_000_001).status_code == 413
        assert client.post("/gradio_api/queue/join", content=iter([b"{}"])).status_code == 411
        for path in ("https://example.com/x.png", "\\u0068ttp://127.0.0.1:1/", "file:///etc/passwd"):  # to be fetched
            body = f'{{"data": [[{{"path": "{path}", "meta": {{"_type": "gradio.FileData"}}}}], ""], "fn_index": 1}}'
            assert client.post("/gradio_api/queue/join", content=body).status_code == 403, path
        many = [("files", (f"{k}.png", bytes(5_000_000))) for k in range(3)]
        assert client.post("/gradio_api/upload", files=many).status_code == 413


def call(client: httpx.Client, name: str, data: list[Any], **more: Any) -> dict[str, Any]:
    """Call a function of the page, with data of one's own; returns how it ended."""
    (function,) = [one["id"] for one in client.get("/config").json()["dependencies"] if one["api_name"] == name]
    body = {"data": data, "fn_index": function, "session_hash": secrets.token_hex(8), **more}
    content = json.dumps(body)  # httpx would refuse lone surrogates
    headers = {"Content-Type": "application/json"}
    client.post("/gradio_api/queue/join", content=content, headers=headers).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": body["session_hash"]}) as lines:
        for line in lines.iter_lines():
            event = json.loads(line.removeprefix("data:") or "{}")
            if event.get("msg") == "process_completed":
                return event
    raise AssertionError("the event did not end")


def upload_event(client: httpx.Client, path: str) -> dict[str, Any]:
    """Call what the page calls after an upload, with a path of one's own; returns how it ended."""
    return call(client, "upload", [{"path": path, "meta": {"_type": "gradio.FileData"}}, ""])


def test_an_upload_is_read_and_deleted_and_nothing_else_is(site: Site) -> None:
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        (path,) = client.post("/gradio_api/upload", files={"files": ("a.jpg", site.scene.read_bytes())}).json()
        assert Path(path).is_file()
        assert Path(path).is_relative_to(site.folder)
        event = upload_event(client, path)
        assert event["success"]
        key, shown, file, said = event["output"]["data"]
        assert (key, file, said) == (None, None, "")  # the key stays on the server
        assert "a.jpg · 84 x 112 pixels" in json.dumps(shown, ensure_ascii=False)
        assert not Path(path).exists()
        for other in ("/etc/passwd", str(site.scene), str(Path("LICENSE").resolve()), f"{site.folder}/../x"):
            event = upload_event(client, other)
            assert not event["success"], other
            assert "Traceback" not in json.dumps(event)
        assert site.scene.is_file()


@pytest.mark.parametrize("way", ["by its path", "by its content"])
def test_the_pictures_of_examples_stay(way: str, site: Site) -> None:
    (thumbnail, *_) = site.folder.rglob("*.webp")
    content = thumbnail.read_bytes()
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        path = str(thumbnail)
        if way == "by its content":  # as someone does who saves it from the page
            (path,) = client.post("/gradio_api/upload", files={"files": (thumbnail.name, content)}).json()
        said = upload_event(client, path)["output"]["data"][3]
        assert ("only uploads of this page are read" in said) == (way == "by its path")
        assert client.get(f"/gradio_api/file={thumbnail}").content == content


def test_each_upload_is_of_its_visitor_alone(site: Site) -> None:
    """The same file twice, as by a class that tries one picture."""
    content = site.scene.read_bytes()
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        paths = [client.post("/gradio_api/upload", files={"files": ("a.jpg", content)}).json()[0] for _ in range(2)]
        uploads = site.folder / "uploads"
        for guess in (str(uploads), f"{uploads}/0/a.jpg", f"{uploads}/../uploads"):
            assert upload_event(client, guess)["output"]["data"][3]
            assert all(Path(path).is_file() for path in paths), guess
        for path in paths:
            assert client.get(f"/gradio_api/file={path}").status_code == 404  # nobody's is served
            assert "a.jpg · 84 x 112" in json.dumps(upload_event(client, path), ensure_ascii=False)
            assert not Path(path).exists()
        said = upload_event(client, paths[0] + "?")["output"]["data"][3]
        assert "no longer kept; upload it again" in said
    assert not list(uploads.iterdir())


def form(*parts: bytes, end: bytes = b"--X--\r\n") -> bytes:
    return b"".join(b"--X\r\nContent-Disposition: form-data; " + part + b"\r\n\r\nabc\r\n" for part in parts) + end


@pytest.mark.parametrize(
    ("body", "kind", "good"),
    [
        (form(b'name="files"; filename="a"'), "text/plain", False),
        (form(b'name="files"; filename="a"'), "multipart/form-data", False),  # without a boundary
        (form(b'name="files"'), FORM, False),  # no file
        (form(b'name="other"; filename="a"'), FORM, False),
        (form(b'name="files"; filename="a"', end=b"--"), FORM, False),  # cut off
        (form(b'name="files"; filename=".."'), FORM, False),
        (form(*[b'name="files"; filename="%d"' % number for number in range(21)]), FORM, False),
        (form(*[b'name="files"; filename="%d"' % number for number in range(20)]), FORM, True),  # all that were dropped
        (form(b'name="files"; filename="' + b"a" * 7000 + b'"'), FORM, False),
        (form(b'name="files"; filename="\\ud800"'), f"{FORM}; charset=unicode_escape", False),
        (form(b'name="files"; filename="' + b"a" * 999 + b'"'), FORM, True),
        (form(b'name="files"; filename="\x1b]0;x\x07\xc2\x9b.png"'), FORM, True),
    ],
)
def test_uploads_of_odd_form(body: bytes, kind: str, good: bool, site: Site) -> None:
    """None leaves a file behind, whatever Gradio's parser makes of it."""
    before = {path for path in site.folder.rglob("*") if path.is_file()}
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        answer = client.post("/gradio_api/upload", content=body, headers={"Content-Type": kind})
        assert answer.status_code in ((200,) if good else (400, 413))
        for path in answer.json()[:1] if good else []:
            assert "not an image" in upload_event(client, path)["output"]["data"][3]
    assert {path for path in site.folder.rglob("*") if path.is_file()} == before


def test_uploads_that_nobody_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_guard, "KEPT_UPLOADS", 3)
    made = [request_guard.make_room(tmp_path / "uploads") for _ in range(5)]
    assert [place.is_dir() for place in made] == [False, False, True, True, True]
    assert len({place.name.partition("-")[2] for place in made}) == 5
    monkeypatch.setattr(request_guard, "OLDEST_UPLOAD", -1)
    request_guard.make_room(tmp_path / "uploads")
    assert not any(place.is_dir() for place in made)


def test_markup_and_escapes_in_what_visitors_send(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    nasty = "<img src=x onerror=alert(1)>\"'&"
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        for content in (site.scene.read_bytes(), b"no image"):
            (path,) = client.post("/gradio_api/upload", files={"files": (f"{nasty}\x1b[2J.png", content)}).json()
            shown = json.dumps(upload_event(client, path))
            assert "<img src=x" not in shown
            assert "\\u001b" not in shown
        assert not upload_event(client, "/etc/passwd\x1b[2J\x9b\ud800")["success"]
    shown = "".join(capfd.readouterr())
    assert "/etc/passwd [2J" in shown  # Gradio logs it
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)


def raw(site: Site, head: str, body: bytes = b"") -> int:
    """The status of a request as it is written here."""
    address = ("127.0.0.1", int(site.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=PATIENCE) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)
        return int(connection.recv(100).split()[1])


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET / HTTP/1.1\nHost: localhost", 200),
        ("HEAD / HTTP/1.1\nHost: localhost", 200),
        ("GET / HTTP/1.1\nHost: localhost\nOrigin: http://[::1", 200),  # a link
        ("GET /config HTTP/1.1\nHost: localhost\nOrigin: http://[::1", 403),
        ("GET / HTTP/1.0\nOrigin: http://evil.example", 403),
        ("OPTIONS /gradio_api/upload HTTP/1.1\nHost: x\nOrigin: http://x\nAccess-Control-Request-Method: POST", 403),
        ("OPTIONS /gradio_api/upload HTTP/1.1\nHost: localhost", 404),
        ("PUT /gradio_api/upload HTTP/1.1\nHost: localhost\nContent-Length: 0", 404),
        ("GET /gradio_api/file=%00 HTTP/1.1\nHost: localhost", 400),
        ("GET /gradio_api/heartbeat/%1b HTTP/1.1\nHost: localhost", 400),
        ("GET /config HTTP/1.1\nHost: localhost\nX-Forwarded-Host: a\x1bb", 400),
        (f"GET /assets/{'a' * 300} HTTP/1.1\nHost: localhost", 404),
        (f"GET /config?{'a' * 3000} HTTP/1.1\nHost: localhost", 414),
        ("POST /gradio_api/cancel HTTP/1.1\nHost: localhost\nContent-Length: 99999999999999999999", 413),
        ("POST /gradio_api/cancel HTTP/1.1\nHost: localhost", 411),
        ("POST /gradio_api/cancel HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked", 411),
        ("POST /gradio_api/cancel HTTP/1.1\nHost: localhost\nContent-Length: 9\nTransfer-Encoding: chunked", 411),
    ],
)
def test_requests_as_no_browser_sends_them(head: str, status: int, site: Site) -> None:
    assert raw(site, head) == status


def test_odd_ranges_of_a_file(site: Site) -> None:
    (thumbnail, *_) = site.folder.rglob("*.webp")
    for value in ("bytes=1-2-3", "bytes=9999999-1"):
        assert raw(site, f"GET /gradio_api/file={thumbnail} HTTP/1.1\nHost: localhost\nRange: {value}") == 200


@pytest.mark.parametrize("index", [-1, 2, "x", None, [0], 1.0, {"a": 1}])
def test_examples_that_there_are_not(index: Any, site: Site) -> None:
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        event = call(client, "example", [], event_data={"index": index, "value": None})
        assert "there is no such example" in event["output"]["data"][2]


@pytest.mark.parametrize(
    "change",
    [
        {"fn_index": 999},
        {"fn_index": None},
        {"fn_index": "1"},
        {"session_hash": None},
        {"session_hash": "a/b"},
        {"session_hash": "x" * 101},
        {"data": {}},
        {"data": [[], ""]},
        {"data": [2**64, ""]},
        {"event_data": [[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]},
    ],
    ids=str,
)
def test_calls_that_the_page_does_not_make(change: dict[str, Any], site: Site) -> None:
    usual = {"data": [None, ""], "fn_index": 1, "session_hash": "s"}
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        assert client.post("/gradio_api/queue/join", json=usual | change).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"data": [NaN]}',
        b'{"data": [1e999]}',
        b'{"data": [' + b"9" * 5000 + b"]}",
    ],
    ids=["empty", "list", "no text", "deep", "NaN", "infinite", "long number"],
)
def test_calls_that_are_no_json_of_ours(body: bytes, site: Site) -> None:
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        assert client.post("/gradio_api/queue/join", content=body).status_code == 400


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
        ("[::1]evil.example", 403),
        ("[::1].evil.example:80", 403),
        ("::1", 403),
        ("localhost:80:80", 403),
        ("", 403),
        ("[::1]:7860", None),
        ("[::1]", None),
        ("127.0.0.1:80", None),
        ("LOCALHOST", None),
    ],
)
def test_names_of_this_machine(host: str, status: int | None, tmp_path: Path) -> None:
    scope = {"path": "/", "method": "GET", "headers": [(b"host", host.encode())]}
    assert Gate(None, tmp_path, True, 10).refused(scope) == status  # type: ignore[arg-type]
    assert Gate(None, tmp_path, False, 10).refused(scope) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({"host": "a:1"}, False),  # no browser
        ({"host": "a:1", "origin": "http://a:1"}, False),
        ({"host": "LOCALHOST:1", "origin": "https://a:1"}, False),  # a proxy speaks https
        ({"host": "[::1]:1", "origin": "http://[::1]:1"}, False),
        ({"host": "a:1", "origin": "http://up", "sec-fetch-site": "same-origin"}, False),  # a proxy of another name
        ({"host": "a:1", "sec-fetch-site": "none"}, False),
        ({"host": "a:1", "origin": "http://a:2"}, True),
        ({"host": "a:1", "origin": "http://evil.example"}, True),
        ({"host": "a:1", "origin": "http://a:1.evil.example"}, True),
        ({"host": "a:1", "origin": "null"}, True),
        ({"host": "", "origin": "null"}, True),
        ({"host": "a:1", "origin": ""}, True),
        ({"host": "a:1", "origin": "http://a:1", "sec-fetch-site": "same-site"}, True),
        ({"host": "a:1", "sec-fetch-site": "cross-site"}, True),
    ],
)
@pytest.mark.parametrize("local", [True, False])
def test_other_sites_are_refused(headers: dict[str, str], foreign: bool, local: bool, tmp_path: Path) -> None:
    given = [(name.encode(), value.replace("a:", "localhost:").encode()) for name, value in headers.items()]
    guard = Gate(None, tmp_path, local, 10)  # type: ignore[arg-type]
    foreign |= local and not headers["host"]

    def status(path: str, method: str) -> int | None:
        scope = {"path": path, "method": method, "headers": [*given, (b"content-length", b"2")]}
        return guard.refused(scope)

    for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/cancel"):
        assert status(path, "POST") == (403 if foreign else None)
    assert status("/config", "GET") == (403 if foreign else None)
    assert status("/", "GET") == (403 if local and not headers["host"] else None)  # a link to the page


class Asked:
    """An application behind the gate, and what reaches it."""

    def __init__(self, folder: Path) -> None:
        self.bodies: list[bytes] = []
        self.gate = Gate(self.answer, folder, False, 10, functions=[1])

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(self, parts: list[bytes], pause: float = 0, scope: dict[str, Any] | None = None, end: Any = None) -> Any:
        """The answer to a call whose body arrives in parts."""
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        messages.append(end or {"type": "http.request"})

        async def receive() -> Any:
            await asyncio.sleep(pause)
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        usual = {"type": "http", "path": request_guard.JOIN, "method": "POST", "headers": [(b"content-length", b"2")]}
        asyncio.run(self.gate(usual | (scope or {}), receive, send))
        assert self.gate.arriving == 0
        return sent[0].get("status", sent[0])


def test_what_arrives_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is said of a body's length: the headers say 2 bytes."""
    behind = Asked(tmp_path)
    call = json.dumps({"data": ["a\x1b[2J\n\x9b"], "fn_index": 1, "session_hash": "s", "x\x07": "é"}).encode()
    assert behind.status([call[:9], b"", call[9:]]) == 200
    (body,) = behind.bodies
    assert json.loads(body) == {"data": ["a [2J\n "], "fn_index": 1, "session_hash": "s", "x ": "é"}
    assert behind.status([b" " * 100_000] * 11) == 413
    assert behind.status([call], pause=0) == 200
    assert behind.status([call], end={"type": "http.disconnect"}) == 400
    monkeypatch.setattr(request_guard, "SLOWEST", 0.02)
    assert behind.status([b" "] * 1000, pause=0.005) == 408
    monkeypatch.setattr(request_guard, "MOST_ARRIVING", 50)
    assert behind.status([b" " * 20] * 3) == 503
    assert len(behind.bodies) == 2


def test_no_web_sockets(tmp_path: Path) -> None:
    behind = Asked(tmp_path)
    assert behind.status([], scope={"type": "websocket"}) == {"type": "websocket.close", "code": 1008}


def test_files_of_the_own_folder_alone(tmp_path: Path) -> None:
    """Without asking Gradio, which would refuse most of these as well."""
    gate = Gate(None, tmp_path / "own", False, 10)  # type: ignore[arg-type]

    def status(path: str) -> int | None:
        return gate.refused({"path": f"/gradio_api/file={path}", "method": "GET", "headers": []})

    assert status(f"{tmp_path}/own/x/a.webp") is None
    for path in ("/etc/passwd", f"{tmp_path}/owner/a.webp", f"{tmp_path}/own/../a.webp", "README.md", "http://x/a", ""):
        assert status(path) == 404, path
    assert status(f"{tmp_path}/own/uploads/x/a.webp") == 404


# ---- the server and its command line


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.delenv("GRADIO_EXAMPLES_CACHE", raising=False)
    before = dict(os.environ)
    with server._environment("/nowhere"):
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert os.environ["GRADIO_TEMP_DIR"] == "/nowhere"
    assert dict(os.environ) == before


def test_a_proxy_is_not_asked_for_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with server.running(Answers([Offer("x", SHIPPED)], pytest.fail), []) as url:
        assert httpx.get(url, timeout=PATIENCE).status_code == 200
        assert os.environ["no_proxy"].startswith("example.org,")
    assert os.environ["no_proxy"] == "example.org"


def test_addresses_that_are_taken(site: Site) -> None:
    taken = int(site.url.rpartition(":")[2])
    before = os.environ["GRADIO_TEMP_DIR"]
    for port in (taken, 80_000):
        with (
            pytest.raises(UserError, match=rf"served at 127\.0\.0\.1, port {port}: that is taken, .* without --port"),
            server.running(Answers([Offer("x", SHIPPED)], pytest.fail), [], port=port),
        ):
            pass
    assert os.environ["GRADIO_TEMP_DIR"] == before
    with server.running(Answers([Offer("x", SHIPPED)], pytest.fail), []) as url:  # the next free one
        assert url.rstrip("/") != site.url
        assert "Examples" not in httpx.get(url, timeout=PATIENCE).text
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        port = int(url.rstrip("/").rpartition(":")[2])
    assert not folder.exists()
    with socket.socket() as closed:
        assert closed.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_stopped_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job ignores it
        "from grounding.web import layout, server; from grounding.web.session import Answers; "
        "from grounding.web.examples import *; "
        "server.serve(Answers([Offer('x', SHIPPED)], None), [], '127.0.0.1', None, layout.Start())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert "stop it with Ctrl-C" in server.stdout.readline()
        assert [path.name.startswith("amc-web-") for path in tmp_path.iterdir()] == [True]
        server.send_signal(number)
        assert server.wait(30) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True), ("localhost", False)])
def test_an_open_address_is_warned_of(
    host: str, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        def wait(self) -> None:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def running(*given: Any) -> Iterator[str]:
        assert given[2:] == (host, 7861, layout.Start())
        yield "http://there/"

    monkeypatch.setattr(server, "running", running)
    monkeypatch.setattr(server.threading, "Event", Interrupted)
    server.serve(Answers([], pytest.fail), [], host, 7861, layout.Start())
    shown = capsys.readouterr().out
    assert ("everyone who reaches this address" in shown) == warned
    assert "http://there/" in shown


def test_options_of_the_command_line(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(server, "serve", lambda *given: calls.append(given))
    changed = site.scene.parents[2] / "changed.safetensors"
    words = ["--web", "--checkpoints", str(SHIPPED), str(changed), "--config", str(SHIPPED_CONFIG), "--device", "cpu"]
    words += ["--text_encoder", str(site.scene.parents[1] / "text_encoder"), "--set", "block_num=4", "--port", "7999"]
    words += ["--gradcam_mode", "itc", "--block_num", "2", "--threshold", "0.3", "--colormap", "cividis"]
    demo.main(demo.parse_args([*words, "--precision", "bf16", "--benchmark", "flickr", "--host", "0.0.0.0"]))
    ((answers, examples, host, port, start),) = calls
    assert (host, port, start) == ("0.0.0.0", 7999, ("itc", 2, 0.3, "cividis", ""))
    assert {example.name for example in examples} >= {"astronaut", "cat"}
    assert [offer.checkpoint for offer in answers.offers.values()] == [SHIPPED, changed]
    assert answers.layers(changed.name, "itm") == ((2, 3, 4), 4, True)
    assert answers.explain == {"precision": torch.bfloat16}
    assert answers.resize is demo.BENCHMARKS["flickr"].resize
    demo.main(demo.parse_args(["--web", "--checkpoint", str(SHIPPED)]))
    assert list(calls[1][0].offers) == [SHIPPED.name]
    monkeypatch.setattr(demo, "offered", lambda paths, config: [Offer(BEFORE, SHIPPED)])
    demo.main(demo.parse_args(["--web"]))
    assert calls[2][2:4] == ("127.0.0.1", None)
    assert "`make demo` trains one with AMC" in calls[2][4].hint


def test_command_lines_that_do_not_fit_a_page(site: Site) -> None:
    for message, words in {
        "^--web: images and phrases are chosen on the page": ["--web", "x.jpg"],
        "^--checkpoints belongs to --web": ["x.jpg", "dog", "--checkpoints", "a", "b"],
        "^--colormap nope": ["--web", "--colormap", "nope"],
        "^the threshold is a share .* not 7.0": ["--web", "--threshold", "7"],
        "^none.pth: no such checkpoint": ["--web", "--checkpoints", "none.pth"],
        f"^--block_num 9: {SHIPPED.name} has no layer 9 in mode itm, only 2, 3, 4$": [
            *("--web", "--checkpoint", str(SHIPPED), "--block_num", "9"),
            *("--text_encoder", str(site.scene.parents[1] / "text_encoder"), "--device", "cpu"),
        ],
    }.items():
        with pytest.raises(UserError, match=message):
            demo.main(demo.parse_args(words))


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """demo.py starts without Gradio, and says how to get it when it is needed."""
    code = (
        f"import runpy, sys; sys.modules['gradio'] = None; sys.argv = ['demo.py', '--web', '--checkpoint', '{SHIPPED}']"
    )
    code += "; runpy.run_path('demo.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: the page needs Gradio")
    assert done.stderr.strip().endswith("pip install -r requirements-web.txt")


# ---- parts of the page


def made_up(name: str, words: tuple[str, ...] = ()) -> Reply:
    """A reply to one phrase, whose map has one hot cell, and words of their own."""
    from grounding.explain import WordMap

    small = np.zeros((3, 4), np.float32)
    small[1, 2] = 1
    maps = tuple(WordMap(word, (word,), small / len(words), 1 / len(words)) for word in words)
    return Reply(name, [Answer("P", "p", 0.25, small, maps)], [], {})


def chosen(name: str, image: Image.Image) -> Picture:
    return Picture("k", name, image, reduced(image))


def test_markup_is_text(site: Site) -> None:
    nasty = "<img src=x onerror=alert(1)>\"'"
    shown = chosen(f"{nasty}.png", read_photo(site.scene))
    replies = [made_up(nasty, ("[CLS]", nasty)), Reply(nasty, [nasty], [], {})]
    parts = [fragments.row(shown, replies, 0, choice, 0.5, "viridis") for choice in (0, 2)]
    parts += [fragments.shown_picture(shown, nasty), fragments.note(nasty), fragments.message(nasty)]
    for part in parts:
        assert "<img src=x" not in part
        assert "&lt;img src=x onerror=alert(1)&gt;" in part


def test_words_are_those_of_the_first_model_that_answers(site: Site) -> None:
    shown = chosen("a.b.png", read_photo(site.scene))
    failed = Reply("broken", ["cannot be opened"], [], {})
    replies = [failed, made_up("one", ("[CLS]", "red")), made_up("two", ("[CLS]", "blue"))]
    assert fragments.word_choices(replies, 0) == [("whole phrase", 0), ("[CLS]", 1), ("red", 2)]
    assert fragments.word_choices([failed], 0) == [("whole phrase", 0)]
    html = fragments.row(shown, replies, 0, 2, 0.5, "viridis")
    assert html.count("data:image/png") == 2  # the picture and one map
    assert "50% of the phrase&#x27;s map" in html or "50% of the phrase's map" in html
    assert "this model has no map of &#x27;red&#x27; in &#x27;p&#x27;" in html
    assert "cannot be opened" in html
    assert 'download="a-b_p_red_one.png"' in html
    assert html.count("match probability 0.250") == 1


def test_colours_and_boxes_of_a_row(site: Site) -> None:
    shown = chosen("a.png", read_photo(site.scene))
    rows = {name: fragments.row(shown, [made_up("one")], 0, 0, 0.5, name) for name in ("viridis", "jet")}
    assert rows["viridis"] != rows["jet"]
    small = np.eye(6, 12, dtype=np.float32) + np.eye(6, 12, 6, dtype=np.float32)
    small[::2] = small[:, ::2] = 0
    many = Reply("one", [Answer("P", "p", 0.25, small, ())], [], {})
    html = fragments.row(shown, [many], 0, 0, 0.5, "jet")
    assert "; others [" in html
    assert " and 3 more" in html
    none = Reply("one", [Answer("P", "p", 0.25, np.zeros((3, 3), np.float32), ())], [], {})
    assert "no box: the map is 0 everywhere" in fragments.row(shown, [none], 0, 0, 0.5, "jet")
    broken = Reply("one", [Answer("P", "p", 0.25, np.full((3, 3), np.nan, np.float32), ())], [], {})
    assert "values that are not numbers" in fragments.row(shown, [broken], 0, 0, 0.5, "jet")


def test_a_large_picture_is_shown_reduced() -> None:
    image = Image.effect_noise((3000, 1500), 90).convert("RGB")
    html = fragments.shown_picture(chosen("a.png", image), "someone, CC0")
    assert "3000 x 1500 pixels · someone, CC0" in html
    content = base64.b64decode(html.partition("base64,")[2].partition('"')[0])
    assert Image.open(io.BytesIO(content)).size == (640, 320)
    assert image.size == (3000, 1500)
