"""The server of `demo.py --web`: what Gradio is told, where it writes, who may reach it.

Gradio is imported when the page is made, so that all else works without it.
"""

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from grounding.web import fragments, layout
from grounding.web.examples import Example
from grounding.web.layout import Start
from grounding.web.request_guard import LOOPBACK, UPLOADS, Gate
from grounding.web.session import MOST_BYTES, Answers
from utils import UserError

START = Start()
MOST_WAITING = 100  # calls; one that comes while so many wait is refused, and Gradio says so on the page
KEPT_SESSIONS = 1000


def serve(answers: Answers, examples: Sequence[Example], host: str, port: int | None, start: Start) -> None:
    """Serve the page until Ctrl-C or SIGTERM; raises `UserError` as `running` does."""
    if host not in LOOPBACK:
        print(f"warning: --host {host}: everyone who reaches this address can use the page; it asks for no password")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # its own way would leave the folder behind
    try:
        with contextlib.suppress(KeyboardInterrupt), running(answers, examples, host, port, start) as url:
            print(f"the page is at {url} ; stop it with Ctrl-C", flush=True)
            threading.Event().wait()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def running(
    answers: Answers,
    examples: Sequence[Example],
    host: str = LOOPBACK[0],
    port: int | None = None,
    start: Start = START,
) -> Iterator[str]:
    """The page's server in the background, with its address; all that it wrote is gone at the end.

    Args:
        port: None: 7860 or the next free one.

    Raises:
        UserError: Gradio is not installed, or the address is taken.
    """
    there = os.path.realpath(tempfile.gettempdir())  # without links, so that all names of a file are one
    with tempfile.TemporaryDirectory(prefix="amc-web-", dir=there) as folder, _environment(folder, host):
        gr = gradio()
        page = layout.build(gr, answers, examples, start, Path(folder) / UPLOADS)

        @contextlib.asynccontextmanager
        async def behind_a_gate(server: Any) -> AsyncIterator[None]:
            """Put the gate before all that Gradio does; middleware of `app_kwargs` would stand inside."""
            inner = server.middleware_stack
            server.middleware_stack = Gate(inner, Path(folder), host in LOOPBACK, MOST_BYTES, server, page.fns.keys())
            yield

        page.queue(api_open=False, max_size=MOST_WAITING)
        try:
            _, url, _ = page.launch(
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port,
                theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
                css=fragments.STYLE,
                head=fragments.SCRIPT,
                max_file_size=MOST_BYTES,
                state_session_capacity=KEPT_SESSIONS,
                app_kwargs={"lifespan": behind_a_gate, "docs_url": None, "redoc_url": None},
                footer_links=[],
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                pwa=False,
            )
        except (OSError, OverflowError) as error:  # Gradio keeps the reason to itself
            where = f"{host}, port {port}" if port is not None else f"{host}, ports from 7860"
            remedy = "; without --port, the next free one from 7860 is taken" if port is not None else ""
            raise UserError(
                f"the page cannot be served at {where}: that is taken, forbidden, or no address of this machine{remedy}"
            ) from error
        try:
            yield url
        finally:
            page.close(verbose=False)


def gradio() -> Any:
    """Gradio's module; raises `UserError` when it is not installed."""
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError(f"the page needs Gradio ({error}): pip install -r requirements-web.txt") from None
    return gr


@contextlib.contextmanager
def _environment(folder: str, host: str = LOOPBACK[0]) -> Iterator[None]:
    """What Gradio can be told by the environment alone: it reports nothing, and writes into `folder` alone.

    It also asks its own page once, and a proxy that stands in the environment knows nothing of this machine's `host`.
    """
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = ",".join([*filter(None, [direct]), *dict.fromkeys([*LOOPBACK, host])])
    wanted = {
        "no_proxy": direct,
        "NO_PROXY": direct,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_RUN_HISTORY": "False",
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_EXAMPLES_CACHE": folder,  # the examples' pictures are served, wherever uploads go
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
