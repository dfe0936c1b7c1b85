"""The door of the page's server: what a browser needs of Gradio passes, everything else is answered 404.

Gradio serves more than this page uses: it fetches addresses for its callers, records screens, calls functions by name.
"""

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
CALLS = {f"{API}queue/join", f"{API}upload", f"{API}cancel", f"{API}reset", f"{API}heartbeat"}
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
        status = self.refused(scope) if scope["type"] == "http" else None if scope["type"] == "lifespan" else 404
        if status is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            text = b"refused\n"
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": text})
        else:
            await send({"type": "websocket.close", "code": 1008})

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


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0].lower()
