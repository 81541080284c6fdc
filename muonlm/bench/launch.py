"""Runs a measurement on ranks: those that torchrun has started, or local ones that are started here."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.multiprocessing.spawn import start_processes

from muonlm.config.errors import UserError
from muonlm.config.schema import DistConfig
from muonlm.dist import process

Work = Callable[[process.World, Any], Any]
_TIMEOUT_S = 900.0


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def num_ranks(wanted: int) -> int:
    """How many ranks there will be: those of torchrun, else as many as are wanted."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else wanted


def on_ranks(work: Work, settings: Any, ranks: int, device: str, threads: int) -> Any:
    """What `work(world, settings)` returns on rank 0; None on the other ranks of torchrun.

    Without torchrun `ranks` processes are started on this machine, with `threads` CPU threads each. `work` is a
    function of a module and `settings` can be pickled. Raises UserError where a rank did, else torch's error that
    shows the traceback of the rank.
    """
    if under_torchrun() or ranks == 1:
        return _joined(work, settings, device, threads)
    # A forked process starts at once, but cannot use a GPU.
    method = "fork" if device == "cpu" or not torch.cuda.is_available() else "spawn"
    with tempfile.TemporaryDirectory() as scratch:
        task = (work, settings, ranks, device, threads, _free_port(), scratch)
        try:
            start_processes(_rank_main, task, nprocs=ranks, start_method=method)
        except (ProcessRaisedException, ProcessExitedException) as error:
            for path in sorted(Path(scratch).glob("error.*")):
                raise UserError(path.read_text()) from error
            raise
        return pickle.loads((Path(scratch) / "result").read_bytes())


def _rank_main(
    rank: int, work: Work, settings: Any, ranks: int, device: str, threads: int, port: int, scratch: str
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        result = _joined(work, settings, device, threads)
    except UserError as error:
        (Path(scratch) / f"error.{rank}").write_text(str(error))
        raise
    if rank == 0:
        (Path(scratch) / "result").write_bytes(pickle.dumps(result))


def _joined(work: Work, settings: Any, device: str, threads: int) -> Any:
    torch.set_num_threads(threads)
    world = process.start(DistConfig(timeout_s=_TIMEOUT_S), device)
    result = work(world, settings)
    process.shutdown()
    return result if world.is_main else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
