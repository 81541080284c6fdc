"""From a configuration to everything a loop needs. Whatever is wrong with the input is found here."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import muonlm
from muonlm.bridge.tokenizer import check_same_tokenizer
from muonlm.checkpoint.store import Contents
from muonlm.config.errors import UserError
from muonlm.config.ranks import micro_batch_size
from muonlm.config.schema import TrainConfig
from muonlm.data.dataset import TokenDataset, open_split
from muonlm.data.loader import BatchOrder, batch
from muonlm.dist.agree import on_main, raised_on_all_ranks
from muonlm.dist.mesh import Mesh, make_mesh
from muonlm.dist.precision import bfloat16_is_fast
from muonlm.dist.process import World
from muonlm.model.build import outline
from muonlm.model.flops import flops_per_token
from muonlm.model.moe import forget_loads
from muonlm.optim.rules import assign_rules
from muonlm.optim.rules_table import rules_table
from muonlm.optim.stepping import StepOptimizer
from muonlm.optim.transfer import transferred
from muonlm.plan.fit import check_fits
from muonlm.plan.machine import host_memory_bytes
from muonlm.train.engines import start_engine
from muonlm.train.evaluate import eval_indices
from muonlm.train.peak_flops import peak_flops
from muonlm.train.reference import check_reference

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What the loop works with. `model` is the bare model, `wrapped` the one whose backward pass averages gradients.

    They are one and the same where parameters are sharded. `micro_batch` is in sequences; `eval_indices` and
    `final_indices` are the validation sequences of the evaluations along the way and at the end; `peak_flops` is that
    of all ranks together, None when unknown.
    """

    config: TrainConfig
    world: World
    mesh: Mesh
    train_data: TokenDataset
    validation_data: TokenDataset
    order: BatchOrder
    eval_indices: np.ndarray
    final_indices: np.ndarray
    model: nn.Module
    wrapped: nn.Module
    optimizer: StepOptimizer
    contents: Contents
    dtype: torch.dtype
    micro_batch: int
    flops_per_token: int
    peak_flops: float | None
    environment: dict[str, Any]
    rules: str

    @property
    def rank_batch(self) -> int:
        """Sequences of one optimizer step on this rank."""
        return self.config.loop.batch_size // self.mesh.data_size


def build(config: TrainConfig, world: World, recorded: dict[str, Any], init_from: str | None = None) -> Parts:
    """Build data, model and optimizer; called by all ranks.

    `init_from` is the directory of a model whose weights are taken. `recorded` is the environment.json of an earlier
    attempt, or empty: what was decided then by looking at the machine stays so, that the run goes on with the same
    numbers. Raises UserError for what does not fit together.
    """
    if config.loop.threads:
        torch.set_num_threads(config.loop.threads)
    torch.manual_seed(config.seed)
    train_data, validation_data = _open_data(config, world)
    vocab_size = config.model.vocab_size or train_data.vocab_size
    mesh = make_mesh(config, world)
    micro_batch = micro_batch_size(config, mesh.data_size)
    decided = on_main(lambda: _decide_precision(config, world, recorded))
    dtype, iterate_dtype = (getattr(torch, decided[key]) for key in ("precision", "newton_schulz_dtype"))
    with raised_on_all_ranks():
        if config.loop.check_memory:
            _check_memory(config, world, vocab_size, decided)
        model = outline(config.model, vocab_size)
        model.document_separator = train_data.end_of_text_id
        rules = transferred(assign_rules(model, config.optim), config.model.width_ratio)
        on_way = eval_indices(validation_data.num_sequences, config.data.seq_len, config.eval.tokens)
        at_end = eval_indices(validation_data.num_sequences, config.data.seq_len, config.eval.final_tokens)
        if world.is_main:
            _say_if_short(config, validation_data.num_sequences)
            check_reference(config, validation_data, len(on_way) * config.data.seq_len)
        if init_from is not None:
            check_same_tokenizer(init_from, config.data.path)
    running = start_engine(
        *(model, rules, mesh, config),
        dtype=dtype,
        iterate_dtype=iterate_dtype,
        micro_batch=micro_batch,
        init_from=init_from,
    )
    peak = config.track.peak_flops or (world.device.type == "cuda" and peak_flops(_device_name(world))) or None
    parts = Parts(
        config=config,
        world=world,
        mesh=mesh,
        train_data=train_data,
        validation_data=validation_data,
        order=BatchOrder(train_data.num_sequences, config.seed),
        eval_indices=on_way,
        final_indices=at_end,
        model=model,
        wrapped=running.wrapped,
        optimizer=running.optimizer,
        contents=running.contents,
        dtype=dtype,
        micro_batch=micro_batch,
        flops_per_token=flops_per_token(config.model, vocab_size, config.data.seq_len),
        peak_flops=peak * world.size if peak else None,
        environment={
            **describe_machine(world),
            **decided,
            **running.about,
            "ranks": mesh.grid._asdict(),
            "tokenizer_fingerprint": train_data.tokenizer_fingerprint,
            "train_fingerprint": train_data.fingerprint,
            "validation_fingerprint": validation_data.fingerprint,
        },
        rules=rules_table(rules, *running.plans),
    )
    _settle_buckets(parts)
    return parts


