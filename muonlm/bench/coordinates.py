"""Coordinate check: how far a step moves activations and logits of models of several widths (arXiv:2203.03466, D.1).

Where learning rates transfer, that does not depend on the width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from muonlm.config.errors import UserError
from muonlm.config.model import GPTConfig
from muonlm.config.optim import AdamWConfig, AuxConfig, MuonConfig
from muonlm.model.build import build_model
from muonlm.model.gpt import GPT
from muonlm.optim.build import build_optimizer

_LAYERS = {"self_attn": "attention", "mlp": "mlp"}
HEAD_DIM, VOCAB, BATCH, SEQ_LEN = 16, 128, 16, 32


def main(argv: list[str]) -> int:
    """`muonlm bench coordinates`: parse, measure, print."""
    parser = argparse.ArgumentParser(prog="muonlm bench coordinates", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], help="[64 128 256 512]")
    parser.add_argument("--steps", type=int, default=4, help="steps to average over [4]")
    args = parser.parse_args(argv)
    if args.steps < 1 or any(width % HEAD_DIM for width in args.widths):
        raise UserError(f"muonlm bench coordinates: widths are multiples of {HEAD_DIM}, steps at least 1")
    for kind in ("muon", "adamw"):
        for base_width in (args.widths[0], None):
            print(f"{kind}, base_width {base_width or 'unset'}: RMS of the change in a step, and its growth with width")
            changes = {width: coordinate_changes(width, kind, base_width, steps=args.steps) for width in args.widths}
            for place in changes[args.widths[0]]:
                values = [changes[width][place] for width in args.widths]
                print(f"  {place:<10}", *(f"{v:9.2e}" for v in values), f"  width^{growth(args.widths, values):+.2f}")
    return 0


def growth(widths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent a of the best fit values ~ widths^a, by least squares of the logarithms."""
    x, y = [math.log(width) for width in widths], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def coordinate_changes(width: int, kind: str, base_width: int | None, *, steps: int) -> dict[str, float]:
    """RMS of the change that one of `steps` steps makes, their mean, by place, on a batch of text.

    Places: `attention` and `mlp`, what the layers of two blocks add to the residual stream; `stream`, that after both
    blocks; `logits`. The model is `width` wide in heads of 16, the optimizer `kind`, its learning rates those of
    `base_width`, or taken as they are where that is None. Same seed and data at every width.
    """
    config = GPTConfig(
        num_layers=2,
        hidden_size=width,
        intermediate_size=3 * width,
        num_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        base_width=base_width,
    )
    model = build_model(config, VOCAB, seed=0)
    aux = AuxConfig(lr=4e-3)
    optim = MuonConfig(lr=0.1, scaling="spectral", aux=aux) if kind == "muon" else AdamWConfig(lr=4e-3, aux=aux)
    optimizer = build_optimizer(model, optim, iterate_dtype=torch.float32, width_ratio=config.width_ratio)
    batches = _text(steps + 1)
    before = _activations(model, batches[-1, :, :-1])
    sums = dict.fromkeys(before, 0.0)
    for ids in batches[:-1]:
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = _activations(model, batches[-1, :, :-1])
        for place, value in after.items():
            sums[place] += float((value - before[place]).square().mean().sqrt()) / steps
        before = after
    return sums


@torch.no_grad()
def _activations(model: GPT, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {"attention": [], "mlp": [], "stream": []}

    def watch(module: torch.Tensor | torch.nn.Module, place: str) -> Any:
        assert isinstance(module, torch.nn.Module)
        return module.register_forward_hook(lambda _, __, out: found[place].append(out))

    hooks = [watch(getattr(block, name), place) for block in model.blocks for name, place in _LAYERS.items()]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, inputs: found["stream"].append(inputs[0])))
    logits = model(ids_BT)
    for hook in hooks:
        hook.remove()
    return {place: torch.stack(values) for place, values in found.items()} | {"logits": logits}


def _text(num_batches: int) -> torch.Tensor:
    """Batches (N, B, T + 1) of the characters of a module of the standard library."""
    text = Path(argparse.__file__).read_bytes()[: num_batches * BATCH * (SEQ_LEN + 1)]
    return (torch.frombuffer(bytearray(text), dtype=torch.uint8).long() % VOCAB).view(-1, BATCH, SEQ_LEN + 1)
