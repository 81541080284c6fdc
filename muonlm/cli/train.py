"""`muonlm train`: one training run, alone or as a rank of torchrun."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from muonlm.cli.parser import add_config


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train",
        keys_of="train",
        help="train a model; repeating the command goes on where it stopped",
        description=(
            "Train a model. Ctrl-C or SIGTERM saves a checkpoint and ends with exit code 0; the same command\n"
            "goes on from there. On several processes: torchrun --nproc-per-node N -m muonlm train CONFIG"
        ),
    )
    add_config(parser, "train")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on from a checkpoint")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, or go on."""
    from muonlm.config.load import dump_toml, load_train

    config = load_train(args.config, args.overrides)
    if args.dry_run:
        print(dump_toml(config), end="")
        return 0
    with _stopping_at_once():
        from muonlm.train.loop import train

        status = train(config, fresh=args.fresh)
    if os.environ.get("RANK", "0") == "0":
        loss = "" if status.final_loss is None else f", validation loss {status.final_loss:.4f}"
        print(f"{status.state} at step {status.step}, {status.tokens:,} tokens{loss}: {config.resolved_run_dir}")
        if status.state == "preempted":
            print("repeat the same command to go on")
        else:
            print(f"see it with: muonlm report {config.resolved_run_dir}")
    return 0


@contextmanager
def _stopping_at_once() -> Iterator[None]:
    """A stop signal before the loop has handlers of its own ends this process with 0: there is nothing to save yet."""
    from muonlm.train.preemption import STOP_SIGNALS

    def stop(number: int, frame: object) -> None:
        print("stopped before the first step; repeat the same command to go on", file=sys.stderr, flush=True)
        raise SystemExit(0)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
