"""What a run is asked from outside: SIGTERM and SIGINT end it, SIGUSR1 saves; all processes act after the same step."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import utils

# Asked to end: a scheduler's SIGTERM, a terminal's Ctrl-C. SIGUSR1 asks to save and go on; not all systems have it.
STOPS = (signal.SIGTERM, signal.SIGINT)
SAVE = getattr(signal, "SIGUSR1", None)
ECHO = 1.0  # seconds in which torchrun passes on a Ctrl-C that the terminal sent to its processes as well


class Stopped(utils.AgreedExit):
    """A run that ends because a signal asked for it; the exit status is that of a program which the signal ended."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Requests:
    """Signals while a block runs: each is noted, to be acted upon between two steps. A second SIGINT ends at once.

    SIGTERM and SIGINT are noted once training begins (`begin`): before, they end the process as always.
    """

    def __init__(self) -> None:
        self.stop, self.save, self.interrupted = 0, False, 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Requests":
        if SAVE is not None:
            self.before[SAVE] = signal.signal(SAVE, self._note)
        return self

    def begin(self) -> None:
        """From here on there is something to save."""
        for number in STOPS:
            self.before.setdefault(number, signal.signal(number, self._note))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self.save = True
            return
        if number == signal.SIGINT:
            echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.interrupted < ECHO
            if self.interrupted and not echo:
                _tell("stopped at once, without a checkpoint\n")
                os._exit(128 + number)
            if not self.interrupted:
                _tell("SIGINT: the run saves and ends after this step; a second Ctrl-C ends it at once\n")
            self.interrupted = time.monotonic()
        self.stop = max(self.stop, number)

    def agreed(self, due: bool) -> tuple[bool, int]:
        """Whether any process wants a checkpoint (`due`, or by a signal), and the signal that ends the run, or 0.

        All processes get the same answer (a collective call).
        """
        if self.save:  # before the exchange: what is asked while this process waits counts for the next step
            due, self.save = True, False
        save, stop = utils.largest_of_all([int(due), self.stop])
        return bool(save), stop


def _tell(message: str) -> None:
    """Write to the terminal from a signal's handler, which may have interrupted a print."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())


def ignore_in_worker(worker: int = 0) -> None:
    """In a loader's process: signals to the whole group of processes must not end it before the run has saved.

    SIGTERM from its training process alone ends it: so Python ends the children that are left at its exit.
    """
    for number in (signal.SIGINT, SAVE):
        if number is not None:
            signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent and hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
