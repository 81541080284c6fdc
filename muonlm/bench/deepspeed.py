"""Muon under DeepSpeed beside DeepSpeed's own Muon: losses, step time, and bytes sent, on the same model and data."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from muonlm.bench.launch import num_ranks, on_ranks
from muonlm.bench.wire import WireCounter
from muonlm.bridge.deepspeed.training import import_deepspeed
from muonlm.config.errors import UserError
from muonlm.config.schema import GPTConfig
from muonlm.dist import collectives
from muonlm.dist.process import World
from muonlm.model.build import build_model
from muonlm_kernels.bench.timing import machine

OURS, THEIRS = "muonlm", "DeepSpeed"
_WARM_UP = 3
_VOCAB = 256


@dataclass(frozen=True)
class Settings:
    """What is measured; see the options of `muonlm bench deepspeed`."""

    stages: tuple[int, ...]
    steps: int
    clip: float
    accumulate: int
    hidden_size: int
    num_layers: int
    batch: int
    seq_len: int
    lr: float
    method: str
    compiled: bool
    device: str


def main(argv: list[str]) -> int:
    """`muonlm bench deepspeed`: parse, measure, print."""
    parser = argparse.ArgumentParser(prog="muonlm bench deepspeed", description=__doc__)
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="local ranks, without torchrun [%(default)s]")
    add("--stages", default="1,2,3", help="ZeRO stages [%(default)s]")
    add("--steps", type=int, default=30, help="training steps [%(default)s]")
    add("--clip", type=float, default=0.0, help="gradient_clipping; 0 is none [%(default)s]")
    add("--accumulate", type=int, default=1, help="micro-batches of a step [%(default)s]")
    add("--hidden-size", type=int, default=128, help="width of the model [%(default)s]")
    add("--layers", type=int, default=3, help="blocks [%(default)s]")
    add("--batch", type=int, default=16, help="sequences of a step, over all ranks [%(default)s]")
    add("--seq-len", type=int, default=64, help="tokens of a sequence [%(default)s]")
    add("--lr", type=float, default=0.02, help="of hidden matrices; AdamW has half [%(default)s]")
    add("--method", choices=("gram", "standard"), default="gram", help="DeepSpeed's ns_method [%(default)s]")
    add("--compiled", action="store_true", help="leave DeepSpeed's Muon compiled: some 20 s at the first step on a CPU")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="[%(default)s]")
    add("--threads", type=int, default=1, help="CPU threads of a rank [%(default)s]")
    add("--json", metavar="FILE", help="write the result as JSON too")
    args = parser.parse_args(argv)
    ranks = num_ranks(args.ranks)
    if args.steps <= _WARM_UP or args.batch % (ranks * args.accumulate):
        raise UserError(
            f"muonlm bench deepspeed: --steps must be more than {_WARM_UP}, and --batch divisible by ranks times "
            "micro-batches"
        )
    settings = Settings(
        *(tuple(map(int, args.stages.split(","))), args.steps, args.clip, args.accumulate, args.hidden_size),
        *(args.layers, args.batch, args.seq_len, args.lr, args.method, args.compiled, args.device),
    )
    _import(args.device)
    result = on_ranks(measure, settings, ranks, args.device, args.threads)
    if result is not None:
        show(result)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


def measure(world: World, settings: Settings) -> dict[str, Any]:
    """Both optimizers in turns, step by step, at each stage. Called by all ranks.

    Returns {"settings", "ranks", "machine", "stages": {stage: {optimizer: {"losses", "step_s" (forward, backward and
    optimizer), "sent" ({"backward", "step"}: {collective: bytes that this rank sends})}}}}.
    """
    if not settings.compiled:
        importlib.import_module("torch._dynamo").config.disable = True
    stages = {}
    for stage in settings.stages:
        engines = {name: _engine(name, stage, settings, world) for name in (OURS, THEIRS)}
        runs: dict[str, Any] = {name: {"losses": [], "step_s": []} for name in engines}
        for step in range(settings.steps):
            for name, engine in engines.items():
                loss, step_s = _step(engine, step, settings, world)
                runs[name]["losses"].append(loss)
                runs[name]["step_s"].append(step_s)
        for name, engine in engines.items():
            runs[name]["sent"] = _sent(engine, settings, world)
        stages[str(stage)] = runs
    about = {key: getattr(settings, key) for key in Settings.__dataclass_fields__}
    return {"settings": about, "ranks": world.size, "machine": machine(world.device), "stages": stages}


def _import(device: str) -> None:
    """Before ranks are forked."""
    import_deepspeed(torch.device(device))
    for module in ("deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2", "torch._dynamo"):
        importlib.import_module(module)


def _engine(name: str, stage: int, settings: Settings, world: World) -> Any:
    """The same model with either optimizer: coefficients, scaling and learning rates of DeepSpeed's."""
    import deepspeed

    from muonlm.bridge.deepspeed import bind, muon_for_deepspeed

    shape = {"hidden_size": settings.hidden_size, "intermediate_size": 3 * settings.hidden_size}
    model = build_model(GPTConfig.model_validate({**shape, "num_layers": settings.num_layers}), _VOCAB, seed=0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.batch // world.size // settings.accumulate,
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    lr, aux_lr = settings.lr, settings.lr / 2
    if name == OURS:
        options = {"coefficients": "jordan", "steps": 5}
        aux = {"lr": aux_lr, "weight_decay": 0.0}
        optimizer = muon_for_deepspeed(model, lr=lr, weight_decay=0.0, scaling="jordan", newton_schulz=options, aux=aux)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        bind(engine)
        return engine
    options = {"muon_lr": lr, "adam_lr": aux_lr, "momentum": 0.95, "weight_decay": 0.0, "ns_method": settings.method}
    adam = {"betas": [0.9, 0.95], "eps": 1e-8, "torch_adam": True}
    config["optimizer"] = {"type": "Muon", "params": {"lr": lr, **options, **adam}}
    if stage == 3:
        config["zero_optimization"]["reduce_scatter"] = False  # else it refuses to start
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _tokens(step: int, settings: Settings) -> Tensor:
    """Sequences that count up in strides, which can be learned."""
    generator = torch.Generator().manual_seed(step)
    first, stride = (torch.randint(1, high, (settings.batch, 1), generator=generator) for high in (_VOCAB, 8))
    return (first + torch.arange(settings.seq_len + 1) * stride) % _VOCAB


def _micro_batches(step: int, settings: Settings, world: World) -> tuple[Tensor, ...]:
    own = _tokens(step, settings).chunk(world.size)[world.rank]
    return own.to(world.device).chunk(settings.accumulate)


def _backward(engine: Any, ids_BT: Tensor) -> float:
    loss = F.cross_entropy(engine(ids_BT[:, :-1]).flatten(0, 1).float(), ids_BT[:, 1:].flatten())
    engine.backward(loss)
    return loss.item()


def _step(engine: Any, step: int, settings: Settings, world: World) -> tuple[float, float]:
    """Mean loss over the ranks, and seconds of the step."""
    total = 0.0
    collectives.barrier()
    begin = time.perf_counter()
    for ids_BT in _micro_batches(step, settings, world):
        total += _backward(engine, ids_BT)
        engine.step()
    _wait(world)
    seconds = time.perf_counter() - begin
    loss = torch.tensor(total / settings.accumulate, dtype=torch.float64, device=world.device)
    return collectives.all_reduce(loss).item() / world.size, seconds


def _sent(engine: Any, settings: Settings, world: World) -> dict[str, dict[str, int]]:
    """Bytes that this rank sends in a further step, by phase and collective."""
    backward, step = WireCounter(), WireCounter()
    for ids_BT in _micro_batches(settings.steps, settings, world):
        with backward:
            _backward(engine, ids_BT)
        with step:
            engine.step()
    phases = {"backward": backward, "step": step}
    return {phase: {kind: count["bytes"] for kind, count in c.counts.items()} for phase, c in phases.items()}


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    settings, console = result["settings"], Console()
    title = (
        f"{result['ranks']} ranks, {settings['num_layers']} blocks of width {settings['hidden_size']}, "
        f"{settings['batch']} x {settings['seq_len']} tokens a step in {settings['accumulate']} micro-batch(es), "
        f"gradient_clipping {settings['clip']}, ns_method {settings['method']}, torch {result['machine']['torch']}"
    )
    table = Table(title=title, title_justify="left")
    marks = sorted({0, settings["steps"] // 2, settings["steps"] - 1})
    for column in ("ZeRO", "Muon of", *(f"loss {m + 1}" for m in marks), "ms", "KiB step", "KiB backward"):
        table.add_column(column, justify="left" if column == "Muon of" else "right")
    for stage, runs in result["stages"].items():
        for name, run in runs.items():
            losses = (f"{run['losses'][mark]:.4f}" for mark in marks)
            sent = (f"{sum(run['sent'][phase].values()) / 1024:.0f}" for phase in ("step", "backward"))
            table.add_row(stage, name, *losses, f"{statistics.median(run['step_s'][_WARM_UP:]) * 1e3:.0f}", *sent)
    console.print(table)
    console.print(
        "ms: median of whole steps, taken in turns; KiB: what rank 0 sends, on a ring, in engine.step(), which gathers "
        "parameters in stages 1 and 2, and in forward and backward pass"
    )
