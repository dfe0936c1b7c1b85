"""The request guard of demo.py --web: which requests it passes on, and what of them."""

import asyncio
import json
import re
import secrets
import socket
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("gradio", reason="the page needs requirements-web.txt")
httpx = pytest.importorskip("httpx", reason="comes with Gradio")

from starlette.exceptions import HTTPException  # noqa: E402 - comes with Gradio
from starlette.requests import Request  # noqa: E402

from dataset.reading import DataError  # noqa: E402
from dataset.scenes.paths import SHIPPED  # noqa: E402
from grounding.web import request_guard  # noqa: E402
from grounding.web.request_guard import JOIN, PICTURE, RequestGuard  # noqa: E402
from grounding.web.server import LOOPBACK  # noqa: E402
from tests.grounding.web.conftest import Site  # noqa: E402

PATIENCE = 120  # seconds to wait for what will come; a machine may be slow, and it is no test of speed
pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")  # of what it uses


# ---- the page that is served


def test_no_file_of_the_server_is_served(site: Site) -> None:
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        secret = ["/etc/passwd", "README.md", str(Path("README.md").resolve()), str(SHIPPED.resolve()), str(site.scene)]
        for path in [*secret, "/x/%2e%2e/%2e%2e/etc/passwd", "http://127.0.0.1/", "https://example.com/x.png"]:
            for way in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"):
                assert client.get(f"{way}{path}").status_code in (403, 404), (way, path)
        for path in ("/gradio_api/proxy=http://x.hf.space/", "/monitoring", "/docs", "/gradio_api/info", "/login"):
            assert client.get(path).status_code == 404, path
        for path in ("run/answer", "call/answer", "process_recording", "upload", "heartbeat/x"):
            assert client.post(f"/gradio_api/{path}", json={"data": []}).status_code == 404, path
        assert client.post("/", json={"data": []}).status_code == 404
        for name in ("evil.example", "127.0.0.1.evil.example", "evil.example:80"):
            assert client.get("/", headers={"Host": name}).status_code == 403
        assert client.get("/", headers={"Host": "localhost:1"}).status_code == 200
        assert client.post(JOIN, content=b" " * 1_000_001).status_code == 413
        assert client.post(JOIN, content=iter([b"{}"])).status_code == 411
        assert client.post(PICTURE, content=bytes(10 * 2**20 + 1)).status_code == 413


@pytest.mark.parametrize("path", ["https://example.com/x.png", "\\u0068ttp://127.0.0.1:1/", "file:///etc/passwd", "x"])
def test_no_call_holds_a_file_to_be_read_or_fetched(path: str, site: Site) -> None:
    file = f'{{"path": "{path}", "meta": {{"_type": "gradio.FileData"}}}}'
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        for data, event in (([f"[{file}]"], "null"), ([file], "null"), ([], f'{{"file": {file}}}')):
            body = f'{{"data": [{", ".join(data)}], "event_data": {event}, "fn_index": 1, "session_hash": "s"}}'
            assert client.post(JOIN, content=body).status_code == 400


def call(client: httpx.Client, name: str, data: list[Any], **more: Any) -> dict[str, Any]:
    """Call a function of the page, with data of one's own; returns how it ended."""
    function = next(one["id"] for one in client.get("/config").json()["dependencies"] if one["api_name"] == name)
    body = {"data": data, "fn_index": function, "session_hash": secrets.token_hex(8), **more}
    content = json.dumps(body)  # httpx would refuse lone surrogates
    client.post(JOIN, content=content, headers={"Content-Type": "application/json"}).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": body["session_hash"]}) as lines:
        for line in lines.iter_lines():
            event = json.loads(line.removeprefix("data:") or "{}")
            if event.get("msg") == "process_completed":
                return event
    raise AssertionError("the event did not end")


def choose(client: httpx.Client, **chosen: Any) -> dict[str, Any]:
    """Choose a picture as the page does; returns how it ended."""
    return call(client, "choose", [], event_data=chosen)


