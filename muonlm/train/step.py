"""One optimizer step: micro-batches, backward, agreement of the ranks, clipping, update, and what it cost."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from muonlm.data.loader import batch
from muonlm.dist import collectives
from muonlm.optim.gradients import GradNorms, NonFiniteGradient
from muonlm.optim.measure import UpdateNorms
from muonlm.optim.schedules import lr_multiplier, set_learning_rates
from muonlm.train.setup import Parts


class Diverged(NonFiniteGradient):
    """The loss, a gradient or a parameter is NaN or infinite. Raised on all ranks together.

    For a loss or a gradient that is before anything was updated; a parameter or an update is found afterwards, before
    it is recorded or saved.
    """


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `loss` is the mean over the global batch; `seconds` leaves measuring out.

    `updates` is None when the step was not measured; then, on a GPU, `optimizer_s` is not waited for either and
    part of it shows up in the next step.
    """

    loss: float
    stop: bool
    grads: GradNorms
    updates: UpdateNorms | None
    seconds: float
    optimizer_s: float


def take_step(parts: Parts, step: int, sequences: int, *, measure: bool, stop: bool) -> StepResult:
    """Train on the global samples from `sequences` on; `step` counts from 0. Called by all ranks.

    `stop` says that this rank was asked to stop; the result's `stop` is true on all ranks when any was. Collectives:
    DistributedDataParallel's gradient all-reduce, one all_reduce of four fp64 numbers, and the optimizer's. Raises
    Diverged on all ranks.
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
        optimizer.step()
        if measure:
            _wait(parts)
        optimizer_s = time.perf_counter() - update_begin
    optimizer.zero_grad(set_to_none=True)
    if updates is not None and not all(map(math.isfinite, updates.by_group.values())):
        raise Diverged(f"step {step + 1}: the norm of the update overflows ({updates.by_group}); {_LOWER}")
    return StepResult(mean_loss, stop, grads, updates, before_update + optimizer_s, optimizer_s)


def check_finite(parts: Parts, step: int) -> None:
    """Raise Diverged, on all ranks, when a parameter is not finite after `step` updates: before it is saved."""
    norms = torch.stack(torch._foreach_norm(list(parts.model.parameters()), math.inf))
    if not bool(torch.isfinite(norms).all()):
        raise Diverged(f"step {step}: {_first_non_finite(parts)} is not finite after the update; {_LOWER}")


_LOWER = "lower the learning rates or raise schedule.warmup_steps"
_ADVICE = f". Nothing was updated by this step; {_LOWER}"


def _accumulate(parts: Parts, sequences: int) -> torch.Tensor:
    """Add up the gradients of this rank's slice of the global batch; returns its mean loss, fp64, on the device."""
    world, wrapped = parts.world, parts.wrapped
    num_micro = parts.rank_batch // parts.micro_batch
    start = sequences + world.rank * parts.rank_batch
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for index in range(num_micro):
        ids, labels = batch(parts.train_data, parts.order, start + index * parts.micro_batch, parts.micro_batch)
        ids, labels = ids.to(world.device, non_blocking=True), labels.to(world.device, non_blocking=True)
        is_last = index == num_micro - 1
        with nullcontext() if is_last or world.size == 1 else wrapped.no_sync():  # type: ignore[operator]
            with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=parts.dtype == torch.bfloat16):
                loss = wrapped(ids, labels)
            (loss / num_micro).backward()
        total += loss.detach().double()
    return total / num_micro


def _agree(parts: Parts, step: int, loss: torch.Tensor, stop: bool) -> tuple[float, bool]:
    """Mean loss over the ranks and whether any is to stop. Raises Diverged on all ranks when one's loss is bad."""
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
    if num_bad:
        where = f"rank {rank_sum:.0f}" if num_bad == 1 else f"{num_bad:.0f} of {size} ranks"
        name = _first_non_finite(parts)
        culprit = f"the first parameter with a non-finite value or gradient is {name}" if name else "no gradient is"
        raise Diverged(f"step {step + 1}: the loss is not finite on {where}; {culprit}{_ADVICE}")
    return loss_sum / size, stops > 0


def _first_non_finite(parts: Parts) -> str | None:
    """The first parameter that is not finite, else the first whose (averaged) gradient is not."""
    named = list(parts.model.named_parameters())
    for name, param in named:
        if not bool(torch.isfinite(param).all()):
            return name
    for name, param in named:
        if param.grad is not None and not math.isfinite(float(param.grad.norm())):
            return name
    return None


def _wait(parts: Parts) -> None:
    if parts.world.device.type == "cuda":
        torch.cuda.synchronize(parts.world.device)
