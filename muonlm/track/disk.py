"""A failed write of a run's file, as one message to the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from muonlm.config.errors import UserError


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
