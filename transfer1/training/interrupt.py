"""Signals of a run: Ctrl-C stops it where everything can be saved, an alarm ends one that hangs."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Context manager that turns SIGINT and SIGTERM into a request; a second signal stops at once.

    Between two calls of `alive` no more than `timeout` seconds may pass.

    Data-loading workers that are forked meanwhile inherit the handler, so that a Ctrl-C in the
    terminal, which reaches every process of the group, leaves them alive to finish the step.
    Outside the main thread signals cannot be handled and nothing is changed.

    Args:
        timeout: seconds after which a run without a finished update is ended by TimeoutError.
    """

    def __init__(self, timeout: int) -> None:
        self.timeout = timeout
        self.signal: int | None = None  # number of the first signal received
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it: 130 after Ctrl-C."""
        return 128 + self.signal if self.signal else 0

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
            self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._time_out)
            self.alive()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous:
            signal.alarm(0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def alive(self) -> None:
        """Start to count the seconds of the timeout again."""
        if self._previous:
            signal.alarm(self.timeout)

    def _time_out(self, number: int, frame: FrameType | None) -> None:
        raise TimeoutError(
            f"no update finished within trainer.timeout_period={self.timeout} seconds; is the data "
            "loading or the device stuck?"
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if number == signal.SIGTERM:  # how the main process ends its workers
                os._exit(128 + number)
            return
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # Neither print nor a logger may run inside a signal handler: both hold locks.
        os.write(2, b"\nstopping after this update (again to stop at once, without saving)\n")
