"""Writing to a disk that may be full: one message to the user, and never a traceback for each line of a log."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from muonlm.track.disk import disk_errors


class LogFile(logging.FileHandler):
    """A log file that a full disk cuts short: the run's own files tell the user, the log must not stop or flood it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: what was not written is lost."""


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
