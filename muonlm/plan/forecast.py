"""The forecast of a run, from its configuration, the number of ranks and the devices. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from muonlm.config.schema import TrainConfig
from muonlm.model.flops import count_parameters
from muonlm.plan.advice import advise
from muonlm.plan.fit import largest_micro_batch, misfit
from muonlm.plan.hardware import Machines
from muonlm.plan.memory import Memory, make_model, memory_of
from muonlm.plan.owners import Owners
from muonlm.plan.time import StepFlops, StepTime, step_flops, step_time
from muonlm.plan.traffic import Transfer, transfers


@dataclass(frozen=True)
class Forecast:
    """What a run needs. Memory and traffic are those of one rank.

    Fields:
        config: that of the run; machines: the devices.
        world_size: ranks. engine: what averages gradients (`muonlm.plan.parameters.Layout`).
        grid: ranks by axis.
        parameters: counts by kind (`muonlm.model.flops.count_parameters`).
        tokens, steps: of the whole run.
        micro_batch: sequences of a forward pass; micro_steps: passes of one rank in an optimizer step.
        memory: bytes by kind; sent: collectives of a step; owners: Muon's balance.
        flops, time: of an optimizer step; time is a prediction.
        largest_micro_batch: that fits; None where none does or the memory is not known.
        misfit: why the run does not fit, and what would; None where it does.
        advice: what takes the time of a slow step, and what is predicted to be faster; None where it is not slow.
    """

    config: TrainConfig
    machines: Machines
    world_size: int
    engine: str
    grid: dict[str, int]
    parameters: dict[str, int]
    tokens: int
    steps: int
    micro_batch: int
    micro_steps: int
    memory: Memory
    sent: list[Transfer]
    owners: Owners
    flops: StepFlops
    time: StepTime
    largest_micro_batch: int | None
    misfit: str | None
    advice: str | None

    @property
    def days(self) -> float:
        """Predicted days of the run; evaluations and checkpoints are left out."""
        return self.steps * self.time.total / 86400

    @property
    def rank_hours(self) -> float:
        """Predicted hours of all ranks together."""
        return self.days * 24 * self.world_size

    def sent_bytes(self, *, phase: str | None = None, muons: bool | None = None, between_nodes: bool = False) -> float:
        """Bytes that a rank sends in a step: of one phase, of Muon alone or of the rest, or between nodes alone."""
        return sum(
            transfer.between_nodes(self.machines.per_node) if between_nodes else transfer.num_bytes
            for transfer in self.sent
            if phase in (None, transfer.phase) and muons in (None, transfer.is_muons)
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        out = {name: getattr(self, name) for name in ("world_size", "engine", "grid", "parameters", "tokens", "steps")}
        out |= {
            name: getattr(self, name)
            for name in ("micro_batch", "micro_steps", "largest_micro_batch", "misfit", "advice")
        }
        between = [transfer.between_nodes(self.machines.per_node) for transfer in self.sent]
        return {
            "schema": "muonlm-plan/1",
            "name": self.config.name,
            **out,
            "machines": asdict(self.machines),
            "memory_bytes": asdict(self.memory) | {"phases": self.memory.phases, "peak": self.memory.peak},
            "sent_in_a_step": [asdict(t) | {"between_nodes_bytes": b} for t, b in zip(self.sent, between, strict=True)],
            "owners": asdict(self.owners) | {"imbalance": self.owners.imbalance},
            "flops_of_a_step": asdict(self.flops),
            "predicted_s": asdict(self.time) | {"total": self.time.total, "muon_share": self.time.muon_share},
            "predicted_days": self.days,
            "predicted_rank_hours": self.rank_hours,
        }


def forecast(config: TrainConfig, *, world_size: int, vocab_size: int, machines: Machines) -> Forecast:
    """Forecast the run that `config` describes.

    Raises:
        UserError: the ranks do not divide as `dist` asks, or `loop.batch_size` into ranks and micro-batches.
    """
    model = make_model(config, world_size=world_size, vocab_size=vocab_size, device=machines.device.kind)
    micro_batch, machines = model.micro_batch, machines.with_shares(compiled=config.loop.compile)
    owners = model.owners
    memory, sent, flops = (
        memory_of(model, micro_batch),
        transfers(model, owners, micro_batch),
        step_flops(model, owners),
    )
    time = step_time(model, memory, owners, flops, sent, machines)
    usable = machines.usable_bytes
    wrong = misfit(model, usable) if usable else None
    return Forecast(
        config=config,
        machines=machines,
        world_size=world_size,
        engine=model.layout.engine,
        grid=model.layout.grid._asdict(),
        parameters=count_parameters(config.model, vocab_size),
        tokens=config.num_steps * config.batch_tokens,
        steps=config.num_steps,
        micro_batch=micro_batch,
        micro_steps=model.rank_batch // micro_batch,
        memory=memory,
        sent=sent,
        owners=owners,
        flops=flops,
        time=time,
        largest_micro_batch=largest_micro_batch(model, usable) if usable else None,
        misfit=wrong,
        advice=None if wrong else advise(model, time, machines),
    )
