"""`muonlm train`: one training run, alone or as a rank of torchrun."""

from __future__ import annotations

import argparse
import os
from typing import Any

from muonlm.cli.parser import add_config, forget_stdout


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
    # Handlers first: what is imported below takes seconds. One process alone has nobody to agree with.
    from muonlm.train.preemption import StopSignals

    with StopSignals(at_once=os.environ.get("WORLD_SIZE", "1") == "1") as stop:
        from muonlm.config.load import dump_toml, load_train

        config = load_train(args.config, args.overrides)
        if args.dry_run:
            print(dump_toml(config), end="")
            return 0
        from muonlm.train.loop import train

        status = train(config, fresh=args.fresh, stop=stop)
    if os.environ.get("RANK", "0") == "0":
        loss = "" if status.final_loss is None else f", validation loss {status.final_loss:.4f}"
        report = f"see it with: muonlm report {config.resolved_run_dir}"
        then = "repeat the same command to go on" if status.state == "preempted" else report
        try:
            print(f"{status.state} at step {status.step}, {status.tokens:,} tokens{loss}: {config.resolved_run_dir}")
            print(then, flush=True)
        except OSError:  # a pipe that has gone, or a full disk behind it, makes no failure of a run
            forget_stdout()
    return 0