def test_an_upload_is_known_to_those_who_have_it(site: Site) -> None:
    """It is named by the digest of its content."""
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        sent = client.post(PICTURE, params={"name": "a.jpg"}, content=site.scene.read_bytes())
        assert (sent.status_code, len(sent.text)) == (200, 64)
        event = choose(client, picture=sent.text)
        key, shown, _ = event["output"]["data"]
        assert key is None  # the state of a visit stays on the server
        assert "a.jpg · 84 x 112 pixels" in json.dumps(shown, ensure_ascii=False)
        for guess in (sent.text[:-1], "0" * 64, "/etc/passwd", str(site.scene), None, 1):
            event = choose(client, picture=guess)
            assert "84 x 112" not in json.dumps(event)
            assert "Traceback" not in json.dumps(event)


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("", "picture"),
        ("?name=a.png", "a.png"),
        ("?name=" + "a" * 999, "a" * 100),
        ("?name=%1b]0;x%07%C2%9b.png", " ]0;x  .png"),
        ("?name=%ED%A0%80.png", "\ufffd\ufffd\ufffd.png"),
        ("?name=..%2f..%2fb.png&name=c", "c"),
    ],
)
@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data", "multipart/form-data; boundary=X", ""])
def test_uploads_of_odd_names_and_kinds(query: str, shown: str, kind: str, site: Site) -> None:
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        for content in (b"", b"--X\r\n\r\nabc", b"<html>"):
            answer = client.post(f"{PICTURE}{query}", content=content, headers={"Content-Type": kind})
            assert answer.status_code == 400
            assert answer.text.startswith(f"{shown}: not an image")
            assert answer.headers["content-type"].startswith("text/plain")


