"""One optimizer step: micro-batches, backward, agreement of the ranks, clipping, update, and what it cost."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from muonlm.data.loader import batch
from muonlm.dist import collectives
from muonlm.dist.wrap import backward, without_gradient_sync
from muonlm.model.moe import Balance, forget_loads, settle_loads
from muonlm.optim.gradients import GradNorms, NonFiniteGradient
from muonlm.optim.measure import UpdateNorms
from muonlm.optim.schedules import lr_multiplier, set_learning_rates
from muonlm.optim.shards import Shard
from muonlm.train.setup import Parts

_LOWER = (
    "lower the learning rates or raise schedule.warmup_steps, in a run of another name; with branch_from it goes on "
    "from the last checkpoint of this one"
)


class Diverged(NonFiniteGradient):
    """The loss, a gradient or a parameter is NaN or infinite. Raised on all ranks together.

    For a loss or a gradient that is before anything was updated; a parameter or an update is found afterwards, before
    it is recorded or saved.
    """


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `loss` is the mean over the global batch; `seconds` leaves measuring out.

    `is_skipped`: a loss or gradient was not finite, and nothing was updated (`optim.non_finite = "skip"`). `balance`
    says how evenly experts were used. It and `updates` are None when the step was not measured; then, on a GPU,
    `optimizer_s` is not waited for either and part of it shows up in the next step.
    """

    loss: float
    stop: bool
    grads: GradNorms
    updates: UpdateNorms | None
    seconds: float
    optimizer_s: float
    is_skipped: bool
    balance: Balance | None = None


def take_step(parts: Parts, step: int, sequences: int, *, measure: bool, stop: bool) -> StepResult:
    """Train on the global samples from `sequences` on; `step` counts from 0. Called by all ranks.

    `stop` says that this rank was asked to stop; the result's `stop` is true on all ranks when any was. Collectives:
    those that average gradients, with FSDP2, tensor and expert parallelism also those of the forward pass; one
    all_reduce of four fp64 numbers; that of the experts' loads; and the optimizer's. Raises Diverged on all ranks.
    """
    config, optimizer = parts.config, parts.optimizer
    begin = time.perf_counter()
    set_learning_rates(optimizer, lr_multiplier(config.schedule, step, config.num_steps))
    loss = _accumulate(parts, sequences)
    mean_loss, stop = _agree(parts, step, loss, stop)
    try:
        grads = optimizer.clip_gradients(config.loop.grad_clip)
    except NonFiniteGradient as error:
        raise Diverged(f"step {step + 1}: {error} (same on all {parts.world.size} ranks){_ADVICE}") from error
    updates = UpdateNorms(optimizer) if measure else None
    update_begin = time.perf_counter()
    before_update = update_begin - begin
    with updates or nullcontext():
        if measure:
            _wait(parts)
        update_begin = time.perf_counter()
        if not math.isnan(mean_loss):  # gradients may be finite where the loss is not
            optimizer.step()
        if measure:
            _wait(parts)
        optimizer_s = time.perf_counter() - update_begin
    optimizer.zero_grad(set_to_none=True)
    is_skipped = grads.is_skipped or math.isnan(mean_loss)
    if is_skipped:
        forget_loads(parts.model)
    balance = None if is_skipped else settle_loads(parts.model, measure=measure)
    if updates is not None and not all(map(math.isfinite, updates.by_group.values())):
        raise Diverged(f"step {step + 1}: the norm of the update overflows ({updates.by_group}); {_LOWER}")
    seconds = before_update + optimizer_s
    return StepResult(mean_loss, stop, grads, updates, seconds, optimizer_s, is_skipped, balance)


def check_finite(parts: Parts, step: int, when: str = f"after the update; {_LOWER}") -> None:
    """Raise Diverged, on all ranks, when a parameter or buffer is not finite after `step` updates: before it is saved.

    One all_reduce of one integer.
    """
    values = [value for value in _values(parts).values() if value.numel()]
    is_finite = not values or bool(torch.isfinite(torch.stack(torch._foreach_norm(values, math.inf))).all())
    if collectives.any_rank(not is_finite):
        raise Diverged(f"step {step}: {_first_non_finite(parts)} is not finite {when}")


