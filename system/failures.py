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

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, and not declared so

POLL, GRACE = 1.0, 10.0  # seconds between two looks, and until a process that does not notice by itself is ended


class Watch:
    """Looks, in a thread, under a key of the group's store whether another process has failed; one for each process."""

    def __init__(self, host: str, port: int, key: str) -> None:
        # Its own connection: the group's waits while a process waits for another.
        self.store = TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=30))
        self.key = key
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
