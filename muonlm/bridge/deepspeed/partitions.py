"""Where DeepSpeed's three ZeRO optimizers keep parameters: their flat partitions, as layouts.

DeepSpeed hands an optimizer one-dimensional tensors, each a rank's part of many parameters in the precision that is
trained in. Stages 1 and 2 lay the parameters of a group one after the other and cut all that into as many equal parts
as there are ranks; stage 3 cuts each parameter, and lays this rank's parts one after the other, in sub-groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from muonlm.config.errors import UserError
from muonlm.dist import collectives

Ranges = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Member:
    """A parameter of a partition: who holds which (rank, begin, end) of it flattened, and where it lies here."""

    param: torch.Tensor
    shape: torch.Size
    ranges: Ranges
    part: slice


@dataclass(frozen=True)
class Partition:
    """This rank's partition of a parameter group, or of a sub-group of it.

    Fields:
        flat: the values that are trained, one-dimensional; its `grad` is there during a step only.
        group: number of the optimizer's parameter group.
        members: the parameters that lie in it, or in the same partition of other ranks.
        is_cut_at_ends: only parameters at the ends of a partition are cut (stages 1 and 2).
        pending: the gradient of a part of it between the last backward pass and DeepSpeed's step, to be read or scaled
            in place; None when there is none.
    """

    flat: torch.Tensor
    group: int
    members: tuple[Member, ...]
    is_cut_at_ends: bool
    pending: Callable[[slice], torch.Tensor | None]


def partitions_of(zero: Any) -> list[Partition]:
    """The partitions of a ZeRO optimizer (`engine.optimizer`), in the order in which DeepSpeed updates them.

    Communicates nothing. Raises UserError for an engine that keeps parameters otherwise, and where data parallelism
    does not span all processes.
    """
    read = _READERS.get(type(zero).__name__)
    if read is None:
        raise UserError(
            f"DeepSpeed made {type(zero).__name__} of this configuration, and Muon is known to be right under "
            f"{', '.join(_READERS)} only: set zero_optimization.stage to 1, 2 or 3"
        )
    return list(read(zero))


def refresh(zero: Any) -> None:
    """Give the model the values of the partitions, after these have been written. One all_gather in stages 1 and 2."""
    if type(zero).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        whole = zero.persistent_parameters  # small ones, which are kept whole between steps
        if whole:
            whole[0].partition(whole)
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
            zero._unflatten_partitioned_parameters(number)
        if whole:
            whole[0].all_gather(whole)
        return
    zero.update_lp_params()


def forget_gradients(zero: Any) -> None:
    """Zero the gradients that stage 3 and offload keep: a step overwrites only those of parameters that it uses."""
    match type(zero).__name__:
        case "DeepSpeedZeroOptimizer_Stage3":
            kept, offloaded = [zero.grad_partitions_flat_buffer], zero.fp32_partitioned_groups_flat
        case "DeepSpeedZeroOptimizer":
            kept = list(zero.accumulated_grads_in_cpu.values()) if zero.cpu_offload else []
            offloaded = zero.single_partition_of_fp32_groups
        case _:
            return
    for grad in [*kept, *(flat.grad for flat in offloaded if flat.grad is not None)]:
        grad.zero_()


def _stage_1_and_2(zero: Any) -> Iterator[Partition]:
    for number, flat in enumerate(zero.single_partition_of_fp32_groups):
        yield _cut_at_ends(
            zero.round_robin_bit16_groups[number],
            zero.bit16_groups_flat[number],
            *(flat, number, zero.real_dp_process_group[number], _averaged(zero, number, flat)),
        )


def _bf16(zero: Any) -> Iterator[Partition]:
    for number, flat in enumerate(zero.fp32_groups_flat_partition):
        yield _cut_at_ends(
            zero.bf16_groups[number],
            zero.bf16_groups_flat[number],
            *(flat, number, zero.real_dp_process_group[number]),
            zero.fp32_groups_gradient_flat_partition[number].__getitem__,
        )


def _cut_at_ends(
    params: list[torch.Tensor],
    everything: torch.Tensor,
    flat: torch.Tensor,
    number: int,
    process_group: Any,
    pending: Callable[[slice], torch.Tensor | None],
) -> Partition:
    """Parameters are views of `everything`, of which every rank has an equal part."""
    num_ranks, rank = _check_group(process_group), collectives.rank()
    size = everything.numel() // num_ranks
    assert flat.numel() == size
    assert everything.numel() == size * num_ranks
    members = []
    for param in params:
        assert param.data.untyped_storage().data_ptr() == everything.untyped_storage().data_ptr()
        at = int(param.data.storage_offset() - everything.storage_offset())
        end = at + param.numel()
        ranges = tuple(
            (r, max(at, r * size) - at, min(end, (r + 1) * size) - at) for r in range(at // size, -(-end // size))
        )
        begin = max(at - rank * size, 0)
        length = sum(e - b for r, b, e in ranges if r == rank)
        members.append(Member(param, param.shape, ranges, slice(begin, begin + length) if length else slice(0, 0)))
    return Partition(flat, number, tuple(members), is_cut_at_ends=True, pending=pending)


def _stage_3(zero: Any) -> Iterator[Partition]:
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        members, at = [], 0
        for param in zero.fp16_groups[number]:
            num_ranks, rank = _check_group(param.ds_process_group), collectives.rank()
            size, numel = param.partition_numel(), param.ds_numel
            assert size * num_ranks >= numel
            ranges = tuple((r, r * size, min((r + 1) * size, numel)) for r in range(num_ranks) if r * size < numel)
            length = max(0, min((rank + 1) * size, numel) - rank * size)
            members.append(Member(param, param.ds_shape, ranges, slice(at, at + length)))
            at += size
        assert at == flat.numel()
        pending, group = _averaged(zero, number, flat), zero.sub_group_to_group_id[number]
        yield Partition(flat, group, tuple(members), is_cut_at_ends=False, pending=pending)


def _averaged(zero: Any, number: int, flat: torch.Tensor) -> Callable[[slice], torch.Tensor | None]:
    """Reads averaged gradients: one tensor for each parameter, or one for the partition where it is offloaded."""

    def read(part: slice) -> torch.Tensor | None:
        if flat.grad is not None:
            return flat.grad[part]
        pieces = zero.averaged_gradients.get(number)
        if pieces is None:
            return None
        if part.start == part.stop:
            return flat.new_empty(0)
        at = 0
        for piece in pieces:
            if at == part.start:
                return piece.view(-1)[: part.stop - part.start]
            at += piece.numel()
        raise AssertionError(f"no gradient begins at {part.start} of partition {number}")

    return read


def _check_group(process_group: Any) -> int:
    """Number of ranks; the exchange runs over all processes, numbered as in the group of data parallelism."""
    if not dist.is_initialized():
        return 1
    ranks = dist.get_process_group_ranks(process_group)
    if ranks != list(range(dist.get_world_size())):
        raise UserError(
            f"DeepSpeed shards parameters over the ranks {ranks} of {dist.get_world_size()}; Muon needs them "
            "sharded over all: leave out tensor, expert and pipeline parallelism, MiCS and hierarchical partitions"
        )
    return len(ranks)


_READERS: dict[str, Callable[[Any], Iterator[Partition]]] = {
    "DeepSpeedZeroOptimizer": _stage_1_and_2,
    "BF16_Optimizer": _bf16,
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
}
