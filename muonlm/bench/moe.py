"""Forward and backward pass of a mixture-of-experts layer beside transformers' Glm4MoeMoE with the same weights."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from muonlm.bridge.architectures import to_hf_config
from muonlm.config.errors import UserError
from muonlm.config.schema import MoEConfig
from muonlm.dist.precision import bfloat16_is_fast
from muonlm.model.moe import MoE
from muonlm_kernels.bench.timing import interleaved, machine, median_interval, timer_for

OURS = "muonlm"
# The order of transformers' documentation; the first is what a model gets that asks for nothing, where it can run.
THEIRS = ("grouped_mm", "eager", "batched_mm")


def main(argv: list[str]) -> int:
    """`muonlm bench moe`: parse, measure, print."""
    parser = argparse.ArgumentParser(prog="muonlm bench moe", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a pass [%(default)s]")
    parser.add_argument("--hidden-size", type=int, default=256, help="width of the residual stream [%(default)s]")
    parser.add_argument("--expert-size", type=int, default=512, help="width of an expert [%(default)s]")
    parser.add_argument("--experts", type=int, default=8, help="routed experts [%(default)s]")
    parser.add_argument("--per-token", type=int, default=2, help="experts of a token [%(default)s]")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads [%(default)s]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[%(default)s]")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON too")
    args = parser.parse_args(argv)
    if args.tokens < 1 or args.rounds < 1 or args.threads < 1:
        raise UserError("muonlm bench moe: --tokens, --rounds and --threads must be at least 1")
    config = MoEConfig(
        num_layers=1,
        num_dense_layers=0,
        hidden_size=args.hidden_size,
        expert_size=args.expert_size,
        num_experts=args.experts,
        experts_per_token=args.per_token,
    )
    torch.set_num_threads(args.threads)
    result = bench_moe(config, tokens=args.tokens, rounds=args.rounds, device=torch.device(args.device))
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


def bench_moe(config: MoEConfig, *, tokens: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a forward and backward pass of each contender on the same tokens, in interleaved rounds.

    Products run in bfloat16 (autocast) where the device multiplies it fast, else in float32. Returns {"seconds":
    {contender: [of each round]}, "failed": {contender: why}, "differences": {contender: largest difference of output or
    gradient from ours, relative to the largest value, in float32: rounded scores send some tokens elsewhere}, "dtype",
    "machine", "shape"}. Raises UserError where transformers is not installed.
    """
    dtype = torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    torch.manual_seed(0)
    ours = MoE(config).to(device)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=config.hidden_size**-0.5)
    layers: dict[str, nn.Module] = {OURS: ours}
    layers |= {f"transformers {name}": _theirs(config, ours, name) for name in THEIRS}
    x_BTD = torch.randn(1, tokens, config.hidden_size, device=device, requires_grad=True)
    grad_BTD = torch.randn_like(x_BTD)
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    results: dict[str, list[Tensor]] = {}
    failed: dict[str, str] = {}
    first: dict[str, float] = {}
    for name, layer in layers.items():
        call = partial(_pass, layer, x_BTD, grad_BTD, dtype)
        try:
            results[name] = _pass(layer, x_BTD, grad_BTD, torch.float32)
            begin = time.perf_counter()
            call()
            first[name] = time.perf_counter() - begin
        except (RuntimeError, MemoryError) as error:  # batched_mm copies an expert for every token
            failed[name] = str(error).splitlines()[0]
        else:
            calls[name] = call
    slow = [name for name, duration in first.items() if duration > _SLOW * first[OURS]]
    seconds = interleaved(calls, timer_for(device), rounds=rounds, once=slow)
    return {
        "shape": {key: getattr(config, key) for key in _SHAPE} | {"tokens": tokens},
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine(device),
        "seconds": seconds,
        "failed": failed,
        "differences": {name: _difference(results[name], results[OURS]) for name in calls if name != OURS},
    }


_SLOW = 20  # times as long as ours: timed once
_SHAPE = ("hidden_size", "expert_size", "num_experts", "experts_per_token")


def _pass(layer: nn.Module, x_BTD: Tensor, grad_BTD: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of the input and of the expert matrices, in the same order for all."""
    with torch.autocast(x_BTD.device.type, dtype, enabled=dtype != torch.float32):
        out = layer(x_BTD)
    out = out[0] if isinstance(out, tuple) else out
    named = dict(layer.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(out, [*named.values(), x_BTD], grad_BTD.to(out.dtype))[:-1]))
    gate_up = gradients.get("experts.gate_up_proj")
    if gate_up is None:
        gate_up = torch.cat((gradients["experts.gate_proj"], gradients["experts.up_proj"]), 1)
    return [out.detach(), gate_up, gradients["experts.down_proj"], gradients["gate.weight"]]


def _theirs(config: MoEConfig, ours: MoE, implementation: str) -> nn.Module:
    try:
        from transformers import Glm4MoeConfig
        from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeForCausalLM
    except ImportError as error:
        raise UserError("muonlm bench moe needs transformers: pip install 'muonlm[evaluation]'") from error
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**to_hf_config(config, 8)))
    model.set_experts_implementation(implementation)
    layer = model.model.layers[0].mlp
    state = ours.state_dict()
    gate_up = torch.cat((state.pop("experts.gate_proj"), state.pop("experts.up_proj")), 1)
    layer.load_state_dict(state | {"experts.gate_up_proj": gate_up})
    return layer.to(ours.gate.weight.device)


def _difference(theirs: list[Tensor], ours: list[Tensor]) -> float:
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in zip(theirs, ours))


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    console = Console()
    shape, seconds = result["shape"], result["seconds"]
    title = (
        f"{shape['tokens']} tokens, {shape['num_experts']} experts of width {shape['expert_size']}, "
        f"{shape['experts_per_token']} a token, hidden size {shape['hidden_size']}, {result['dtype']}, "
        f"{result['machine']['threads']} thread(s), torch {result['machine']['torch']}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("contender", "ms", "time / ours", "largest difference"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[OURS])]
        low, high, _ = median_interval(ratios)
        ratio = "" if name == OURS else f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
        difference = "" if name == OURS else f"{result['differences'][name]:.1e}"
        table.add_row(name, f"{statistics.median(values) * 1e3:.2f}", ratio, difference)
    console.print(table)
    for name, reason in result["failed"].items():
        console.print(f"{name}: {reason}")
    console.print("time / ours: median of the ratios within rounds (and the interval of 95 %); above 1 ours is faster")
