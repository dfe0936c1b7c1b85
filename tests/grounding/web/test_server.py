"""The server of demo.py --web and its command line."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import demo
from dataset.scenes.paths import SHIPPED, SHIPPED_CONFIG
from grounding.web import server
from grounding.web.examples import BEFORE, Offer, Start, examples
from grounding.web.session import Answers
from tests.grounding.web.conftest import PATIENCE, Site
from utils import UserError

pytest.importorskip("gradio", reason="the page needs requirements-web.txt")
httpx = pytest.importorskip("httpx", reason="comes with Gradio")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::Warning:gradio")]  # of what it uses


def test_the_server_connects_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to report its use, nor through a proxy to the page itself."""
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # where nothing answers
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect", pytest.fail)
        patch.setattr(socket, "getaddrinfo", pytest.fail)
        started = server.running(Answers([Offer("x", SHIPPED)], pytest.fail), [], host="127.0.0.1")
        url = started.__enter__()
    with httpx.Client(trust_env=False) as client:
        assert client.get(url, timeout=PATIENCE).status_code == 200
    started.__exit__(None, None, None)


def test_addresses_that_are_taken(site: Site) -> None:
    taken = int(site.url.rpartition(":")[2])
    for port in (taken, 80_000):
        with (
            pytest.raises(UserError, match=rf"served at 127\.0\.0\.1, port {port}: that is taken, .* without --port"),
            server.running(Answers([Offer("x", SHIPPED)], pytest.fail), [], port=port),
        ):
            pass
    with server.running(Answers([Offer("x", SHIPPED)], pytest.fail), []) as url:  # the next free one
        assert url.rstrip("/") != site.url
        assert "Examples" not in httpx.get(url, timeout=PATIENCE).text
        port = int(url.rstrip("/").rpartition(":")[2])
    with socket.socket() as closed:
        assert closed.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_leaves_nothing_on_disk(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job ignores it
        "from dataset.scenes.paths import SHIPPED; from grounding.web import server; "
        "from grounding.web.session import Answers; from grounding.web.examples import *; "
        "server.serve(Answers([Offer('x', SHIPPED)], None), examples(), '127.0.0.1', None, Start())"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path), "MPLCONFIGDIR": "/tmp"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert "stop it with Ctrl-C" in line
        url = line.split()[4]
        assert httpx.post(f"{url}picture?name=a.png", content=b"x", timeout=PATIENCE).status_code == 400
        image = examples()[0].path.read_bytes()
        assert httpx.post(f"{url}picture?name=a.png", content=image, timeout=PATIENCE).status_code == 200
        server.send_signal(number)
        assert server.wait(30) == (-number if number == signal.SIGKILL else 0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []  # Gradio makes an empty folder


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True), ("localhost", False)])
def test_an_open_address_is_warned_of(
    host: str, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        def wait(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(server.threading, "Event", Interrupted)
    monkeypatch.setattr(server.signal, "signal", lambda number, handler: None)

    @contextlib.contextmanager
    def running(*given: Any) -> Iterator[str]:
        assert given[2:] == (host, 7861, Start())
        yield "http://there/"

    monkeypatch.setattr(server, "running", running)
    server.serve(Answers([], pytest.fail), [], host, 7861, Start())
    shown = capsys.readouterr().out
    assert ("everyone who reaches this address" in shown) == warned
    assert "http://there/" in shown


def test_options_of_the_command_line(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(server, "serve", lambda *given: calls.append(given))
    changed = site.scene.parents[2] / "changed.safetensors"
    words = ["--web", "--checkpoints", str(SHIPPED), str(changed), "--config", str(SHIPPED_CONFIG), "--device", "cpu"]
    words += ["--text_encoder", str(site.scene.parents[1] / "text_encoder"), "--set", "block_num=4", "--port", "7999"]
    words += ["--gradcam_mode", "itc", "--block_num", "2", "--threshold", "0.3", "--colormap", "cividis"]
    words += ["--precision", "bf16", "--force_precision"]
    demo.main(demo.parse_args([*words, "--benchmark", "flickr", "--host", "0.0.0.0"]))
    ((answers, shown, host, port, start),) = calls
    assert (host, port, start) == ("0.0.0.0", 7999, ("itc", 2, 0.3, "cividis"))
    assert shown == examples()
    assert [offer.checkpoint for offer in answers.offers.values()] == [SHIPPED, changed]
    opened = answers.opened(changed.name)
    assert (opened.config.block_num, list(opened.model.layers("itm"))) == (4, [2, 3, 4])
    assert answers.explain == {"precision": "bf16"}
    assert answers.resize is demo.BENCHMARKS["flickr"].resize
    demo.main(demo.parse_args(["--web", "--checkpoint", str(SHIPPED)]))
    assert list(calls[1][0].offers) == [SHIPPED.name]
    monkeypatch.setattr(demo, "offered", lambda paths, config: [Offer(BEFORE, SHIPPED)])
    demo.main(demo.parse_args(["--web"]))
    assert calls[2][2:4] == ("127.0.0.1", None)


def test_command_lines_that_do_not_fit_a_page(site: Site) -> None:
    for message, words in {
        "^--web: images and phrases are chosen on the page": ["--web", "x.jpg"],
        "^--checkpoints belongs to --web": ["x.jpg", "dog", "--checkpoints", "a", "b"],
        "^--colormap nope": ["--web", "--colormap", "nope"],
        "^the threshold is a share .* not 7.0": ["--web", "--threshold", "7"],
        "^none.pth: no such checkpoint": ["--web", "--checkpoints", "none.pth"],
        f"^--block_num 9: {SHIPPED.name} has no layer 9 in mode itm, only 2, 3, 4$": [
            *("--web", "--checkpoint", str(SHIPPED), "--block_num", "9"),
            *("--text_encoder", str(site.scene.parents[1] / "text_encoder"), "--device", "cpu"),
        ],
    }.items():
        with pytest.raises(UserError, match=message):
            demo.main(demo.parse_args(words))


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """demo.py starts without Gradio, and says how to get it when it is needed."""
    code = (
        f"import runpy, sys; sys.modules['gradio'] = None; sys.argv = ['demo.py', '--web', '--checkpoint', '{SHIPPED}']"
    )
    code += "; runpy.run_path('demo.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: the page needs Gradio")
    assert done.stderr.strip().endswith("pip install -r requirements-web.txt")
