"""Read single tensors of a checkpoint, without a model: memory is that of the tensor at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from muonlm.checkpoint import store
from muonlm.config.errors import UserError
from muonlm.dist.dcp import UNREADABLE, quiet_checkpoints

_MODEL = "model."


def find(run: str | Path, step: int | None = None) -> Path:
    """The checkpoint of `step`, by default the newest complete one; `run` is a run directory or a checkpoint in it.

    Raises UserError where there is none, or it is incomplete or damaged.
    """
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; give a run directory, such as runs/smoke")
    if (run / store.MARKER).is_file():
        if step is not None and run.name != store.step_name(step):
            raise UserError(f"{run} is a checkpoint of another step than {step}; give its run directory, or no step")
        return _checked(run)
    if step is None:
        path = store.latest(run)
        if path is None:
            raise UserError(f"{run} has no complete checkpoint; a run writes one at its end")
        return path
    path = run / store.FOLDER / store.step_name(step)
    if not path.is_dir():
        there = [str(int(p.name.removeprefix("step_"))) for p in sorted((run / store.FOLDER).glob("step_*"))]
        kept = f"there are {', '.join(there)}" if there else "there is none"
        raise UserError(f"{run} has no checkpoint of step {step}: {kept} (checkpoint.keep says how many stay)")
    return _checked(path)


def _checked(path: Path) -> Path:
    if problem := store.defect(path, is_read=True):
        raise UserError(f"checkpoint {path} is incomplete or damaged: {problem}; take another step")
    return path


class StoredModel:
    """The model's tensors in a checkpoint, by name, each read when asked for.

    Raises UserError when the checkpoint's metadata cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            stored = dcp.FileSystemReader(self.path).read_metadata().state_dict_metadata
        except UNREADABLE as error:
            raise UserError(f"checkpoint {path} cannot be read: {error}; take another step") from error
        self._stored = {
            name.removeprefix(_MODEL): entry
            for name, entry in stored.items()
            if name.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
        }

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(entry.size) for name, entry in self._stored.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole, on the CPU, in the dtype it was saved in. Raises UserError when it cannot be read."""
        entry = self._stored[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with quiet_checkpoints():
                dcp.load({_MODEL + name: tensor}, checkpoint_id=self.path, no_dist=True)
        except UNREADABLE as error:
            raise UserError(f"checkpoint {self.path}: {name} cannot be read: {error}; take another step") from error
        return tensor
