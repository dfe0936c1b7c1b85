"""The door of the page's server: what a browser needs of Gradio passes, everything else is refused.

Gradio serves more than this page uses: it fetches addresses for its callers, records screens, calls functions by name.
A request's body is read here as a whole before Gradio sees it, so that limits hold for what arrives, whatever is said
of its length.
"""

import asyncio
import json
import re
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api/"
PAGES = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", f"{API}startup-events", f"{API}theme.css"}
FOLDERS = ("/assets/", "/static/", "/svelte/", f"{API}heartbeat/", f"{API}queue/data", f"{API}upload_progress")
JOIN, UPLOAD = f"{API}queue/join", f"{API}upload"
CALLS = {JOIN, UPLOAD, f"{API}cancel", f"{API}reset", f"{API}heartbeat"}
FILE = f"{API}file="
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^][:@/\s]+))(?::\d{1,5})?", re.IGNORECASE)  # name, perhaps port
SESSION = re.compile(r"[\w-]{1,100}", re.ASCII)
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # terminals obey some; Gradio logs what it refuses

UPLOADS = "uploads"  # inside the page's folder; a folder an upload
KEPT_UPLOADS, OLDEST_UPLOAD = 100, 3600  # uploads that were never opened; their seconds
LONGEST_ADDRESS, LONGEST_NAME = 2_000, 255  # characters of path and query; bytes of a file's name
MOST_FILES = 20  # of an upload: a browser sends all that are dropped, and the page takes the first
LONGEST_CALL = 1_000_000  # bytes of a request that uploads nothing
AROUND_A_FILE = 100_000  # bytes of a request around the file that it uploads
MOST_ARRIVING = 200_000_000  # bytes of all bodies that are not yet complete
SLOWEST = 120  # seconds of a body
DEEPEST = 20  # brackets within each other


class Refused(Exception):
    """A request that is answered with this HTTP status alone."""

    def __init__(self, status: int) -> None:
        self.status = status


