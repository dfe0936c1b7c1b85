"""The request guard of demo.py --web: which requests it passes on, and what of them."""

import asyncio
import json
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataset.scenes.paths import SHIPPED
from grounding.web.server import LOOPBACK
from tests.grounding.web.conftest import PATIENCE, Site

httpx = pytest.importorskip("httpx", reason="comes with Gradio")
request_guard = pytest.importorskip("grounding.web.request_guard", reason="the page needs requirements-web.txt")
JOIN, PICTURE, CANCEL = request_guard.JOIN, request_guard.PICTURE, "/gradio_api/cancel"
pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")  # of what it uses


# ---- the page that is served


@pytest.fixture
def client(site: Site) -> Iterator[Any]:
    with httpx.Client(base_url=site.url, timeout=PATIENCE) as client:
        yield client


def test_no_file_of_the_server_is_served(site: Site, client: Any) -> None:
    secret = ["/etc/passwd", "README.md", str(Path("README.md").resolve()), str(SHIPPED.resolve()), str(site.scene)]
    for path in [*secret, "/x/%2e%2e/%2e%2e/etc/passwd", "http://127.0.0.1/", "https://example.com/x.png"]:
        for way in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"):
            assert client.get(f"{way}{path}").status_code in (403, 404), (way, path)
    for path in ("/gradio_api/proxy=http://x.hf.space/", "/monitoring", "/docs", "/gradio_api/info", "/login"):
        assert client.get(path).status_code == 404, path
    for path in ("run/answer", "call/answer", "process_recording", "upload", "heartbeat/x"):
        assert client.post(f"/gradio_api/{path}", json={"data": []}).status_code == 404, path
    assert client.post("/", json={"data": []}).status_code == 404


def choose(client: Any, **chosen: Any) -> dict[str, Any]:
    """Choose a picture as the page does; returns how it ended."""
    functions = client.get("/config").json()["dependencies"]
    function = next(one["id"] for one in functions if one["api_name"] == "choose")
    body = {"data": [], "fn_index": function, "session_hash": secrets.token_hex(8), "event_data": chosen}
    client.post(JOIN, json=body).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": body["session_hash"]}) as lines:
        for line in lines.iter_lines():
            event = json.loads(line.removeprefix("data:") or "{}")
            if event.get("msg") == "process_completed":
                return event
    raise AssertionError("the event did not end")


def test_an_upload_is_known_to_those_who_have_it(site: Site, client: Any) -> None:
    """It is named by the digest of its content."""
    sent = client.post(PICTURE, params={"name": "a.jpg"}, content=site.scene.read_bytes())
    assert (sent.status_code, len(sent.text)) == (200, 64)
    key, shown, _ = choose(client, picture=sent.text)["output"]["data"]
    assert key is None  # the state of a visit stays on the server
    assert "a.jpg · 84 x 112 pixels" in json.dumps(shown, ensure_ascii=False)
    for guess in (sent.text[:-1], "0" * 64, "/etc/passwd", str(site.scene), None, 1):
        event = json.dumps(choose(client, picture=guess))
        assert "84 x 112" not in event
        assert "Traceback" not in event


@pytest.mark.parametrize(
    ("query", "kind", "shown"),
    [
        ("", "", "picture"),
        ("?name=a.png", "image/png", "a.png"),
        ("?name=a.png", "multipart/form-data", "a.png"),
        ("?name=a.png", "multipart/form-data; boundary=X", "a.png"),
        ("?name=" + "a" * 999, "image/png", "a" * 100),
        ("?name=%1b]0;x%07%C2%9b.png", "image/png", " ]0;x  .png"),
        ("?name=%ED%A0%80.png", "image/png", "\ufffd\ufffd\ufffd.png"),
        ("?name=..%2f..%2fb.png&name=c", "image/png", "c"),
    ],
)
def test_uploads_of_odd_names_and_kinds(query: str, kind: str, shown: str, client: Any) -> None:
    for content in (b"", b"--X\r\n\r\nabc", b"<html>"):
        answer = client.post(f"{PICTURE}{query}", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert answer.text.startswith(f"{shown}: not an image")
        assert answer.headers["content-type"].startswith("text/plain")


def test_markup_and_escapes_in_what_visitors_send(site: Site, client: Any, capfd: pytest.CaptureFixture[str]) -> None:
    nasty = "<img src=x onerror=alert(1)>\"'&"
    key = client.post(PICTURE, params={"name": f"{nasty}\x1b[2J.png"}, content=site.scene.read_bytes()).text
    for chosen in (key, f"{nasty}\x1b[2J\x9b"):
        shown = json.dumps(choose(client, picture=chosen))
        assert "<img src=x" not in shown
        assert "\\u001b" not in shown
    printed = "".join(capfd.readouterr())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET / HTTP/1.1\nHost: localhost", 200),
        ("HEAD / HTTP/1.1\nHost: localhost", 200),
        ("GET / HTTP/1.1\nHost: evil.example", 403),
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
        ("POST /gradio_api/cancel HTTP/1.1\nHost: localhost", 400),
        ("POST /gradio_api/cancel HTTP/1.1\nHost: localhost\nContent-Length: 9\nTransfer-Encoding: chunked", 411),
    ],
)
def test_requests_as_no_browser_sends_them(head: str, status: int, site: Site) -> None:
    address = ("127.0.0.1", int(site.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=PATIENCE) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n")
        assert int(connection.recv(100).split()[1]) == status


# ---- the guard alone


class Asked:
    """An application behind the guard, and what reaches it."""

    def __init__(self, local: bool = False) -> None:
        self.bodies: list[bytes] = []
        self.guard = request_guard.RequestGuard(self.answer, LOOPBACK if local else (), [1])

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(
        self,
        *parts: bytes,
        path: str = JOIN,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        pause: float = 0,
        end: str = "http.request",
        kind: str = "http",
    ) -> Any:
        """The answer to a request whose body arrives in parts."""
        sent: list[Any] = []
        messages = [*({"type": "http.request", "body": part, "more_body": True} for part in parts), {"type": end}]
        given = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {"type": kind, "path": path, "method": method, "headers": given, "query_string": b""}

        async def receive() -> Any:
            await asyncio.sleep(pause)
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await self.guard(scope, receive, send)
        return sent[0].get("status", sent[0])

    def status(self, *parts: bytes, **request: Any) -> Any:
        found = asyncio.run(self.ask(*parts, **request))
        assert self.guard.arriving == 0
        return found


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost@evil.example", False),
        ("[::1]evil.example", False),
        ("[::1].evil.example:80", False),
        ("::1", False),
        ("localhost:80:80", False),
        ("", False),
        ("[::1]:7860", True),
        ("[::1]", True),
        ("127.0.0.1:80", True),
        ("LOCALHOST", True),
    ],
)
def test_names_of_this_machine(host: str, known: bool) -> None:
    asked = {"path": "/", "method": "GET", "headers": {"host": host}}
    assert Asked(local=True).status(b"", **asked) == (200 if known else 403)
    assert Asked(local=False).status(b"", **asked) == 200


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({"host": "a:1"}, False),  # no browser
        ({"host": "a:1", "origin": "http://a:1"}, False),
        ({"host": "A:1", "origin": "https://a:1"}, False),  # a proxy speaks https
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
def test_other_sites_are_refused(headers: dict[str, str], foreign: bool) -> None:
    behind, status = Asked(), 403 if foreign else 200
    for path in (PICTURE, CANCEL):
        assert behind.status(b"{}", path=path, headers=headers) == status
    assert behind.status(b"", path="/config", method="GET", headers=headers) == status
    assert behind.status(b"", path="/", method="GET", headers=headers) == 200  # a link to the page


