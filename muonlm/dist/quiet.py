"""Warnings of torch.distributed.checkpoint that say nothing to users."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_checkpoints() -> Iterator[None]:
    """Without the warning that one process is enough for torch.distributed.checkpoint, and that of ShardedTensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        # It is what state that lies whole on owners is given to torch.distributed.checkpoint as.
        warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
        yield
