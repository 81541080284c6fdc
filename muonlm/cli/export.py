"""`muonlm export` and `muonlm import`: models of other libraries from a run, and runs from such models."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from muonlm.config.errors import UserError

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def add(commands: Any) -> None:
    """Register both commands."""
    export = commands.add_parser(
        "export",
        help="write a run's model for transformers and what reads its format",
        description="Write the model of a checkpoint as safetensors with configuration, tokenizer and model card.\n"
        "See docs/exporting.md.",
    )
    export.add_argument("source", metavar="RUN", help="run directory, or a checkpoint in it")
    export.add_argument("--to", choices=["hf"], default="hf", help="format: hf is that of transformers (default)")
    export.add_argument("directory", metavar="DIR", help="where to write; must not exist or be empty")
    export.add_argument("--step", type=int, metavar="N", help="checkpoint of this step; the newest by default")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    export.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of one file, as 500MB or 5GB (default)")
    export.add_argument("--data", metavar="DIR", help="the run's prepared data, if it is not at data.path any more")
    export.add_argument("--force", action="store_true", help="replace the model that is in DIR")
    export.set_defaults(run=_export)
    to_config = commands.add_parser(
        "import",
        help="the config keys that continue the pretraining of a model",
        description="Print `init_from` and the [model] table for a model in the format of transformers\n"
        "(Qwen3, Qwen3-MoE, GLM-4-MoE), as TOML. See docs/exporting.md.",
    )
    to_config.add_argument("directory", metavar="DIR", help="directory with config.json and safetensors files")
    to_config.add_argument("--out", metavar="FILE", help="write a config file instead of printing it")
    to_config.set_defaults(run=_import)


def parse_bytes(text: str) -> int:
    """Bytes of `5GB`, `20MB`, `64kB` (powers of 1000) or a plain number. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise UserError(f"--shard-size {text} is no size; give one such as 500MB or 5GB")
    return size


def _export(args: argparse.Namespace) -> int:
    shard_bytes = parse_bytes(args.shard_size)
    from muonlm.bridge.export import Checkpoint, export_checkpoint
    from muonlm.checkpoint.read import StoredModel, find

    path = find(args.source, args.step).resolve()
    stored = StoredModel(path)
    checkpoint = Checkpoint(path.parents[1], path, int(path.name.removeprefix("step_")), stored.shapes, stored.read)
    target = Path(args.directory).resolve()
    done = export_checkpoint(
        checkpoint, target, dtype=args.dtype, shard_bytes=shard_bytes, data=args.data, force=args.force
    )
    files = f"{done.num_files} files" if done.num_files > 1 else "one file"
    print(
        f"{args.directory}: step {checkpoint.step} as {done.architecture}, {done.num_parameters:,} parameters, "
        f"{done.num_bytes / 1e6:,.1f} MB in {files}"
    )
    return 0


def _import(args: argparse.Namespace) -> int:
    import tomli_w

    from muonlm.bridge.architectures import from_hf_config, read_hf_config

    hf = read_hf_config(args.directory)
    config = from_hf_config(hf, args.directory)
    table = {"init_from": str(Path(args.directory).resolve()), "model": config.model_dump(exclude_unset=True)}
    text = f"# {hf['architectures'][0]}; add name, [data] and [loop], here or on the command line.\n"
    text += tomli_w.dumps(table)
    if args.out is None:
        print(text, end="")
        return 0
    try:
        with open(args.out, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error.strerror}; give another --out") from error
    print(args.out)
    return 0