class Gate:
    """ASGI middleware, to stand outside of Gradio's own.

    Args:
        folder: the only one whose files are served, but for the uploads in it.
        local: answer only those that call this machine by a name of its own, so that no other site's page can (DNS
            rebinding).
        most_bytes: of an uploaded file.
        server: Gradio's own application, which is told where to write each upload.
        functions: indices of the functions that may be called.
    """

    def __init__(
        self,
        app: App,
        folder: Path,
        local: bool,
        most_bytes: int,
        server: Any = None,
        functions: Collection[int] = (),
    ) -> None:
        self.app, self.folder, self.local, self.most_bytes = app, folder.resolve(), local, most_bytes
        self.server, self.functions = server, functions
        self.uploads = self.folder / UPLOADS
        self.arriving, self.storing = 0, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            if (status := self.refused(scope)) is not None:
                raise Refused(status)
            if scope["method"] == "POST":
                upload = scope["path"] == UPLOAD
                body = await self.body(receive, self.most_bytes + AROUND_A_FILE if upload else LONGEST_CALL)
                if upload:
                    await self.store(scope, body, receive, send)
                    return
                receive = _first(self.call(body, scope["path"]), receive)
        except Refused as refusal:
            text = b"refused\n"
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": text})
            return
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]  # Gradio trips over odd ones
        await self.app({**scope, "headers": headers}, receive, send)

    def refused(self, scope: Scope) -> int | None:
        """The status that a request is refused with before its body is read, or None."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        if self.local and _host(headers.get(b"host", "")) not in LOOPBACK:
            return 403
        if foreign(headers) and (method == "POST" or path != "/"):  # a link to the page is welcome anywhere
            return 403
        if len(path) + len(scope.get("query_string", b"")) > LONGEST_ADDRESS:
            return 414
        if any(map(CONTROL.search, (path, *headers.values()))):
            return 400
        if any(len(part.encode()) > LONGEST_NAME for part in path.split("/")):
            return 404
        if method in ("GET", "HEAD"):
            known = path in PAGES or path.startswith(FOLDERS) or (path.startswith(FILE) and self.inside(path))
            return None if known else 404
        if method != "POST" or path not in CALLS:
            return 404
        most = self.most_bytes + AROUND_A_FILE if path == UPLOAD else LONGEST_CALL
        length = headers.get(b"content-length", "")
        if b"transfer-encoding" in headers or not length.isdecimal():
            return 411
        return 413 if len(length) > 12 or int(length) > most else None

    def inside(self, path: str) -> bool:
        """Whether a request for a file is for one of the page's own folder, and for no upload."""
        try:
            file = Path(path[len(FILE) :]).resolve()
        except (OSError, ValueError):  # a NUL in it
            return False
        return file.is_relative_to(self.folder) and not file.is_relative_to(self.uploads)

    async def body(self, receive: Receive, most: int) -> bytes:
        """A request's whole body of at most `most` bytes; raises `Refused`."""

        async def parts() -> bytes:
            found, size, more = [], 0, True
            try:
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400)
                    found.append(message.get("body", b""))
                    size, self.arriving = size + len(found[-1]), self.arriving + len(found[-1])
                    if size > most:
                        raise Refused(413)
                    if self.arriving > MOST_ARRIVING:
                        raise Refused(503)
                    more = message.get("more_body", False)
            finally:
                self.arriving -= size
            return b"".join(found)

        try:
            return await asyncio.wait_for(parts(), SLOWEST)
        except asyncio.TimeoutError:
            raise Refused(408) from None

    def call(self, body: bytes, path: str) -> bytes:
        """A call's JSON as it is handed on, without characters that are not seen; raises `Refused`."""
        try:
            call = _clean(json.loads(body))
            clean = json.dumps(call, allow_nan=False).encode()
        except (ValueError, RecursionError):
            raise Refused(400) from None
        if _names_an_address(call):
            raise Refused(403)
        if path == JOIN and not self.is_of_the_page(call):
            raise Refused(400)
        return clean

    def is_of_the_page(self, call: Any) -> bool:
        """Whether a call has the form of this page's: of no function does an argument hold a list."""
        if not isinstance(call, dict) or not isinstance(call.get("data"), list):
            return False
        function, session = call.get("fn_index"), call.get("session_hash")
        known = isinstance(function, int) and function in self.functions
        named = isinstance(session, str) and SESSION.fullmatch(session) is not None
        return known and named and not any(isinstance(value, list) for value in call["data"])

    async def store(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Let Gradio write an upload to a folder of its own, whose name nobody else knows; raises `Refused`."""
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        async with self.storing:
            place = make_room(self.uploads)
            self.server.uploaded_file_dir = str(place)
            try:
                await self.app(scope, _first(body, receive), keep)
            except Exception:  # of a parser that is not ours, about what is no form
                answer = []
        status = answer[0]["status"] if answer else 400
        if status != 200 or len(list(place.glob("*/*"))) not in range(1, MOST_FILES + 1):
            shutil.rmtree(place, ignore_errors=True)
            raise Refused(400 if status == 200 else status)
        for message in answer:
            await send(message)


def make_room(uploads: Path) -> Path:
    """A new folder for an upload; the oldest ones are deleted where there are too many."""
    uploads.mkdir(exist_ok=True)
    now = time.time_ns()
    waiting = sorted(uploads.iterdir())  # by time, which their names begin with
    oldest = f"{now - OLDEST_UPLOAD * 10**9:020}"
    for number, place in enumerate(waiting, start=1):
        if place.name < oldest or number <= len(waiting) + 1 - KEPT_UPLOADS:
            shutil.rmtree(place, ignore_errors=True)
    new = uploads / f"{now:020}-{secrets.token_hex(16)}"
    new.mkdir()
    return new


def foreign(headers: MutableMapping[bytes, str]) -> bool:
    """Whether a browser sends a request for another site's page.

    Sec-Fetch-Site is the browser's own word and holds behind a proxy as well; old browsers, and all of them at other
    machines' addresses without https, send Origin alone.
    """
    if (site := headers.get(b"sec-fetch-site")) is not None:
        return site not in ("same-origin", "none")
    host = headers.get(b"host", "").lower()
    return b"origin" in headers and headers[b"origin"].lower() not in (f"http://{host}", f"https://{host}")


def _clean(value: Any, depth: int = DEEPEST) -> Any:
    """JSON without unseen characters; raises `ValueError` where it is too deep or a number too long."""
    if depth < 0 or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError
    if isinstance(value, str):
        return UNSEEN.sub(" ", value)
    if isinstance(value, list):
        return [_clean(part, depth - 1) for part in value]
    if isinstance(value, dict):
        return {UNSEEN.sub(" ", name): _clean(part, depth - 1) for name, part in value.items()}
    return value


def _names_an_address(value: Any) -> bool:
    """Whether a call's JSON has a file whose path is an address, which Gradio would fetch from here."""
    if isinstance(value, dict):
        return "://" in str(value.get("path")) or any(map(_names_an_address, value.values()))
    return isinstance(value, list) and any(map(_names_an_address, value))


def _first(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body, and then what the given one gives."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _host(header: str) -> str:
    """The name in a Host header, without its port; empty when it is none."""
    found = HOST.fullmatch(header)
    return (found[1] or found[2]).lower() if found else ""
