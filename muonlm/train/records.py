"""The records of docs/metrics.md, from what steps and evaluations return."""

from __future__ import annotations

import math
from typing import Any

from muonlm.train.run_dir import Progress
from muonlm.train.setup import Parts
from muonlm.train.step import StepResult


class Meter:
    """Adds up what happens between two train records."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._clear()

    def add(self, result: StepResult, progress: Progress) -> None:
        """Count a step and move `progress` on by it."""
        progress.step += 1
        progress.sequences += self._parts.config.loop.batch_size
        progress.seconds += result.seconds
        self._steps += 1
        self._seconds += result.seconds
        self._skipped += result.is_skipped
        # Only a measured step waits for the GPU; on a CPU every step's optimizer time is exact.
        if result.updates is not None or self._parts.world.device.type == "cpu":
            self._optimizer_s.append(result.optimizer_s)

    def train_record(self, result: StepResult, progress: Progress) -> dict[str, Any]:
        """The record of a measured step; speeds are means since the record before. Starts a new interval."""
        assert result.updates is not None, "a recorded step is measured"
        batch_tokens = self._parts.config.batch_tokens
        step_s = self._seconds / self._steps
        tokens_per_s = batch_tokens / step_s
        optimizer_s = sum(self._optimizer_s) / len(self._optimizer_s)
        record: dict[str, Any] = {
            "step": progress.step,
            "tokens": progress.step * batch_tokens,
            "time_s": progress.seconds,
            "loss": result.loss,
            "step_s": step_s,
            "tokens_per_s": tokens_per_s,
            "optimizer_s": optimizer_s,
            "optimizer_share": optimizer_s / step_s,
        }
        if self._parts.peak_flops:
            record["mfu"] = tokens_per_s * self._parts.flops_per_token / self._parts.peak_flops
        record["lr"] = {group["name"]: group["lr"] for group in self._parts.optimizer.param_groups}
        record["grad_norm"] = result.grads.total
        record["grad_norms"] = result.grads.by_group
        record["clip_factor"] = result.grads.clip_factor
        record["update_norms"] = result.updates.by_group
        record["update_rms"] = result.updates.rms_by_group
        if result.balance is not None:
            record["experts"] = result.balance._asdict()
        if self._skipped:
            record["skipped_steps"] = self._skipped
        self._clear()
        return record

    def _clear(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._skipped = 0
        self._optimizer_s: list[float] = []


def eval_record(parts: Parts, progress: Progress, loss: float, num_sequences: int, *, final: bool) -> dict[str, Any]:
    """The record of an evaluation."""
    return {
        "step": progress.step,
        "tokens": progress.step * parts.config.batch_tokens,
        "time_s": progress.seconds,
        "loss": loss,
        "bits_per_byte": loss / math.log(2) / parts.validation_data.bytes_per_token,
        "eval_tokens": num_sequences * parts.config.data.seq_len,
        "final": final,
    }


def event_record(progress: Progress, event: str, **details: Any) -> dict[str, Any]:
    """The record of something that happened to the run."""
    return {"step": progress.step, "event": event, "details": details}
