"""Does a run fit into memory, with which micro-batch, and what would make it fit? Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import ValidationError

from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.plan.memory import Model, make_model, memory_of

Device = Literal["cpu", "cuda"]


def check_fits(
    config: TrainConfig, *, world_size: int, vocab_size: int, memory_bytes: int, device: Device | None = None
) -> None:
    """Refuse a run whose forecast exceeds the `memory_bytes` of a rank.

    The forecast leaves out what it does not know (fragments, the device's context, other processes), so that a run is
    rather let through than refused. Without a `device`, "auto" precision counts as bfloat16.

    Raises:
        UserError: it does not fit; says by how much, the largest micro-batch that fits, what else would, and how to
            start it nevertheless.
    """
    model = make_model(config, world_size=world_size, vocab_size=vocab_size, device=device or "cuda")
    if message := misfit(model, memory_bytes):
        raise UserError(f"{message}. loop.check_memory=false starts the run all the same")


def misfit(model: Model, memory_bytes: int) -> str | None:
    """Why a run does not fit into a rank's `memory_bytes`, and what would; None where it does."""
    memory = memory_of(model, model.micro_batch)
    if memory.peak <= memory_bytes:
        return None
    phase = max(memory.phases, key=lambda name: memory.phases[name])
    at = list(memory.phases).index(phase)
    sizes = sorted(((row[at], name) for name, row in memory.rows.items()), reverse=True)
    listed = ", ".join(f"{name} {_gb(size)}" for size, name in sizes if size > memory.peak / 100)
    text = (
        f"a rank needs {_gb(memory.peak)}, {_gb(memory.peak - memory_bytes)} more than the {_gb(memory_bytes)} there "
        f"are ({phase}: {listed}), with micro-batches of {model.micro_batch} x {model.config.data.seq_len} tokens on "
        f"{_ranks(model.world_size)}"
    )
    fitting = list(fitting_changes(model, memory_bytes))
    if fitting:
        return f"{text}. What fits: {'; '.join(fitting)}"
    return f"{text}. Nothing that was tried fits: {_TRIED}; take a smaller model, or devices with more memory"


_TRIED = "one sequence at a time, activation checkpointing, zero = 3, and up to 64 times as many ranks"


def largest_micro_batch(model: Model, memory_bytes: int) -> int | None:
    """The largest micro-batch, of those that divide a rank's sequences, that fits; None where not even 1 does."""
    # A single micro-batch of a step finds no gradients, so that more sequences may need less.
    for micro_batch in reversed([n for n in range(1, model.rank_batch + 1) if model.rank_batch % n == 0]):
        if memory_of(model, micro_batch).peak <= memory_bytes:
            return micro_batch
    return None


def fitting_changes(model: Model, memory_bytes: int) -> Iterator[str]:
    """Changes that make the run fit, as keys of the configuration, the least ones first.

    A smaller micro-batch, activation checkpointing, zero = 3, both; if neither fits, more ranks.
    """
    config, size = model.config, model.world_size
    largest = largest_micro_batch(model, memory_bytes)
    if largest is not None:
        yield f"loop.micro_batch_size={largest} (the largest that does)"
    current = config.loop.activation_checkpointing
    kinds = {"none": ("selective", "full"), "selective": ("full",), "full": ()}[current]
    candidates: list[Changes] = [{"loop.activation_checkpointing": kind} for kind in kinds]
    if config.dist.zero != 3 and size > 1:
        candidates += [{"dist.zero": 3}, {"dist.zero": 3, "loop.activation_checkpointing": "full"}]
    found = list(_first_fitting(candidates, model, size, memory_bytes, enough=largest or 0))
    yield from found
    if found or largest is not None:
        return
    cut: Changes = {} if config.dist.zero == 3 else {"dist.zero": 3}
    both: list[Changes] = [cut, {**cut, "loop.activation_checkpointing": "full"}] if kinds else [cut]
    for factor in (2, 4, 8, 16, 32, 64):
        if found := list(_first_fitting(both, model, size * factor, memory_bytes)):
            yield from found
            return


Changes = dict[str, Any]


def _first_fitting(
    candidates: list[Changes], like: Model, world_size: int, memory_bytes: int, enough: int = 0
) -> Iterator[str]:
    """The first of the changes that fits without what another one that fits has already, as text.

    `enough` is a micro-batch that fits without any: changes that need one no larger are left out.
    """
    fitting: list[Changes] = []
    for changes in candidates:
        if any(other.items() <= changes.items() or _is_stronger(changes, other) for other in fitting):
            continue
        found = _fitting(changes, like, world_size, memory_bytes)
        if found is not None and found.get("loop.micro_batch_size", enough + 1) > enough:
            fitting.append(changes)
            text = " ".join(f"{key}={value}" for key, value in found.items())
            yield f"{_ranks(world_size)} with {text}".removesuffix(" with ") if world_size != like.world_size else text


def _is_stronger(changes: Changes, other: Changes) -> bool:
    """Whether `changes` only recompute more than `other`."""
    key = "loop.activation_checkpointing"
    return changes.keys() == other.keys() == {key} and changes[key] == "full"


def _fitting(changes: Changes, like: Model, world_size: int, memory_bytes: int) -> Changes | None:
    """The changes, and those of the batch that must go with them; None where they do not fit."""
    try:
        model = changed(changes, like, world_size)
    except UserError:
        return None
    data = model.layout.grid.data
    if model.config.loop.batch_size % data:  # more ranks than the batch has sequences for
        changes = {**changes, "loop.batch_size": -(-model.config.loop.batch_size // data) * data}
        model = changed(changes, like, world_size)
    largest = largest_micro_batch(model, memory_bytes)
    if largest is None:
        return None
    wanted = model.config.loop.micro_batch_size or model.rank_batch
    if largest < wanted or model.rank_batch % wanted:
        changes = {**changes, "loop.micro_batch_size": largest}
    return changes


def changed(changes: Changes, like: Model, world_size: int) -> Model:
    """The model of a run with other values of keys, on that many ranks. Raises UserError for what cannot be."""
    raw = like.config.model_dump()
    for key, value in changes.items():
        table, _, name = key.partition(".")
        raw[table][name] = value
    try:
        config = TrainConfig.model_validate(raw)
    except ValidationError as error:  # as with a budget of less than one batch
        raise UserError(str(error)) from None
    return make_model(config, world_size=world_size, vocab_size=like.vocab_size, device=like.device)


def _ranks(size: int) -> str:
    return f"{size} rank{'s' if size > 1 else ''}"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
