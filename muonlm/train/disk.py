"""Writing to a disk that may be full: one message to the user, and never a traceback for each line of a log."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from muonlm.config.errors import UserError


class LogFile(logging.FileHandler):
    """A log file that a full disk cuts short: the run's own files tell the user, the log must not stop or flood it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: what was not written is lost."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write into a UserError that names the place. A run that ends so goes on from its checkpoint."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Free space there, or set run_dir to another place, "
            "and repeat the command"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
