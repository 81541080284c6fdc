"""Fixtures for all tests: one thread for torch, a small real data set, and functions run on real gloo ranks."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import socket
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# Set before anything imports torch: several test processes share few cores, and a process that has opened an
# OpenMP pool cannot fork ranks that use one (libgomp hangs).
os.environ["OMP_NUM_THREADS"] = "1"

GRACE_S = 3.0


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Holds for a torch that a plugin imported before this file as well."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def stdlib_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set (a 512-token BPE, several shards) of 1 MB of the standard library's own sources.

    Made once for all test processes. Tests only read it.
    """
    from muonlm.config.data import PrepareConfig
    from muonlm.data.prepare import prepare

    session_dir = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session_dir = session_dir.parent
    output, done = session_dir / "stdlib_data", session_dir / "stdlib_data.done"
    library = sysconfig.get_path("stdlib")
    config = PrepareConfig.model_validate(
        {
            "source": {
                "kind": "text",
                "files": [f"{library}/{name}/*.py" for name in ("asyncio", "email", "importlib", "json")],
            },
            "output": str(output),
            "tokenizer": {"vocab_size": 512},
            "validation_fraction": 0.1,
            "chunk_bytes": 400_000,
            "workers": 1,
        }
    )
    with FileLock(str(output) + ".lock"):
        if not done.exists():
            prepare(config, progress=False)
            done.touch()
    return output


@pytest.fixture
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """`run_ranks(fn, world_size, *args, timeout_s=60, join=True)`: fork real gloo ranks, return what each returned.

    Each rank calls `fn(rank, world_size, *args)`; `fn` may be a closure, its result must pickle. The environment is
    torchrun's. With `join` the default process group is initialised (gloo, FileStore) and destroyed around the call;
    without it the code under test joins by itself, e.g. through `muonlm.dist.process.start`.
    The exception that a rank raised first is raised here, with that rank's traceback as its cause; the other ranks get
    a few seconds to end and are killed. Ranks that hang are killed after `timeout_s`, and the TimeoutError shows where.
    """

    def run(
        fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0, join: bool = True
    ) -> list[Any]:
        for module in ("torch.distributed", "torch._dynamo"):  # so that the ranks need not each, a second every time
            importlib.import_module(module)
        scratch = tmp_path_factory.mktemp("ranks")
        context = multiprocessing.get_context("fork")
        port = _free_port()
        ranks, pipes = [], []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            task = (rank, world_size, fn, args, writer, scratch, port, timeout_s, join)
            process = context.Process(target=_rank_main, args=task, name=f"rank {rank}", daemon=True)
            process.start()
            writer.close()
            ranks.append(process)
            pipes.append(reader)
        try:
            results = _collect(pipes, ranks, scratch, timeout_s)
            for process in ranks:
                process.join(GRACE_S)
            return results
        finally:
            for process in ranks:
                process.kill()
                process.join()

    return run


class _RankTraceback(Exception):
    """Shows a rank's traceback as the cause of the exception that is raised in the test."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(
    rank: int,
    world_size: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    writer: Connection,
    scratch: Path,
    port: int,
    timeout_s: float,
    join: bool,
) -> None:
    """Body of a forked rank: sends (True, pickled result) or (False, time, pickled exception, traceback)."""
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    stacks = (scratch / f"rank_{rank}.stack").open("w")
    faulthandler.dump_traceback_later(timeout_s, file=stacks)
    try:
        if join:
            store = dist.FileStore(str(scratch / "store"), world_size)
            timeout = timedelta(seconds=timeout_s + GRACE_S)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        message: tuple[Any, ...] = (True, pickle.dumps(fn(rank, world_size, *args)))
    except BaseException as error:
        message = (False, time.monotonic(), _pickled(error), f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
    # Sent before the group is left: leaving can fail or hang once another rank has died.
    writer.send(message)
    writer.close()
    if message[0] and dist.is_initialized():
        dist.destroy_process_group()


def _pickled(error: BaseException) -> bytes:
    """Exceptions with arguments of their own may not survive pickling; their text does."""
    try:
        pickle.loads(data := pickle.dumps(error))
        return data
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _collect(
    pipes: list[Connection], ranks: list[multiprocessing.process.BaseProcess], scratch: Path, timeout_s: float
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, bytes, str]] = []
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    deadline = time.monotonic() + timeout_s + 1
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                ok, *rest = pipe.recv()
            except EOFError:
                ranks[rank].join()
                text = f"rank {rank} died with exit code {ranks[rank].exitcode} and no exception"
                ok, rest = False, [time.monotonic(), pickle.dumps(RuntimeError(text)), text]
            if ok:
                results[rank] = pickle.loads(rest[0])
            else:
                failures.append((rest[0], rest[1], rest[2]))
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failures:
        failures.sort()
        raise pickle.loads(failures[0][1]) from _RankTraceback("\n".join(text for _, _, text in failures))
    if waiting:
        stacks = [f"rank {rank} hung:\n{(scratch / f'rank_{rank}.stack').read_text()}" for rank in waiting.values()]
        raise TimeoutError(f"{len(waiting)} ranks did not end within {timeout_s} s\n" + "\n".join(stacks))
    return [results[rank] for rank in range(len(pipes))]