CALL = {"data": ["a\x1b[2J\n\x9b", 1, 0.5, True, None], "fn_index": 1, "session_hash": "s"}
FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


def test_what_is_passed_on_of_a_call() -> None:
    behind = Asked()
    call = json.dumps({**CALL, "event_data": {"y\x07": "\x1b"}, "é": "é"}).encode()
    assert behind.status(call[:9], b"", call[9:]) == 200
    expected = {"data": ["a [2J\n ", 1, 0.5, True, None], "event_data": {"y ": " "}, "fn_index": 1, "session_hash": "s"}
    assert json.loads(behind.bodies[0]) == expected
    assert [type(value) for value in json.loads(behind.bodies[0])["data"]] == [str, int, float, bool, type(None)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        *(
            json.dumps({**CALL, **change}).encode()
            for change in (
                {"fn_index": 999},
                {"fn_index": None},
                {"fn_index": "1"},
                {"session_hash": None},
                {"session_hash": "a/b"},
                {"session_hash": "a\n"},
                {"session_hash": "x" * 101},
                {"data": {}},
                {"data": [[]]},
                {"data": [[FILE]]},
                {"data": [FILE]},
                {"data": [float("nan")]},
                {"data": [-float("inf")]},
                {"data": [10**400]},
                {"event_data": [[1]]},
                {"event_data": {"example": [0]}},
                {"event_data": {"file": FILE}},
            )
        ),
    ],
    ids=lambda body: body[:120].decode("latin-1") or "empty",
)
def test_calls_that_the_page_does_not_make(body: bytes) -> None:
    assert Asked().status(body) == 400


def test_what_arrives_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    behind, headers = Asked(), {"content-length": "2"}  # whatever is said of a body's length
    assert behind.status(*[b" " * 100_000] * 11, headers=headers) == 413
    monkeypatch.setattr(request_guard, "MOST_BYTES", 10)
    assert behind.status(*[b" " * 6] * 2, path=PICTURE, headers=headers) == 413
    assert behind.status(b" " * 10, path=PICTURE) == 200
    assert behind.status(b"{", end="http.disconnect") == 400
    assert behind.status(path=PICTURE, headers={"content-length": "11"}) == 413  # at once, as it says so itself
    monkeypatch.setattr(request_guard, "SLOWEST", 0.02)
    assert behind.status(*[b" "] * 1000, pause=0.005) == 408
    assert behind.bodies == [b" " * 10]


def test_what_is_not_answered_yet_is_counted_with_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_guard, "MOST_ARRIVING", 12)
    behind = Asked()

    async def two() -> list[int]:
        late = asyncio.Event()

        async def answer(*given: Any) -> None:
            await late.wait()
            await behind.answer(*given)

        behind.guard.app = answer
        first = asyncio.create_task(behind.ask(b"good", path=PICTURE))
        while not behind.guard.arriving:
            await asyncio.sleep(0)
        second = await asyncio.wait_for(behind.ask(b"too much!", path=PICTURE), PATIENCE)
        late.set()
        return [await first, second]

    assert asyncio.run(two()) == [200, 503]
    assert behind.guard.arriving == 0


def test_no_web_sockets() -> None:
    assert Asked().status(kind="websocket") == {"type": "websocket.close", "code": 1008}
