"""The request guard of `demo.py --web`: it passes on what the page's own browser code sends, and refuses the rest.

Gradio serves more than this page uses: it writes uploads to disk, fetches addresses for its callers, serves files. None
of that passes. A request's body is read here as a whole, so that limits hold for what arrives, whatever its headers
say. A call is passed on with the parts that this page uses, each a plain value; a picture is read here, in memory.
"""

import asyncio
import json
import re
from collections.abc import Collection
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grounding.web.session import MOST_BYTES, Answers
from utils import UserError

API = "/gradio_api/"
PAGES = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", f"{API}startup-events", f"{API}theme.css"}
FOLDERS = ("/assets/", "/static/", "/svelte/", f"{API}heartbeat/", f"{API}queue/data")
JOIN, PICTURE = f"{API}queue/join", "/picture"
POSTS = {JOIN, PICTURE, f"{API}cancel", f"{API}reset"}
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^][:@/\s]+))(?::\d{1,5})?", re.IGNORECASE)  # name, perhaps port
SESSION = re.compile(r"[\w-]{1,100}", re.ASCII)
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # terminals obey some; Gradio logs what it refuses

PLAIN_PARTS = ("fn_index", "session_hash", "trigger_id", "event_id")  # of a call
LONGEST_ADDRESS, LONGEST_NAME = 2_000, 255  # characters of path and query; bytes of a name in a path
LONGEST_CALL = 1_000_000  # bytes of a call
MOST_ARRIVING = 200_000_000  # bytes of all bodies that are arriving or waiting to be decoded
SLOWEST = 120  # seconds for a body to arrive


class RequestGuard:
    """ASGI middleware around the whole of Gradio.

    Args:
        hosts: the names that a request may call this machine by, against DNS rebinding; empty: any.
        functions: indices of the functions that may be called.
        answers: takes the pictures that are uploaded.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], functions: Collection[int], answers: Answers) -> None:
        self.app, self.hosts, self.functions, self.answers = app, hosts, functions, answers
        self.arriving, self.decoding = 0, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            request, app = Request(scope, receive), self.app
            try:
                self.check(request)
                if request.method == "POST":
                    app, receive = await self.post(request)
            except HTTPException as refusal:
                app = PlainTextResponse(f"{refusal.detail}\n", refusal.status_code)
            await app(scope, receive, send)

    def check(self, request: Request) -> None:
        """Refuse a request by its address and headers: raises `HTTPException` with the status to answer."""
        path, headers = request.scope["path"], request.headers
        if self.hosts and _host(headers.get("host", "")) not in self.hosts:
            raise HTTPException(403)
        if foreign(request) and (request.method == "POST" or path != "/"):  # a link to the page works from anywhere
            raise HTTPException(403)
        if len(path) + len(request.scope.get("query_string", b"")) > LONGEST_ADDRESS:
            raise HTTPException(414)
        if any(map(CONTROL.search, (path, *headers.values()))):
            raise HTTPException(400)
        reads = request.method in ("GET", "HEAD") and (path in PAGES or path.startswith(FOLDERS))
        if not reads and (request.method != "POST" or path not in POSTS):
            raise HTTPException(404)
        if any(len(part.encode()) > LONGEST_NAME for part in path.split("/")):
            raise HTTPException(404)
        if request.method == "POST":
            length = headers.get("content-length", "")
            if "transfer-encoding" in headers or not length.isdecimal():
                raise HTTPException(411)
            if len(length) > 12 or int(length) > most(path):
                raise HTTPException(413)

    async def post(self, request: Request) -> tuple[ASGIApp, Receive]:
        """Read a body; returns the application that answers it, and what that application is to receive."""
        parts: list[bytes] = []
        try:
            await asyncio.wait_for(self.read(request, parts), SLOWEST)
            body = b"".join(parts)
            if request.scope["path"] != PICTURE:
                return self.app, _again(self.call(body, request.scope["path"] == JOIN), request.receive)
            name = UNSEEN.sub(" ", request.query_params.get("name", ""))
            async with self.decoding:  # one at a time: a picture takes far more memory than its file
                picture = await asyncio.to_thread(self.answers.add_picture, body, name)
            return PlainTextResponse(picture.key), request.receive
        except UserError as error:
            return PlainTextResponse(str(error), 400), request.receive
        except ClientDisconnect:
            raise HTTPException(400) from None
        except asyncio.TimeoutError:
            raise HTTPException(408) from None
        finally:
            self.arriving -= sum(map(len, parts))

    async def read(self, request: Request, parts: list[bytes]) -> None:
        """Read a body into `parts`, counting what arrives; raises `HTTPException` where it is too much."""
        size = 0
        async for part in request.stream():
            parts.append(part)
            size, self.arriving = size + len(part), self.arriving + len(part)
            if size > most(request.scope["path"]):
                raise HTTPException(413)
            if self.arriving > MOST_ARRIVING:
                raise HTTPException(503)

    def call(self, body: bytes, join: bool) -> bytes:
        """A call's JSON as it is passed on; raises `HTTPException` for what this page does not send.

        Every argument is a plain value, so none is a file: Gradio would open its path, or fetch it as an address.
        """
        try:
            given = json.loads(body)
            call = {name: _plain(given[name]) for name in PLAIN_PARTS if name in given}
            if join:
                known = call["fn_index"] in self.functions and SESSION.fullmatch(call["session_hash"])
                if not known or not isinstance(given["data"], list):
                    raise ValueError
                call["data"] = list(map(_plain, given["data"]))
                event = given.get("event_data") or {}
                call["event_data"] = {_plain(name): _plain(value) for name, value in event.items()}
            return json.dumps(call, allow_nan=False).encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise HTTPException(400) from None


def most(path: str) -> int:
    """The bytes that a body may have."""
    return MOST_BYTES if path == PICTURE else LONGEST_CALL


def foreign(request: Request) -> bool:
    """Whether a browser sends a request for another site's page.

    Sec-Fetch-Site is the browser's own word and holds behind a proxy as well. Old browsers send Origin alone, and so
    do all browsers to other machines' addresses without https.
    """
    headers = request.headers
    if (site := headers.get("sec-fetch-site")) is not None:
        return site not in ("same-origin", "none")
    host = headers.get("host", "").lower()
    return headers.get("origin", f"http://{host}").lower() not in (f"http://{host}", f"https://{host}")


def _plain(value: Any) -> Any:
    """A text without unseen characters, a number, a truth value or None; raises `ValueError` for all else."""
    if isinstance(value, str):
        return UNSEEN.sub(" ", value)
    if isinstance(value, list | dict) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError
    return value


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then what the given one gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def first() -> Message:
        return messages.pop() if messages else await receive()

    return first


def _host(header: str) -> str:
    """The name in a Host header, without its port; empty when it is none."""
    found = HOST.fullmatch(header)
    return (found[1] or found[2]).lower() if found else ""