def test_markup_and_escapes_in_what_visitors_send(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    nasty = "<img src=x onerror=alert(1)>\"'&"
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        key = client.post(PICTURE, params={"name": f"{nasty}\x1b[2J.png"}, content=site.scene.read_bytes()).text
        for chosen in (key, f"{nasty}\x1b[2J\x9b\ud800"):
            shown = json.dumps(choose(client, picture=chosen))
            assert "<img src=x" not in shown
            assert "\\u001b" not in shown
    shown = "".join(capfd.readouterr())
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
        ("OPTIONS /picture HTTP/1.1\nHost: x\nOrigin: http://x\nAccess-Control-Request-Method: POST", 403),
        ("OPTIONS /picture HTTP/1.1\nHost: localhost", 404),
        ("PUT /picture HTTP/1.1\nHost: localhost\nContent-Length: 0", 404),
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
    asset = re.search(r"assets/[\w-]+\.js", httpx.get(site.url, timeout=PATIENCE).text)
    assert asset is not None
    for value in ("bytes=1-2-3", "bytes=9999999-1"):
        assert raw(site, f"GET /{asset[0]} HTTP/1.1\nHost: localhost\nRange: {value}") < 500


@pytest.mark.parametrize("index", [-1, 2, "x", None, 1.0])
def test_examples_that_there_are_not(index: Any, site: Site) -> None:
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        assert "there is no such example" in json.dumps(choose(client, example=index))


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
        {"event_data": {"example": [0]}},
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


# ---- the guard alone


def guard(local: bool = False, add_picture: Any = None, app: Any = None) -> RequestGuard:
    answers: Any = mock.Mock(add_picture=add_picture)
    return RequestGuard(app, LOOPBACK if local else (), [1], answers)


def refused(tested: RequestGuard, path: str, method: str, headers: dict[str, str]) -> int | None:
    """The status that a request is refused with before its body is read."""
    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    try:
        tested.check(Request({"type": "http", "path": path, "method": method, "headers": given}))
    except HTTPException as error:
        return error.status_code
    return None


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
def test_names_of_this_machine(host: str, status: int | None) -> None:
    assert refused(guard(local=True), "/", "GET", {"host": host}) == status
    assert refused(guard(local=False), "/", "GET", {"host": host}) is None


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
def test_other_sites_are_refused(headers: dict[str, str], foreign: bool, local: bool) -> None:
    given = {name: value.replace("a:", "localhost:") for name, value in headers.items()} | {"content-length": "2"}
    tested = guard(local)
    foreign |= local and not headers["host"]
    for path in (PICTURE, JOIN, "/gradio_api/cancel"):
        assert refused(tested, path, "POST", given) == (403 if foreign else None)
    assert refused(tested, "/config", "GET", given) == (403 if foreign else None)
    assert refused(tested, "/", "GET", given) == (403 if local and not headers["host"] else None)  # a link to the page


class Asked:
    """An application behind the guard, and what reaches it."""

    def __init__(self, add_picture: Any = None) -> None:
        self.bodies: list[bytes] = []
        self.guard = guard(add_picture=add_picture, app=self.answer)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(self, parts: list[bytes], pause: float = 0, scope: Any = (), end: Any = None) -> Any:
        """The answer to a call whose body arrives in parts."""
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        messages.append(end or {"type": "http.request"})

        async def receive() -> Any:
            await asyncio.sleep(pause)
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        usual = {"type": "http", "path": JOIN, "method": "POST", "headers": [(b"content-length", b"2")]}
        await self.guard(usual | dict(scope), receive, send)
        return sent[0].get("status", sent[0])

    def status(self, *given: Any, **named: Any) -> Any:
        found = asyncio.run(self.ask(*given, **named))
        assert self.guard.arriving == 0
        return found


def test_what_arrives_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is said of a body's length: the headers say 2 bytes."""
    behind = Asked()
    data = {"data": ["a\x1b[2J\n\x9b"], "event_data": {"y\x07": "\x1b"}, "fn_index": 1, "session_hash": "s", "é": "é"}
    call = json.dumps(data).encode()
    assert behind.status([call[:9], b"", call[9:]]) == 200
    (body,) = behind.bodies
    expected = {"data": ["a [2J\n "], "event_data": {"y ": " "}, "fn_index": 1, "session_hash": "s"}
    assert json.loads(body) == expected  # without what the page does not send
    assert behind.status([b" " * 100_000] * 11) == 413
    monkeypatch.setattr(request_guard, "MOST_BYTES", 10)
    assert behind.status([b" " * 6] * 2, scope={"path": PICTURE}) == 413
    assert behind.status([call]) == 200
    assert behind.status([call], end={"type": "http.disconnect"}) == 400
    monkeypatch.setattr(request_guard, "SLOWEST", 0.02)
    assert behind.status([b" "] * 1000, pause=0.005) == 408
    monkeypatch.setattr(request_guard, "MOST_ARRIVING", 50)
    assert behind.status([b" " * 20] * 3) == 503
    assert len(behind.bodies) == 2


def test_uploads_are_decoded_one_at_a_time_and_counted_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    release, now, most = threading.Event(), [], []

    def add_picture(content: bytes, name: str) -> Any:
        now.append(content)
        most.append(len(now))
        release.wait(PATIENCE)
        now.remove(content)
        if content == b"bad":
            raise DataError("bad: not an image")
        return mock.Mock(key="key")

    behind = Asked(add_picture)
    monkeypatch.setattr(request_guard, "MOST_ARRIVING", 12)

    async def several() -> list[int]:
        picture = {"path": PICTURE, "query_string": b"name=a"}
        first = [asyncio.create_task(behind.ask([part], scope=picture)) for part in (b"good", b"bad")]
        while not now:
            await asyncio.sleep(0.01)
        late = await behind.ask([b"too much"], scope=picture)
        release.set()
        return [*[await task for task in first], late]

    assert asyncio.run(several()) == [200, 400, 503]
    assert most == [1, 1]
    assert behind.guard.arriving == 0
    assert not behind.bodies  # Gradio sees none of it


def test_no_web_sockets() -> None:
    behind = Asked()
    assert behind.status([], scope={"type": "websocket"}) == {"type": "websocket.close", "code": 1008}
