"""The server of `demo.py --web`: what Gradio is told, and the request guard around it.

Gradio is imported when the page is made, so that all else works without it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
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
    """The page's server in the background, with its address; it writes no file.

    Port None is 7860 or the next free one. `UserError`: Gradio is not installed, or the address is taken.
    """
    with _environment(host):
        try:
            import gradio as gr
        except ImportError as error:
            raise UserError(f"the page needs Gradio ({error}): pip install -r requirements-web.txt") from None
        from grounding.web import layout
        from grounding.web.request_guard import RequestGuard

        page = layout.build(answers, examples, start)

        @contextlib.asynccontextmanager
        async def guarded(server: Any) -> AsyncIterator[None]:
            """Put the guard around all that Gradio does; middleware of `app_kwargs` would stand inside."""
            hosts = LOOPBACK if host in LOOPBACK else ()
            server.middleware_stack = RequestGuard(server.middleware_stack, hosts, page.fns.keys(), answers)
            yield

        page.queue(api_open=False, max_size=MOST_WAITING)
        try:
            _, url, _ = page.launch(
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port,
                theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
                css=layout.CSS,
                state_session_capacity=KEPT_SESSIONS,
                app_kwargs={"lifespan": guarded, "docs_url": None, "redoc_url": None},
                footer_links=[],
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                pwa=False,
                run_history=False,
            )
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
            page.close(verbose=False)


@contextlib.contextmanager
def _environment(host: str = LOOPBACK[0]) -> Iterator[None]:
    """What Gradio takes from the environment alone: it reports nothing, and asks its own page without a proxy."""
    before = dict(os.environ)
    direct = ",".join(filter(None, [before.get("no_proxy") or before.get("NO_PROXY"), *LOOPBACK, host]))
    wanted = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    wanted |= {"no_proxy": direct, "NO_PROXY": direct}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
