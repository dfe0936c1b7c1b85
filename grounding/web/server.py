"""The server of `demo.py --web`: the page, mounted behind the request guard.

Gradio is imported when the page is made, so that all else works without it.
"""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from grounding.web.examples import Example, Start
from grounding.web.session import Answers
from utils import UserError

START = Start()
MOST_WAITING = 100  # calls; one that comes while so many wait is refused, and Gradio says so on the page
KEPT_SESSIONS = 1000
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(answers: Answers, examples: Sequence[Example], host: str, port: int | None, start: Start) -> None:
    """Serve the page until Ctrl-C or SIGTERM; raises `UserError` as `running` does."""
    if host not in LOOPBACK:
        print(f"warning: --host {host}: everyone who reaches this address can use the page; it asks for no password")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    with contextlib.suppress(KeyboardInterrupt), running(answers, examples, host, port, start) as url:
        print(f"the page is at {url} ; stop it with Ctrl-C", flush=True)
        threading.Event().wait()


@contextlib.contextmanager
def running(
    answers: Answers,
    examples: Sequence[Example],
    host: str = LOOPBACK[0],
    port: int | None = None,
    start: Start = START,
) -> Iterator[str]:
    """The page's server in the background, with its address; it writes no file and asks no other host.

    Port None is 7860 or the next free one. `UserError`: Gradio is not installed, or the address is taken.
    """
    try:
        import gradio as gr
        from fastapi import FastAPI, Request
        from fastapi.responses import PlainTextResponse
        from gradio.http_server import start_server
    except ImportError as error:
        raise UserError(f"the page needs Gradio ({error}): pip install -r requirements-web.txt") from None
    from grounding.web import layout
    from grounding.web.request_guard import PICTURE, RequestGuard, without_unseen

    async def upload(request: Request) -> PlainTextResponse:
        """Take the picture that choose.js sends: the answer is its key, or why it is refused."""
        name = without_unseen(request.query_params.get("name", ""))
        try:
            picture = await asyncio.to_thread(answers.add_picture, await request.body(), name)
        except UserError as error:
            return PlainTextResponse(str(error), 400)
        return PlainTextResponse(picture.key)

    page = layout.build(answers, examples, start)
    page.queue(api_open=False, max_size=MOST_WAITING)
    page.state_session_capacity = KEPT_SESSIONS
    app = FastAPI(openapi_url=None)
    app.add_route(PICTURE, upload, ["POST"])
    gr.mount_gradio_app(
        app,
        page,
        "/",
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css=layout.CSS,
        footer_links=[],
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        run_history=False,
    )
    mount: Any = app.routes[-1]
    guard: Any = RequestGuard(app, LOOPBACK if host in LOOPBACK else (), page.fns.keys())
    try:
        *_, url, server = start_server(guard, f"[{host}]" if ":" in host else host, port)
    except (OSError, OverflowError) as error:  # Gradio keeps the reason to itself
        where, remedy = f"{host}, ports from 7860", ""
        if port is not None:
            where, remedy = f"{host}, port {port}", "; without --port, the next free one from 7860 is taken"
        raise UserError(
            f"the page cannot be served at {where}: that is taken, forbidden, or no address of this machine{remedy}"
        ) from error
    try:
        yield url
    finally:
        page.app, page.server = mount.app, server  # what `close` ends: an open page's connection, and the server
        page.close(verbose=False)
