"""Where the time of a slow step goes, and what the same forecast says of other settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from muonlm.config.errors import UserError
from muonlm.config.schema import MoEConfig
from muonlm.plan.fit import Changes, changed
from muonlm.plan.hardware import Machines
from muonlm.plan.memory import Model, memory_of
from muonlm.plan.owners import Owners
from muonlm.plan.time import StepTime, step_flops, step_time
from muonlm.plan.traffic import transfers

SLOW = 0.75  # a step is slow where the model's products, each counted once, take less of it
FASTER = 0.95  # a change is worth naming where a step takes no more of the time
_SHOWN = 3
_ANEW = "products computed anew"


def advise(model: Model, time: StepTime, machines: Machines) -> str | None:
    """What takes the time of a slow step, with the keys to change, and the change that helps most by the same forecast.

    None for a step that is not slow. A change leaves the training as it is up to rounding, and fits into the memory;
    none is tried where the memory is not known.
    """
    once = time.mfu / machines.matmul_share
    if once >= SLOW:
        return None
    parts = {**time.rows, _ANEW: time.compute - once * time.total}
    del parts["products of the model"]
    shown = ", ".join(
        f"{name} {seconds / time.total:.0%} ({_key_of(name, model)})"
        for name, seconds in sorted(parts.items(), key=lambda item: item[1], reverse=True)[:_SHOWN]
        if seconds >= 0.01 * time.total
    )
    text = f"slow: the model's products, each counted once, take {once:.0%} of a step; besides {shown}"
    if not machines.usable_bytes:
        return text
    found = _fastest(model, machines)
    if found is None or found[1].total > FASTER * time.total:
        return f"{text}. No other setting that was tried is predicted to be faster and to fit"
    changes = " ".join(f"{key}={value}" for key, value in found[0].items())
    return (
        f"{text}. Of other settings that fit, the fastest is predicted to be {changes}: utilisation {found[1].mfu:.1%}"
    )


def _key_of(part: str, model: Model) -> str:
    """The key of the configuration that this part of a step follows from first."""
    grid, engine = model.layout.grid, model.layout.engine
    match part:
        case "products computed anew":
            return "loop.activation_checkpointing"
        case "tensor and expert parallelism":
            axes = {"dist.tensor_parallel": grid.tensor, "dist.expert_parallel": grid.expert}
            return ", ".join(key for key, size in axes.items() if size > 1)
        case "gathers and reductions that nothing hides" if engine in ("fsdp", "zero2"):
            return "loop.micro_batch_size"
    return "loop.batch_size"  # what a step takes once, however many sequences it has


def _fastest(model: Model, machines: Machines) -> tuple[Changes, StepTime] | None:
    """The change with the shortest step among those that fit; None where nothing does.

    Muon's balance takes long to find and changes little: that of `model` serves to compare, its own for the result.
    """
    best: tuple[float, Changes, Model, int] | None = None
    for changes in _changes(model, machines):
        try:
            other = changed(changes, model, model.world_size) if changes else model
        except UserError:
            continue
        if other.config.loop.batch_size % other.layout.grid.data:
            continue
        # Of micro-batches that are as fast, that of the configuration, else the next larger one.
        wanted = other.config.loop.micro_batch_size or other.rank_batch
        for micro_batch in sorted(_divisors(other.rank_batch), key=lambda n: (n < wanted, abs(n - wanted))):
            time = _time(other, micro_batch, model.owners, machines)
            if time is not None and (best is None or time.total < 0.999 * best[0]):
                with_batch = changes if micro_batch == wanted else {**changes, "loop.micro_batch_size": micro_batch}
                best = time.total, with_batch, other, micro_batch
    if best is None:
        return None
    _, changes, other, micro_batch = best
    time = _time(other, micro_batch, other.owners, machines)
    assert time is not None
    return changes, time


def _changes(model: Model, machines: Machines) -> Iterator[Changes]:
    """Nothing, and other values of one key."""
    config, grid = model.config, model.layout.grid
    yield {}
    weaker = {"full": ("selective", "none"), "selective": ("none",), "none": ()}
    yield from ({"loop.activation_checkpointing": kind} for kind in weaker[config.loop.activation_checkpointing])
    if isinstance(config.model, MoEConfig):
        sizes = _divisors(config.model.num_experts)
        yield from ({"dist.expert_parallel": size} for size in sizes if size != grid.expert)
    yield from ({"dist.tensor_parallel": size} for size in _divisors(machines.per_node) if size != grid.tensor)
    yield from ({"dist.replicas": count} for count in _divisors(model.world_size) if count != config.dist.replicas)


def _time(model: Model, micro_batch: int, owners: Owners, machines: Machines) -> StepTime | None:
    """Of a step; None where it does not fit."""
    memory = memory_of(model, micro_batch)
    if memory.peak > machines.usable_bytes:
        return None
    sent = transfers(model, owners, micro_batch)
    return step_time(model, memory, owners, step_flops(model, owners), sent, machines)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
