"""Stop signals: a flag that the loop looks at after each step, so that a run is saved before it ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import NoReturn, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SAME_KEYSTROKE_S = 1.0
_log = logging.getLogger(__name__)


class StopSignals:
    """Context manager that turns SIGINT, SIGTERM, SIGUSR1 and SIGHUP into `requested`; a second SIGINT kills.

    A SIGINT within a second of the first is taken for the same one, because a launcher and the terminal may both
    deliver it. Outside the main thread, where Python allows no handlers, nothing is installed.

    `at_once` is for times when there is nothing to save: a signal then ends this process with exit code 0.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.name: str | None = None
        self._at_once = at_once
        self._interrupted_at: float | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """True once a signal came to this rank."""
        return self.name is not None

    def set_at_once(self, at_once: bool) -> None:
        """Whether a signal from now on ends the process at once; so does one that came before."""
        self._at_once = at_once
        if at_once and self.requested:
            _end()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) == signal.SIG_IGN and number == signal.SIGHUP:
                    continue  # nohup
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._interrupted_at is not None:
            if now - self._interrupted_at > _SAME_KEYSTROKE_S:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            return
        if number == signal.SIGINT:
            self._interrupted_at = now
        self.name = signal.Signals(number).name
        if self._at_once:
            _end()


def _end() -> NoReturn:
    sys.stderr.write("stopped before the first step; repeat the same command to go on\n")
    raise SystemExit(0)
