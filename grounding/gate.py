"""The door of the page's server: what a browser needs of Gradio passes, everything else is answered 404.

Gradio serves more than this page uses: it fetches addresses for its callers, records screens, calls functions by name.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api/"
PAGES = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", f"{API}startup-events", f"{API}theme.css"}
FOLDERS = ("/assets/", "/static/", "/svelte/", f"{API}heartbeat/", f"{API}queue/data", f"{API}upload_progress")
JOIN = f"{API}queue/join"
CALLS = {JOIN, f"{API}upload", f"{API}cancel", f"{API}reset", f"{API}heartbeat"}
FILE = f"{API}file="
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST_CALL = 1_000_000  # bytes of a request that uploads nothing
AROUND_A_FILE = 100_000  # bytes of a request around the file that it uploads


class Gate:
    """ASGI middleware.

    Args:
        folder: the only one whose files are served.
        local: answer only those that call this machine by a name of its own, so that no other site's page can (DNS
            rebinding).
        most_bytes: of an uploaded file.
    """

    def __init__(self, app: App, folder: Path, local: bool, most_bytes: int) -> None:
        self.app, self.folder, self.local, self.most_bytes = app, folder.resolve(), local, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        status = self.refused(scope)
        if status is None and scope["path"] == JOIN:
            body, receive = await _read(receive)
            status = 403 if names_an_address(body) else None
        if status is None:
            await self.app(scope, receive, send)
            return
        text = b"refused\n"
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    def refused(self, scope: Scope) -> int | None:
        """The status that a request is refused with, or None."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        if self.local and _host(headers.get(b"host", "")) not in LOOPBACK:
            return 403
        if method in ("GET", "HEAD"):
            known = path in PAGES or path.startswith(FOLDERS) or (path.startswith(FILE) and self.inside(path))
            return None if known else 404
        if method != "POST" or path not in CALLS:
            return 404
        most = self.most_bytes + AROUND_A_FILE if path == f"{API}upload" else LONGEST_CALL
        length = headers.get(b"content-length", "")
        if not length.isdecimal():
            return 411
        return 413 if int(length) > most else None

    def inside(self, path: str) -> bool:
        """Whether a request for a file is for one of the page's own folder."""
        return Path(path[len(FILE) :]).resolve().is_relative_to(self.folder)


def names_an_address(body: bytes) -> bool:
    """Whether a call's JSON has a file whose path is an address, which Gradio would fetch from here."""

    def inside(value: Any) -> bool:
        if isinstance(value, dict):
            return "://" in str(value.get("path")) or any(map(inside, value.values()))
        return isinstance(value, list) and any(map(inside, value))

    try:
        return inside(json.loads(body))
    except (ValueError, RecursionError):
        return True  # no call of the page's


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """A request's body, and a `receive` that gives it once more."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body, given = b"".join(parts), False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return body, again


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0].lower()
