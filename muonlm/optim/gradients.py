"""What all ranks must agree on before anything moves: that they hold the same optimizer, and finite gradients.

Also the gradient norms by group, and clipping. Two small collectives a step when there are ranks: one maximum of a
header of fixed length, so that it meets even where ranks differ, and one sum of squared norms where gradients are
sharded. When something is wrong, the details are gathered, and every rank raises the same error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from muonlm.config.errors import UserError
from muonlm.dist import collectives
from muonlm.dist.agree import first_difference
from muonlm.optim.shards import Shard

# Logarithms of norms, over all parameters, that differ by less are of the same gradients: summed in another order.
_SAME_LOG = 1e-2
_LOG_UNITS = 10**6


class NonFiniteGradient(UserError):
    """A gradient holds NaN or infinity; the message names the parameters and ranks. Nothing has been updated."""


@dataclass(frozen=True)
class GradNorms:
    """L2 norms before clipping, and the factor that clipped groups were multiplied by (1 when nothing was).

    `is_skipped` says that a gradient was not finite and the step is to be left out on all ranks.
    """

    total: float
    by_group: dict[str, float]
    clip_factor: float
    is_skipped: bool = False


class GroupShards(NamedTuple):
    """A parameter group: its name, whether clipping applies to it, and its shards."""

    name: str
    is_clipped: bool
    shards: Sequence[Shard]


class Description(NamedTuple):
    """What an optimizer consists of: a line for each parameter, one for each option, and a 60-bit hash of both."""

    parameters: list[str]
    options: list[str]
    number: int


def describe(parameters: list[str], options: list[str]) -> Description:
    """The description made of these lines."""
    return Description(parameters, options, _hash("\n".join([*options, *parameters])))


@torch.no_grad()
def agree_and_clip(
    groups: Sequence[GroupShards],
    description: Description,
    *,
    max_norm: float,
    device: torch.device,
    skip_non_finite: bool = False,
    overflow: bool = False,
) -> GradNorms:
    """Check that all ranks can take this step, and scale the gradients of clipped groups together to `max_norm`.

    0 only measures. Groups under Muon are measured and left alone: orthogonalization takes the scale out anyhow, and a
    clip would only change how gradients weigh against each other in the momentum. `overflow` says that the caller (a
    loss scaler) has found the gradients of this rank to be not finite. One host synchronisation.

    Raises on all ranks alike, before anything is changed: UserError where ranks have other parameters or options, where
    only some have a gradient, where no parameter has any, or where gradients of what all ranks hold differ (in norm, by
    more than 1 %), as they do when they were not averaged; NonFiniteGradient unless `skip_non_finite`.
    """
    shards = [shard for group in groups for shard in group.shards]
    grads = {id(shard): shard.grad() for shard in shards}
    # A rank that holds nothing of a parameter cannot know whether it has a gradient.
    present = [shard.name for shard in shards if grads[id(shard)] is not None]
    squares, bad, copied = _squares(groups, grads)
    if collectives.is_active():
        absent_hash, log_norms = _hash("\n".join(present)), _log_sum(copied)
        header = [description.number, -description.number, absent_hash, -absent_hash, int(bool(bad) or overflow)]
        header += [log_norms, -log_norms]
        agreed = collectives.all_reduce(torch.tensor(header, dtype=torch.int64, device=device), "max").tolist()
        if agreed[0] != -agreed[1]:
            _raise_differing(description)
        if agreed[2] != -agreed[3]:
            _raise_missing([shard.name for shard in shards], set(present))
        is_bad = bool(agreed[4])
    else:
        is_bad = bool(bad) or overflow
    if shards and not present:
        raise UserError(
            "no parameter of this optimizer has a gradient: was it built before fully_shard, was gradient "
            "synchronisation off in the last backward pass, or was there none? Nothing was updated"
        )
    if is_bad:
        if skip_non_finite:
            return GradNorms(math.nan, {group.name: math.nan for group in groups}, 1.0, is_skipped=True)
        _raise_non_finite(bad)
    if collectives.is_active() and agreed[5] + agreed[6] > _SAME_LOG * _LOG_UNITS:
        _raise_not_averaged(copied)
    by_group = _group_norms(groups, squares, device)
    total = math.hypot(*by_group.values())
    clipped_norm = math.hypot(*(by_group.get(group.name, 0.0) for group in groups if group.is_clipped))
    factor = 1.0
    if max_norm and clipped_norm > max_norm:
        factor = max_norm / clipped_norm
        members = [grads[id(shard)] for group in groups if group.is_clipped for shard in group.shards]
        if live := [grad for grad in members if grad is not None]:
            torch._foreach_mul_(live, factor)
    return GradNorms(total, by_group, factor)


def _squares(
    groups: Sequence[GroupShards], grads: dict[int, torch.Tensor | None]
) -> tuple[dict[str, float], list[str], dict[str, float]]:
    """Squared norms of this rank's gradients, by group, each element's counted once over all ranks; what is bad; and
    by parameter those of which every rank has all.

    A norm that overflows in fp32 although every element is finite is computed again in fp64.
    """
    live = [(g.name, s, grad) for g in groups for s in g.shards if (grad := grads[id(s)]) is not None and grad.numel()]
    squares = {group.name: 0.0 for group in groups if any(grads[id(s)] is not None for s in group.shards)}
    if not live:
        return squares, [], {}
    # The norm of a 16-bit gradient would be rounded to 16 bits itself.
    wide = None if any(grad.dtype == torch.float64 for _, _, grad in live) else torch.float32
    norms = torch.stack(torch._foreach_norm([grad for _, _, grad in live], 2, wide)).tolist()
    bad, copied, num_ranks = [], {}, collectives.world_size()
    for (name, shard, grad), norm in zip(live, norms, strict=True):
        if not math.isfinite(norm):
            norm = float(grad.double().norm()) if bool(torch.isfinite(grad).all()) else math.nan
            if math.isnan(norm):
                bad.append(shard.name)
        squares[name] += norm * norm / shard.layout.num_copies
        if shard.layout.num_copies == num_ranks:
            copied[shard.name] = norm * norm
    return squares, bad, copied


def _group_norms(groups: Sequence[GroupShards], squares: dict[str, float], device: torch.device) -> dict[str, float]:
    if not collectives.is_active():
        return {name: math.sqrt(square) for name, square in squares.items()}
    num_ranks = collectives.world_size()
    if all(s.layout.is_replicated and s.layout.num_copies == num_ranks for g in groups for s in g.shards):
        # The same gradients on all ranks: each has counted its share of every element.
        return {name: math.sqrt(square * num_ranks) for name, square in squares.items()}
    names = [group.name for group in groups if group.name in squares]
    summed = torch.tensor([squares[name] for name in names], dtype=torch.float64, device=device)
    return dict(zip(names, collectives.all_reduce(summed).sqrt().tolist(), strict=True))


def _log_sum(squares: dict[str, float]) -> int:
    """Weighted sum of the logarithms of norms, in millionths: a parameter counts however small its gradient is.

    Below a millionth of the norm of all it fades out, being noise. The weights differ, so that differences of two
    parameters do not cancel.
    """
    finite = {name: square for name, square in squares.items() if math.isfinite(square)}
    floor = 1e-12 * sum(finite.values()) + 1e-300
    logs = (_weight(name) * math.log(square + floor) / 2 for name, square in finite.items())
    return round(sum(logs) * _LOG_UNITS)


@cache
def _weight(name: str) -> float:
    return 1 + _hash(name) % 1000 / 1000


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def _raise_differing(description: Description) -> None:
    gathered = collectives.gather_objects((description.parameters, description.options))
    parameters = [lines for lines, _ in gathered]
    # Where the parameters are the same, it is the options.
    found = first_difference(parameters) or first_difference([options for _, options in gathered])
    assert found is not None, "the hash is that of the lines"
    rank, difference = found
    raise UserError(
        f"the optimizers of rank {rank} and rank 0 differ ({len(parameters[rank])} parameters against "
        f"{len(parameters[0])}): {difference}. All ranks must build the same model, sharded alike, and the same "
        "parameter groups with the same options, also when they add one later"
    )


def _raise_missing(names: list[str], present: set[str]) -> None:
    every = collectives.gather_objects([name for name in names if name not in present])
    counts = {name: sum(name in absent for absent in every) for absent in every for name in absent}
    name = next(name for name in names if 0 < counts.get(name, 0) < len(every))
    without = ", ".join(str(rank) for rank, absent in enumerate(every) if name in absent)
    raise UserError(
        f"{name} has no gradient on rank {without} but has one on the others; every rank must use the same parameters "
        "in a step. Nothing was updated"
    )


def _raise_not_averaged(copied: dict[str, float]) -> None:
    every = [{name: math.sqrt(square) for name, square in one.items()} for one in collectives.gather_objects(copied)]
    low, high = ({name: pick(one[name] for one in every) for name in every[0]} for pick in (min, max))
    name = max(high, key=lambda name: high[name] / low[name] if low[name] else high[name] and math.inf)
    rank = next(rank for rank, one in enumerate(every) if one[name] != every[0][name])
    raise UserError(
        f"{name}, which every rank holds, has a gradient of norm {every[0][name]:.6g} on rank 0 and of "
        f"{every[rank][name]:.6g} on rank {rank}: average gradients over the ranks before the step. Nothing was updated"
    )


def _raise_non_finite(bad: list[str]) -> None:
    every = collectives.gather_objects(bad)
    names = list(dict.fromkeys(name for names in every for name in names))
    if not names:
        raise NonFiniteGradient("the loss scaler found a gradient that is not finite")
    shown = []
    for name in names[:8]:
        ranks = [rank for rank, found in enumerate(every) if name in found]
        where = "" if len(every) == 1 else " on all ranks" if len(ranks) == len(every) else f" on rank {_list(ranks)}"
        shown.append(name + where)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    raise NonFiniteGradient(f"non-finite gradient in {', '.join(shown)}{more}")


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
