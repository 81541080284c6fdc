"""The typed configuration of a training run. Every field's description is its help text; `unit` names its unit.

Sources of truth flow from here: validation, `muonlm train --help` and docs/config.md. Imports no torch.
"""

from __future__ import annotations

import os
from typing import ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from muonlm.config.model import GPTConfig, ModelConfig, MoEConfig
from muonlm.config.optim import AdamWConfig, AuxConfig, MuonConfig, NewtonSchulzConfig, OptimConfig
from muonlm.config.section import NAME_PATTERN, Section, field

__all__ = [
    "NAME_PATTERN",
    "AdamWConfig",
    "AuxConfig",
    "CheckpointConfig",
    "DataConfig",
    "DistConfig",
    "EvalConfig",
    "GPTConfig",
    "LoopConfig",
    "MoEConfig",
    "ModelConfig",
    "MuonConfig",
    "NewtonSchulzConfig",
    "OptimConfig",
    "ScheduleConfig",
    "Section",
    "TrackConfig",
    "TrainConfig",
    "field",
]


class DataConfig(Section):
    """Token shards to train on, as written by `muonlm data prepare`."""

    path: str = field(..., "Directory with prepared token shards.")
    prepare: str | None = field(
        None, "Data config (name or path) that writes `data.path`, to be run when that directory does not exist yet."
    )
    seq_len: int = field(128, "Context length of one training sequence.", unit="tokens", ge=2)
    verify: Literal["auto", "always", "never"] = field(
        "auto", "Check shard checksums at start: auto checks data sets up to 1 GiB; sizes are always checked."
    )


class ScheduleConfig(Section):
    """Learning-rate multiplier over the run: linear warm-up, then the named shape. All groups share it."""

    kind: Literal["wsd", "cosine", "linear"] = field(
        "wsd", "wsd: constant, then linear decay over the last decay_fraction; cosine; linear."
    )
    warmup_steps: int = field(20, "Linear warm-up from 0.", unit="steps", ge=0)
    decay_fraction: float = field(0.4, "Share of the run that decays (wsd only).", ge=0, le=1)
    final_ratio: float = field(0.0, "Learning rate at the end, relative to the peak.", ge=0, le=1)


