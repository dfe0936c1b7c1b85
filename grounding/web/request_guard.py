"""The request guard of `demo.py --web`: it passes on what the page's own browser code sends, and refuses the rest.

Gradio serves more than this page uses: it writes uploads to disk, fetches addresses for its callers, serves files. None
of that passes. A request's body is read here as a whole, so that limits hold for what arrives, whatever its headers
say. A call is passed on with the parts that this page uses, each a plain value.
"""

import asyncio
import re
from collections.abc import Collection
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grounding.web.session import MOST_BYTES

API = "/gradio_api/"
PAGES = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", f"{API}theme.css"}
FOLDERS = ("/assets/", "/static/", "/svelte/", f"{API}heartbeat/", f"{API}queue/data")
JOIN, PICTURE = f"{API}queue/join", "/picture"
POSTS = {JOIN, PICTURE, f"{API}cancel", f"{API}reset"}
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # terminals obey some; Gradio logs what it refuses

LONGEST_PATH = 255  # bytes; of a longer name, a file system says so by an error
LONGEST_CALL = 1_000_000  # bytes of a call
MOST_ARRIVING = 200_000_000  # bytes of all bodies that are arriving or not yet answered
SLOWEST = 120  # seconds for a body to arrive


def without_unseen(text: str) -> str:
    """A text with a space for each character that is not seen, such as those that a terminal obeys."""
    return UNSEEN.sub(" ", text)


Text = Annotated[str, AfterValidator(without_unseen)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Plain = Text | bool | Whole | float | None


class Call(BaseModel, strict=True, allow_inf_nan=False):
    """What this page sends in a call; all else is left out of what is passed on.

    Every argument is a plain value, so none is a file: Gradio would open its path, or fetch it as an address.
    """

    fn_index: Whole = -1
    session_hash: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,100}$")] = ""
    trigger_id: Whole | None = None
    event_id: Text | None = None
    data: list[Plain] = []
    event_data: dict[Text, Plain] | None = None


class RequestGuard:
    """ASGI middleware around the whole page.

    Args:
        hosts: the names that a request may call this machine by, against DNS rebinding; empty: any.
        functions: indices of the functions that may be called.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], functions: Collection[int]) -> None:
        self.app, self.hosts, self.functions = app, hosts, functions
        self.arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            request, app, body = Request(scope, receive), self.app, bytearray()
            try:
                self.check(request)
                if request.method == "POST":
                    await asyncio.wait_for(self.read(request, body), SLOWEST)
                    receive = _again(self.passed_on(request.scope["path"], bytes(body)), receive)
            except HTTPException as refusal:
                app = PlainTextResponse(f"{refusal.detail}\n", refusal.status_code)
            except asyncio.TimeoutError:
                app = PlainTextResponse("too slow\n", 408)
            except (ClientDisconnect, ValueError):
                app = PlainTextResponse("not what this page sends\n", 400)
            try:
                await app(scope, receive, send)
            finally:
                self.arriving -= len(body)

    def check(self, request: Request) -> None:
        """Refuse a request by its address and headers: raises `HTTPException` with the status to answer."""
        path, headers = request.scope["path"], request.headers
        host = re.sub(r":\d{1,5}$", "", headers.get("host", "")).strip("[]").lower()
        if self.hosts and host not in self.hosts:
            raise HTTPException(403)
        if foreign(request) and (request.method == "POST" or path != "/"):  # a link to the page works from anywhere
            raise HTTPException(403)
        if any(map(CONTROL.search, (path, *headers.values()))):
            raise HTTPException(400)
        reads = request.method in ("GET", "HEAD") and (path in PAGES or path.startswith(FOLDERS))
        posts = request.method == "POST" and path in POSTS
        if not (reads or posts) or len(path.encode()) > LONGEST_PATH:
            raise HTTPException(404)
        if "transfer-encoding" in headers:  # a proxy before the page may take such a body to end elsewhere
            raise HTTPException(411)
        stated = headers.get("content-length", "0")
        if stated.isdecimal() and int(stated[:20]) > most_bytes(path):
            raise HTTPException(413)

    async def read(self, request: Request, body: bytearray) -> None:
        """Read a body, counting what arrives; raises `HTTPException` where it is too much."""
        most = most_bytes(request.scope["path"])
        async for part in request.stream():
            body += part
            self.arriving += len(part)
            if len(body) > most:
                raise HTTPException(413)
            if self.arriving > MOST_ARRIVING:
                raise HTTPException(503)

    def passed_on(self, path: str, body: bytes) -> bytes:
        """What is passed on of a body; raises `ValueError` for a call that this page does not make."""
        if path == PICTURE:
            return body
        call = Call.model_validate_json(body)
        if path == JOIN and call.fn_index not in self.functions:
            raise ValueError
        return call.model_dump_json(exclude_unset=True).encode()


def most_bytes(path: str) -> int:
    """The longest body that is taken at a path."""
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


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then what the given one gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def first() -> Message:
        return messages.pop() if messages else await receive()

    return first