_ADVICE = f". Nothing was updated by this step; {_LOWER}"


def _accumulate(parts: Parts, sequences: int) -> torch.Tensor:
    """Add up the gradients of this rank's slice of the global batch; returns its mean loss, fp64, on the device."""
    world, wrapped = parts.world, parts.wrapped
    num_micro = parts.rank_batch // parts.micro_batch
    start = sequences + parts.mesh.data_rank * parts.rank_batch
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for index in range(num_micro):
        ids, labels = batch(parts.train_data, parts.order, start + index * parts.micro_batch, parts.micro_batch)
        ids, labels = ids.to(world.device, non_blocking=True), labels.to(world.device, non_blocking=True)
        is_last = index == num_micro - 1
        with nullcontext() if is_last else without_gradient_sync(wrapped):
            with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=parts.dtype == torch.bfloat16):
                loss = wrapped(ids, labels)
            backward(wrapped, loss / num_micro)
        total += loss.detach().double()
    return total / num_micro


def _agree(parts: Parts, step: int, loss: torch.Tensor, stop: bool) -> tuple[float, bool]:
    """Mean loss over the ranks and whether any is to stop; on all ranks when one's loss is bad.

    Then it raises Diverged, or returns NaN where such steps are skipped and parameters are still finite.
    """
    rank, size, device = parts.world.rank, parts.world.size, parts.world.device
    bad = ~torch.isfinite(loss)
    report = torch.stack(
        [
            torch.where(bad, 0.0, loss),
            torch.tensor(stop, device=device).double(),
            bad.double(),
            bad.double() * rank,
        ]
    )
    loss_sum, stops, num_bad, rank_sum = collectives.all_reduce(report).tolist()
    if num_bad and parts.config.optim.non_finite == "skip":
        check_finite(parts, step)  # otherwise all further steps would be skipped too
        return math.nan, stops > 0
    if num_bad:
        where = f"rank {rank_sum:.0f}" if num_bad == 1 else f"{num_bad:.0f} of {size} ranks"
        name = _first_non_finite(parts)
        culprit = f"the first parameter with a non-finite value or gradient is {name}" if name else "no gradient is"
        raise Diverged(f"step {step + 1}: the loss is not finite on {where}; {culprit}{_ADVICE}")
    return loss_sum / size, stops > 0


def _shards(parts: Parts) -> dict[str, Shard]:
    """What this rank holds of each parameter, in the order of the model."""
    optimizer = parts.optimizer
    by_name = {shard.name: shard for group in optimizer.param_groups for shard in optimizer.shards(group)}
    return {name: by_name[name] for name, _ in parts.model.named_parameters()}


def _values(parts: Parts) -> dict[str, torch.Tensor]:
    """What this rank holds of each parameter and buffer, in the order of the model."""
    shards = {name: shard.local() for name, shard in _shards(parts).items()}
    return shards | {name: buffer for name, buffer in parts.model.named_buffers() if buffer.is_floating_point()}


def _first_non_finite(parts: Parts) -> str | None:
    """The first parameter that is not finite on any rank, else the first whose (averaged) gradient is not.

    One gather of small objects.
    """
    found = [report for report in collectives.gather_objects(_non_finite_here(parts)) if report is not None]
    return min(found)[-1] if found else None


def _non_finite_here(parts: Parts) -> tuple[bool, int, str] | None:
    """The first such parameter of this rank, after whether it is only its gradient, and its place in the model."""
    for index, (name, value) in enumerate(_values(parts).items()):
        if not bool(torch.isfinite(value).all()):
            return False, index, name
    for index, (name, shard) in enumerate(_shards(parts).items()):
        if (grad := shard.grad()) is not None and not math.isfinite(float(grad.norm())):
            return True, index, name
    return None


def _wait(parts: Parts) -> None:
    if parts.world.device.type == "cuda":
        torch.cuda.synchronize(parts.world.device)