class LoopConfig(Section):
    """Length, batch and precision of the run."""

    alternatives: ClassVar[tuple[str, ...]] = ("tokens", "steps")

    tokens: int | None = field(None, "Training budget; give either this or steps.", unit="tokens", ge=1)
    steps: int | None = field(None, "Training budget; give either this or tokens.", unit="optimizer steps", ge=1)
    batch_size: int = field(16, "Sequences per optimizer step over all ranks.", unit="sequences", ge=1, le=10**7)
    micro_batch_size: int | None = field(
        None, "Sequences per rank and forward pass; unset: the rank's whole share.", unit="sequences", ge=1
    )
    grad_clip: float = field(
        1.0, "Largest global gradient norm; 0 turns clipping off. Never changes the size of a Muon step.", ge=0
    )
    precision: Literal["auto", "bfloat16", "float32"] = field(
        "auto", "Autocast dtype of the forward pass: auto takes bfloat16 where the device multiplies it fast."
    )
    activation_checkpointing: Literal["none", "selective", "full"] = field(
        "none",
        "What each block computes anew in the backward pass to save memory: nothing; all but its matrix products and "
        "attention; everything.",
    )
    compile: bool = field(False, "Compile each block with torch.compile: minutes at the start, faster steps on a GPU.")
    threads: int = field(0, "CPU threads of each rank; 0 leaves the library's choice.", ge=0)
    device: Literal["auto", "cpu", "cuda"] = field("auto", "Device: auto takes CUDA where there is one.")
    check_memory: bool = field(
        True, "Refuse a run whose forecast (see `muonlm plan`) exceeds the memory of a device before it starts."
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("give exactly one of loop.tokens and loop.steps")
        return self


class EvalConfig(Section):
    """Validation loss on held-out documents: the same sequences at every evaluation, on any number of ranks."""

    interval_steps: int = field(32, "Steps between evaluations; 0 evaluates only at the end.", unit="steps", ge=0)
    tokens: int = field(8192, "Validation tokens of an evaluation along the way.", unit="tokens", ge=1)
    final_tokens: int = field(65536, "Validation tokens of the evaluation at the end.", unit="tokens", ge=1)


class CheckpointConfig(Section):
    """Where a run can go on. A checkpoint at the end and on a stop signal is always written."""

    interval_steps: int = field(0, "Steps between checkpoints; 0 saves only at the end or on a signal.", ge=0)
    keep: int = field(2, "Checkpoints to keep.", ge=1)


class TrackConfig(Section):
    """What is recorded besides metrics.jsonl, which is always written."""

    interval_steps: int = field(10, "Steps between training records.", unit="steps", ge=1)
    console: bool = field(True, "Progress on the terminal.")
    tensorboard: bool = field(False, "TensorBoard event files in the run directory.")
    wandb: Literal["off", "offline", "online"] = field("off", "Weights & Biases.")
    wandb_project: str = field("muonlm", "Weights & Biases project.")
    peak_flops: float | None = field(
        None, "Peak rate of one device for MFU; known GPUs need none.", unit="FLOP/s", gt=0
    )
    reference: str | None = field(None, "Run directory whose evaluation curve `tokens_ratio` is logged against.")


class DistConfig(Section):
    """Process group, and what each rank keeps; torchrun's environment decides rank and world size."""

    backend: Literal["auto", "gloo", "nccl"] = field("auto", "auto takes nccl on CUDA, gloo on CPU.")
    timeout_s: float = field(600.0, "How long a collective may wait before the run stops.", unit="s", gt=0, le=10**7)
    zero: Literal[0, 1, 2, 3] = field(
        0,
        "What is cut over the data-parallel ranks rather than kept on each: 0 nothing, 1 optimizer state, "
        "2 gradients too, 3 parameters too (FSDP2).",
    )
    engine: Literal["torch", "deepspeed"] = field(
        "torch", "What averages gradients and cuts the model: torch with our ZeRO, or DeepSpeed (zero = 1, 2 or 3)."
    )
    deepspeed_config: str | None = field(
        None, 'JSON file whose `zero_optimization` goes to DeepSpeed: offload, bucket sizes (engine = "deepspeed").'
    )
    replicas: int = field(
        1, "Copies of the model, each cut over its own share of the ranks (HSDP); more than 1 needs zero = 3.", ge=1
    )
    tensor_parallel: int = field(
        1, "Ranks that share the matrices of each layer; with other ranks beside them it needs zero = 3.", ge=1
    )
    expert_parallel: int = field(
        1,
        "Ranks, of those that a model is cut over, that hold different experts and send each other their tokens; "
        "needs zero = 3.",
        ge=1,
    )
    gather_dtype: Literal["auto", "float32", "bfloat16"] = field(
        "auto",
        "Dtype in which zero = 3 gathers parameters for forward and backward pass; gradients are averaged in float32. "
        "auto takes bfloat16 on GPUs where loop.precision comes out as that.",
    )
    reshard_after_forward: bool = field(
        True, "Whether a block's gathered parameters are freed between forward and backward pass (zero = 3)."
    )

    @model_validator(mode="after")
    def _replicas_are_cut(self) -> Self:
        if self.replicas > 1 and self.zero != 3:
            raise ValueError(
                f"replicas {self.replicas} needs zero = 3; with zero = {self.zero} every rank is a replica: leave it 1"
            )
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        if self.engine == "torch":
            if self.deepspeed_config is not None:
                raise ValueError('deepspeed_config needs engine = "deepspeed"')
            return self
        if self.zero == 0:
            raise ValueError('engine "deepspeed" needs zero = 1, 2 or 3; without ZeRO take engine = "torch"')
        wrong = {
            "replicas": self.replicas > 1,
            "tensor_parallel": self.tensor_parallel > 1,
            "expert_parallel": self.expert_parallel > 1,
            'gather_dtype = "bfloat16"': self.gather_dtype == "bfloat16",
            "reshard_after_forward = false": not self.reshard_after_forward,
        }
        if asked := [key for key, is_asked in wrong.items() if is_asked]:
            raise ValueError(f'engine "deepspeed" has no {", ".join(asked)}; take engine = "torch"')
        return self

    @model_validator(mode="after")
    def _experts_are_cut(self) -> Self:
        if self.expert_parallel > 1 and self.zero != 3:
            raise ValueError(
                f"expert_parallel {self.expert_parallel} needs zero = 3: it takes ranks that the model is cut over"
            )
        return self


class TrainConfig(Section):
    """One training run."""

    name: str = field(..., "Name of the run.", min_length=1, pattern=NAME_PATTERN)
    seed: int = field(0, "Seeds the initialisation and the data order.", ge=0, lt=2**63)
    run_dir: str | None = field(None, "Run directory; runs/<name> when unset.")
    init_from: str | None = field(
        None,
        "Directory of a model (Qwen3, Qwen3-MoE, GLM-4-MoE) whose weights the run starts from, as `muonlm export` "
        "writes it; `muonlm import` prints the model table that goes with it.",
    )
    branch_from: str | None = field(
        None,
        "Run directory, or a checkpoint in it, that the run goes on from under the settings given here: weights, place "
        "in the data and, where optim.kind is the same, the optimizer's state. Steps count on.",
    )
    data: DataConfig = field(..., "Token shards.")
    model: ModelConfig = field(GPTConfig(), "Model.")
    optim: OptimConfig = field(MuonConfig(), "Optimizer.")
    schedule: ScheduleConfig = field(ScheduleConfig(), "Learning-rate schedule.")
    loop: LoopConfig = field(..., "Budget, batch, precision.")
    eval: EvalConfig = field(EvalConfig(), "Validation.")
    checkpoint: CheckpointConfig = field(CheckpointConfig(), "Checkpoints.")
    track: TrackConfig = field(TrackConfig(), "Metrics.")
    dist: DistConfig = field(DistConfig(), "Process group.")

    @field_validator("branch_from")
    @classmethod
    def _normal_path(cls, value: str | None) -> str | None:
        return None if value is None else os.path.normpath(value)  # one spelling, whichever is given

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        if self.loop.tokens is not None and self.loop.tokens < self.batch_tokens:
            raise ValueError(
                f"loop.tokens {self.loop.tokens} is less than one batch "
                f"({self.loop.batch_size} x {self.data.seq_len} = {self.batch_tokens} tokens)"
            )
        if self.schedule.warmup_steps > self.num_steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is more than the {self.num_steps} steps of the "
                "run; lower it or raise the budget"
            )
        return self

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.init_from is not None and self.branch_from is not None:
            raise ValueError("give init_from, for weights alone, or branch_from, for a run to go on from; not both")
        return self

    @model_validator(mode="after")
    def _context_fits(self) -> Self:
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is more than model.max_seq_len {self.model.max_seq_len}, the "
                "longest context that the rotary positions are meant for; shorten the sequences, or raise max_seq_len "
                "and with it rope_theta"
            )
        return self

    @model_validator(mode="after")
    def _expert_parallel_fits(self) -> Self:
        size = self.dist.expert_parallel
        if size > 1 and not isinstance(self.model, MoEConfig):
            raise ValueError(f'dist.expert_parallel {size} needs a model with experts: model.kind = "moe"')
        if isinstance(self.model, MoEConfig) and self.model.num_experts % size:
            fitting = [str(n) for n in range(1, self.model.num_experts + 1) if self.model.num_experts % n == 0]
            raise ValueError(
                f"dist.expert_parallel {size} does not divide model.num_experts {self.model.num_experts}; "
                f"what does: {', '.join(fitting)}"
            )
        if size > 1 and self.loop.compile and self.loop.activation_checkpointing == "selective":
            raise ValueError(
                'loop.activation_checkpointing "selective" does not work in compiled blocks with expert parallelism '
                '(torch loses count of what it kept); take "full" or "none", or loop.compile = false'
            )
        return self

    @model_validator(mode="after")
    def _tensor_parallel_fits(self) -> Self:
        size = self.dist.tensor_parallel
        if undivided := self.model.undivided_by(size):
            fitting = [str(n) for n in range(1, self.model.num_heads + 1) if not self.model.undivided_by(n)]
            raise ValueError(
                f"dist.tensor_parallel {size} does not divide {' and '.join(undivided)}; "
                f"what does: {', '.join(fitting)}"
            )
        if isinstance(self.model, MoEConfig) and self.model.experts == "grouped" and self.model.expert_size // size % 8:
            raise ValueError(
                f'model.experts = "grouped" needs model.expert_size {self.model.expert_size} / dist.tensor_parallel '
                f'{size} to be a multiple of 8; leave it "auto"'
            )
        return self

    @model_validator(mode="after")
    def _engine_gathers_within_blocks(self) -> Self:
        is_selective = self.loop.activation_checkpointing == "selective"
        if self.dist.engine == "deepspeed" and self.dist.zero == 3 and (self.loop.compile or is_selective):
            wrong = "loop.compile" if self.loop.compile else 'loop.activation_checkpointing "selective"'
            instead = "loop.compile = false" if self.loop.compile else 'loop.activation_checkpointing = "full"'
            raise ValueError(
                f'{wrong} does not go with dist.engine "deepspeed" and zero = 3, whose hooks gather parameters within '
                f'blocks; take {instead}, dist.zero = 2, or dist.engine = "torch"'
            )
        return self

    @property
    def resolved_run_dir(self) -> str:
        """The run directory."""
        return self.run_dir or f"runs/{self.name}"

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.loop.batch_size * self.data.seq_len

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; a token budget is rounded down to whole batches."""
        return self.loop.steps if self.loop.steps is not None else (self.loop.tokens or 0) // self.batch_tokens
