"""TensorBoard and Weights & Biases. Their packages are imported only when a run asks for them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.track.disk import disk_errors


class TensorBoardSink:
    """Writes event files to `<run_dir>/tensorboard`; needs the package tensorboard."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("track.tensorboard", "tensorboard") from error
        # purge_step hides what an earlier attempt wrote beyond the checkpoint.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """One scalar for each number of a train or eval record."""
        for name, value in _scalars(kind, record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """Logs to Weights & Biases, offline (a folder for `wandb sync`) or online; needs the package wandb."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("track.wandb", "wandb") from error
        id_file = run_dir / "wandb_id"
        with disk_errors(id_file):
            if not id_file.exists():
                id_file.write_text(uuid.uuid4().hex[:12] + "\n")
        self._run = wandb.init(
            project=config.track.wandb_project,
            name=config.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            mode="online" if config.track.wandb == "online" else "offline",
            config=config.model_dump(),
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """The numbers of a train or eval record at its step."""
        scalars = dict(_scalars(kind, record))
        if scalars:
            self._run.log(scalars, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _scalars(kind: str, record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers of a record as (train/loss, 3.2), (train/lr/hidden, 0.004) ...; the final evaluation as final/..."""
    if kind == "event":
        return
    prefix = "final" if record.get("final") else kind
    for key, value in record.items():
        if key == "step":
            continue
        for name, number in value.items() if isinstance(value, dict) else [(None, value)]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield f"{prefix}/{key}" + (f"/{name}" if name else ""), number


def _missing(option: str, package: str) -> UserError:
    return UserError(f"{option} needs the package {package}, which is missing; pip install 'muonlm[tracking]'")