def describe_machine(world: World) -> dict[str, Any]:
    """Versions, source revision and devices, as recorded in environment.json."""
    return {
        "muonlm": muonlm.__version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": _device_name(world),
        "world_size": world.size,
        "backend": world.backend,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def _open_data(config: TrainConfig, world: World) -> tuple[TokenDataset, TokenDataset]:
    """Both splits; checksums are computed by the main rank alone."""
    data = config.data
    verify: Literal["auto", "always", "never"] = data.verify if world.is_main else "never"
    with raised_on_all_ranks():
        train_data = open_split(data.path, "train", data.seq_len, verify)
        validation_data = open_split(data.path, "validation", data.seq_len, verify)
        if config.model.vocab_size is not None and config.model.vocab_size < train_data.vocab_size:
            raise UserError(
                f"model.vocab_size {config.model.vocab_size} is less than the {train_data.vocab_size} token ids of "
                f"{data.path}; leave model.vocab_size unset, or prepare the data with a smaller vocabulary"
            )
    return train_data, validation_data


def _decide_precision(config: TrainConfig, world: World, recorded: dict[str, Any]) -> dict[str, str]:
    """Autocast dtype and that of the Newton-Schulz iterates, as an earlier attempt decided them or by a probe."""
    wanted: dict[str, str] = {"precision": config.loop.precision, "newton_schulz_dtype": "float32"}
    if config.optim.kind == "muon":
        wanted["newton_schulz_dtype"] = config.optim.newton_schulz.dtype
    if "auto" not in wanted.values():
        return wanted
    if all(recorded.get(key) in ("bfloat16", "float32") for key in wanted):
        return {key: recorded[key] for key in wanted}
    if any(Path(config.resolved_run_dir, "checkpoints").glob("step_*")):
        _log.warning(
            "environment.json of %s does not say in which precision the run began: it is decided anew, and the numbers "
            "may differ from those of a run that was not stopped",
            config.resolved_run_dir,
        )
    probed = "bfloat16" if bfloat16_is_fast(world.device) else "float32"
    return {key: probed if value == "auto" else value for key, value in wanted.items()}


def _check_memory(config: TrainConfig, world: World, vocab_size: int, decided: dict[str, str]) -> None:
    """Refuse what cannot fit into the device, or into this rank's share of what the host has left."""
    is_gpu = world.device.type == "cuda"
    if is_gpu:
        available: int | None = torch.cuda.get_device_properties(world.device).total_memory
    else:
        available = host_memory_bytes()
    if available is None:
        return
    raw = config.model_dump()
    raw["loop"]["precision"] = decided["precision"]
    if config.optim.kind == "muon":
        raw["optim"]["newton_schulz"]["dtype"] = decided["newton_schulz_dtype"]
    check_fits(
        TrainConfig.model_validate(raw),
        world_size=world.size,
        vocab_size=vocab_size,
        memory_bytes=available if is_gpu else available // _ranks_of_host(world),
        device="cuda" if is_gpu else "cpu",
    )


def _ranks_of_host(world: World) -> int:
    """Ranks on this host, as torchrun says; all of them, where something else started them."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdigit() and int(text) else world.size


def _say_if_short(config: TrainConfig, available: int) -> None:
    for option, tokens in (
        ("eval.tokens", config.eval.tokens),
        ("eval.final_tokens", config.eval.final_tokens),
    ):
        wanted, seq_len = tokens // config.data.seq_len, config.data.seq_len
        if wanted > available:
            _log.warning(
                "%s is %d, but the validation split has %d sequences of %d tokens; evaluating on those %d tokens",
                *(option, tokens, available, seq_len, available * seq_len),
            )
        elif wanted == 0:
            _log.warning("%s is %d, less than one sequence; evaluating on one of %d tokens", option, tokens, seq_len)


def _settle_buckets(parts: Parts) -> None:
    """Two forward and backward passes whose gradients are thrown away, under DistributedDataParallel.

    DistributedDataParallel lays its gradient buckets out anew after the first backward pass. With three or more
    ranks the layout decides in which order a sum is rounded, so that the first step after a restart would differ
    from the same step of a run that was not interrupted.
    """
    if not isinstance(parts.wrapped, DistributedDataParallel):
        return
    ids, labels = batch(parts.train_data, parts.order, 0, 1)
    for _ in range(2):  # the new layout is taken up by the forward pass that follows
        with torch.autocast(parts.world.device.type, dtype=torch.bfloat16, enabled=parts.dtype == torch.bfloat16):
            loss = parts.wrapped(ids.to(parts.world.device), labels.to(parts.world.device))
        loss.backward()
    parts.optimizer.zero_grad(set_to_none=True)
    forget_loads(parts.model)


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"cpu ({platform.processor() or platform.machine()})"


def _git_revision() -> str | None:
    """Revision of the checkout that muonlm runs from, with -dirty for local changes; None outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        result = subprocess.run(
            command, cwd=Path(muonlm.__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
