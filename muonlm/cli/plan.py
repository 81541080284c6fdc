"""`muonlm plan`: what a run will need, from its config alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonlm.cli.parser import add_config
from muonlm.config.errors import UserError

if TYPE_CHECKING:
    from muonlm.config.schema import TrainConfig
    from muonlm.plan.hardware import Machines

_SHARES = {
    "matmul_share": "of the peak, by the model's matrix products",
    "newton_schulz_share": "of the peak, by Newton-Schulz",
    "link_share": "of bandwidths",
    "overlap_share": "of the model's computation, behind which parameters and gradients can travel",
    "usable_share": "of the memory, by the run",
}


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "plan",
        keys_of="train",
        help="parameters, memory, traffic, FLOPs and predicted time of a run before it starts",
        description="Parameters, memory, traffic, FLOPs and predicted time of a run, from its config, on any machine.\n"
        "Exit code 1 where it cannot fit into memory, without --gpu and --nodes into what this machine has\n"
        "left. What the lines mean: docs/planning.md.",
    )
    add_config(parser, "train", dry_run=False)
    add = parser.add_argument
    add(
        "--gpu",
        metavar="NAME",
        help="h100-80gb, h200-141gb, a100-80gb, a100-40gb, b200-180gb, mi300x-192gb, l40s-48gb; h100-80gb by default "
        "with --nodes or --gpus-per-node, else CPUs of this machine",
    )
    add("--nodes", type=_positive, metavar="N", help="number of nodes; without it and --gpus-per-node one rank")
    add(
        "--gpus-per-node", type=_positive, metavar="N", help="devices of a node, a rank each; 8 by default with --nodes"
    )
    add(
        "--world-size",
        type=_positive,
        metavar="N",
        help="number of ranks in one node, in place of the two; 1 by default",
    )
    add("--vocab-size", type=_positive, metavar="N", help="where neither config nor data tell it")
    add("--network-gbit", type=_number, metavar="X", help="bandwidth of a device to other nodes, Gbit/s")
    add("--memory-gb", type=_number, metavar="X", help="memory of a device, in 10^9 bytes")
    add("--peak-tflops", type=_number, metavar="X", help="peak of a device, TFLOP/s")
    for name, text in _SHARES.items():
        add(f"--{name.replace('_', '-')}", type=_share, metavar="X", help=f"share attained, 0 to 1: {text}")
    add("--json", type=Path, metavar="FILE", help="write all figures as JSON too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the forecast; 1 where the run cannot fit."""
    from muonlm.config.load import load_train

    config = load_train(args.config, args.overrides)
    from muonlm.plan.forecast import forecast
    from muonlm.plan.table import render

    world_size, machines = _machines(args)
    vocab_size = find_vocab_size(config, args.vocab_size)
    plan = forecast(config, vocab_size=vocab_size, world_size=world_size, machines=machines)
    print(render(plan))
    if config.dist.engine != "torch":
        print(f'dist.engine = "{config.dist.engine}": what torch\'s engine keeps and sends is planned, and no offload')
    if args.json:
        try:
            args.json.write_text(json.dumps(plan.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json: cannot write {args.json}: {error.strerror}") from None
    return 1 if plan.misfit else 0


def _machines(args: argparse.Namespace) -> tuple[int, Machines]:
    """Number of ranks, and what they run on."""
    from muonlm.plan.hardware import Machines, find_device
    from muonlm.plan.machine import host_memory_bytes

    in_nodes = args.nodes is not None or args.gpus_per_node is not None
    if in_nodes and args.world_size is not None:
        raise UserError("give either --world-size or --nodes and --gpus-per-node")
    name = args.gpu or ("h100-80gb" if in_nodes else "cpu")
    device = find_device(name)
    per_node = args.gpus_per_node or 8
    world_size = (args.nodes or 1) * per_node if in_nodes else args.world_size or 1
    given = {
        "network_gbit": args.network_gbit,
        "memory_bytes": args.memory_gb and int(args.memory_gb * 1e9),
        "peak_flops": args.peak_tflops and args.peak_tflops * 1e12,
    }
    device = replace(device, **{key: value for key, value in given.items() if value is not None})
    shares = {key: getattr(args, key) for key in _SHARES if getattr(args, key) is not None}
    machines = Machines(name, device, per_node if in_nodes else world_size, **shares)
    if args.gpu or in_nodes or args.memory_gb or (left := host_memory_bytes()) is None:
        return world_size, machines
    # No hardware is named: what `muonlm train` would find here, which keeps no margin.
    device = replace(device, memory_bytes=left // world_size)
    return world_size, replace(machines, device=device, usable_share=args.usable_share or 1.0, is_here=True)


def find_vocab_size(config: TrainConfig, given: int | None) -> int:
    """From the config, else the option, else the prepared data, else the data config that would prepare them.

    Raises UserError where that is less than the prepared data have, as `muonlm train` does.
    """
    from muonlm.data.manifest import MANIFEST_NAME, read_manifest

    wanted = config.model.vocab_size or given
    if (Path(config.data.path) / MANIFEST_NAME).is_file():
        of_data = read_manifest(Path(config.data.path)).vocab_size
        if wanted is not None and wanted < of_data:
            raise UserError(
                f"a vocabulary of {wanted} is less than the {of_data} token ids of {config.data.path}; leave out "
                "model.vocab_size and --vocab-size, or prepare the data with a smaller vocabulary"
            )
        return wanted or of_data
    if wanted:
        return wanted
    if config.data.prepare:
        from muonlm.config.load import load_prepare

        tokenizer = load_prepare(config.data.prepare).tokenizer
        if tokenizer.existing is None:
            return tokenizer.vocab_size
    raise UserError(
        f"the vocabulary is not known before {config.data.path} is prepared; give --vocab-size N to muonlm plan, or "
        "set model.vocab_size=N"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 10^9")
    return int(text)


def _number(text: str) -> float:
    return _between(text, 1e-3, 1e9)


def _share(text: str) -> float:
    return _between(text, 1e-6, 1)


def _between(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:g} to {most:g}")
    return value
