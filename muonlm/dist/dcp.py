"""torch.distributed.checkpoint: warnings that say nothing to users, and what damaged files give."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed.checkpoint as dcp

# torch's pickled metadata among them.
UNREADABLE = (
    dcp.api.CheckpointException, OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, ImportError,
    pickle.UnpicklingError,
)  # fmt: skip


@contextmanager
def quiet_checkpoints() -> Iterator[None]:
    """Without the warning that one process is enough for torch.distributed.checkpoint, and that of ShardedTensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        # It is what state that lies whole on owners is given to torch.distributed.checkpoint as.
        warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
        yield
