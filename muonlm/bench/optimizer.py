"""Optimizer steps of muonlm and of its peers, interleaved in one run: time, collectives, bytes beside the formula."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch

from muonlm.bench import balance
from muonlm.bench.launch import num_ranks, on_ranks
from muonlm.bench.placement import LAYOUTS, check_layout
from muonlm.bench.steps import Settings, measure
from muonlm.bench.zoo import ZOO, gpt
from muonlm.config.errors import UserError
from muonlm_kernels.bench.options import device_of, positive, writable_file
from muonlm_kernels.bench.table import table

PROG = "muonlm bench optimizer"
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
_EPILOG = f"{PROG} balance: who would compute what on up to thousands of ranks, without starting one (--help for more)"


def main(argv: list[str]) -> int:
    """`muonlm bench optimizer`: parse, measure, print. Under torchrun every rank calls it and the first one prints."""
    if argv[:1] == ["balance"]:
        return balance.main(argv[1:], prog=f"{PROG} balance")
    args = _parser().parse_args(argv)
    settings = settings_of(args)
    ranks = num_ranks(args.ranks)
    check_layout(args.layout, ranks)
    result = on_ranks(measure, settings, ranks, args.device.type, args.threads)
    if result is not None:
        print(text_of(result))
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, epilog=_EPILOG, allow_abbrev=False)
    add = parser.add_argument
    add("--ranks", type=_positive_int, default=2, metavar="N", help="local ranks to start, without torchrun [2]")
    add("--layout", choices=list(LAYOUTS), default="fsdp", help="how the weights lie on the ranks [fsdp]")
    add("--parameters", type=positive(float), default=30e6, metavar="N", help="about so many, of GPT shapes [30e6]")
    add("--model", choices=list(ZOO), metavar="NAME", help=f"the shapes of one of {', '.join(ZOO)} instead")
    add("--dtype", choices=list(DTYPES), default="auto", help="iterates of ours [auto: what is fast here]")
    add("--bucket-mb", type=positive(float), default=128.0, metavar="MB", help="assembled at a time, in 2^20 B [128]")
    add("--rounds", type=_positive_int, default=21, metavar="N", help="interleaved rounds, at most [21]")
    add("--seconds", type=positive(float), default=180.0, metavar="S", help="of them, after 3 rounds [180]")
    add("--longest-step", type=positive(float), default=30.0, metavar="S", help="leave out slower ones [30]")
    add("--tokens", type=_positive_int, default=0, metavar="N", help="also time forward and backward of so many a rank")
    add("--threads", type=_positive_int, default=1, metavar="N", help="CPU threads of a rank [1]")
    add("--device", type=device_of, default="auto", help="cpu, cuda or auto [auto]")
    add("--quick", action="store_true", help="3 rounds of small matrices: does it run?")
    add("--json", type=writable_file, metavar="FILE", help="write all figures as JSON too")
    return parser


def _positive_int(text: str) -> int:
    return int(positive(int)(text))


def settings_of(args: argparse.Namespace) -> Settings:
    """What the options ask for. Raises UserError where they do not go together."""
    model = ZOO[args.model] if args.model else gpt(5e4 if args.quick else args.parameters)
    if args.tokens and model.config is None:
        raise UserError(f"{PROG}: --tokens needs a model that muonlm can build; leave --model {args.model} out")
    return Settings(
        model=model,
        layout=args.layout,
        dtype=DTYPES[args.dtype],
        bucket_bytes=round(args.bucket_mb * 2**20),
        rounds=3 if args.quick else args.rounds,
        budget_s=args.seconds,
        longest_step_s=args.longest_step,
        tokens=args.tokens,
    )


def text_of(result: dict[str, Any]) -> str:
    """The result as tables and sentences."""
    world, model, plan = result["world"], result["model"], result["plan"]
    facts = result["machine"]
    lines = [
        f"{model['about']}: {model['matrices']} matrices, {model['elements']:,} elements; layout {world['layout']} on "
        f"{world['ranks']} ranks ({world['backend'] or 'one process'}), {facts['threads']} thread(s) each, "
        f"{facts.get('gpu', facts['processor'])}, torch {facts['torch']}",
        "",
        table(
            ("one step", "median", "interval", "times ours", "CPU time", "collectives", "MB sent by a rank"),
            [_row(row) for row in result["contenders"] if row["skipped"] is None],
        ),
        *(f"{row['name']}: left out, {row['skipped']}" for row in result["contenders"] if row["skipped"]),
        "",
        f"Medians of {result['rounds']} interleaved rounds, a step ending with its slowest rank; the intervals hold "
        f"the median with a probability of {result['contenders'][0]['coverage']:.3f}. CPU time is that of all ranks.",
        *_against_formulas(result["contenders"][0], plan),
    ]
    if result["model_seconds"]:
        lines += ["", *_proportions(result)]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> Sequence[str]:
    low, high = row["interval"]
    return (
        row["name"],
        _seconds(row["seconds"]),
        f"{_seconds(low)} to {_seconds(high)}",
        f"{row['times_ours']:.2f}",
        _seconds(row["cpu_seconds"]),
        str(row["collectives"]),
        f"{row['bytes_mean'] / 1e6:.2f}",
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _against_formulas(ours: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    formula, counted = plan["formula_bytes"], ours["bytes_mean"]
    ratio = f", {counted / formula:.3f} of it" if formula else ""
    return [
        f"Ours sends {counted / 1e6:.3f} MB a rank and step where the formula says {formula / 1e6:.3f} MB{ratio}; "
        f"the busiest rank {ours['bytes_max'] / 1e6:.3f} MB.",
        f"It takes {ours['collectives']} collectives in {plan['rounds']} round(s); 2 ceil(bytes / bucket) + 2 is "
        f"{plan['most_collectives']}.",
        f"Its busiest owner has {plan['imbalance']:.3f} times the mean load; {plan['shared_matrices']} matrices are "
        "shared by several ranks.",
    ]


def _proportions(result: dict[str, Any]) -> list[str]:
    seconds = result["model_seconds"]
    shares = [
        f"{row['name']}: {row['seconds'] / (row['seconds'] + seconds):.1%} of the step"
        for row in result["contenders"]
        if row["skipped"] is None
    ]
    head = f"With forward and backward of {result['tokens']} tokens a rank, {_seconds(seconds)} without communication:"
    return [head, *shares]
