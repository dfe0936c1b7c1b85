"""A failure of one process ends all of them: its message comes first, the others follow within seconds.

No collective is called for it, since the others may wait in one that never ends. Processes tell each other by the
store through which the group was formed.
"""

import contextlib
import datetime
import os
import sys
import threading
from typing import NoReturn
from urllib.parse import urlparse

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, and not declared so

POLL, GRACE = 1.0, 10.0  # seconds between two looks, and until a process that does not notice by itself is ended


class Watch:
    """Looks, in a thread, whether another process has failed; one for each process of a group.

    Raises `ValueError` where the group's store has no address (dist_url is neither env:// nor tcp://).
    """

    def __init__(self, dist_url: str) -> None:
        if dist_url == "env://":
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        else:
            place = urlparse(dist_url)
            if place.scheme != "tcp" or place.hostname is None or place.port is None:
                raise ValueError(f"{dist_url}: no address of a store")
            host, port = place.hostname, place.port
        self.store = TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=30))
        # torchrun's store outlives a restart.
        parts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"))
        self.key = "/".join(["amc_failed", *parts])
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, name="failures", daemon=True)
        self.thread.start()

    def tell(self, message: str) -> str:
        """Tell the others of this process's failure; returns the message of the one that failed first."""
        return self.store.compare_set(self.key, "", message).decode()

    def close(self) -> None:
        """Stop to look, at the end of a program that has done its work."""
        self.done.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.done.wait(POLL):
            try:
                reason = self.store.get(self.key).decode() if self.store.check([self.key]) else ""
            except RuntimeError:
                reason = "the process that all others are connected to is gone"
            if reason:
                if not self.done.wait(GRACE):  # else the main thread has noticed
                    end(f"ended: {reason}")
                return


def end(message: str, status: int = 1) -> NoReturn:
    """Print a message, if there is one, and end this process at once: no destructor or thread can hold it up."""
    with contextlib.suppress(OSError, ValueError):
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)
