"""A small GPT under DeepSpeed on real ranks, and the same on one process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from muonlm.bridge.deepspeed.training import import_deepspeed

VOCAB, SEQ_LEN, BATCH = 61, 12, 8
# With fp32 iterates, what is left between engines is the order in which sums over ranks are rounded.
MUON: dict[str, Any] = {"lr": 0.02, "aux": {"lr": 0.01}, "newton_schulz": {"dtype": "float32"}}
SHAPE = {"hidden_size": 36, "intermediate_size": 50, "num_layers": 3, "num_heads": 3}


def new_model(*, experts: bool = False, **shape: int) -> nn.Module:
    """A GPT of odd sizes, so that partitions cut matrices; with `experts` also stacks of them."""
    from muonlm.config.model import GPTConfig, MoEConfig
    from muonlm.model.build import build_model

    if experts:
        moe = {"num_experts": 5, "expert_size": 20, "experts_per_token": 2}
        return build_model(MoEConfig.model_validate({**SHAPE, **moe, **shape}), VOCAB, seed=0)
    return build_model(GPTConfig.model_validate({**SHAPE, **shape}), VOCAB, seed=0)


def tokens(step: int) -> torch.Tensor:
    """(BATCH, SEQ_LEN + 1) token ids of a step, some sequences that can be learned."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (BATCH, 1), generator=generator)
    return (start + torch.arange(SEQ_LEN + 1) * torch.randint(1, 4, (BATCH, 1), generator=generator)) % VOCAB


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token."""
    return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())


def reference(num_steps: int, clip: float = 0.0, muon: dict[str, Any] | None = None, **shape: Any) -> SimpleNamespace:
    """Losses, weights and momenta of one process."""
    from muonlm.config.optim import MuonConfig
    from muonlm.optim.build import build_optimizer

    model = new_model(**shape)
    optimizer = build_optimizer(model, MuonConfig.model_validate(muon or MUON))
    losses = []
    for step in range(num_steps):
        loss = loss_of(model, tokens(step))
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    named = dict(model.named_parameters())
    return SimpleNamespace(
        losses=losses,
        weights={name: param.detach() for name, param in named.items()},
        momenta={
            name: s["momentum_buffer"] for name, p in named.items() if "momentum_buffer" in (s := optimizer.state[p])
        },
    )


def ds_config(
    stage: int, *, accumulate: int = 1, clip: float = 0.0, zero: dict[str, Any] | None = None, **keys: Any
) -> Any:
    """A DeepSpeed configuration for BATCH sequences a step on the ranks there are."""
    return {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size() // accumulate,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **keys,
    }


def new_engine(config: dict[str, Any], muon: dict[str, Any] | None = None, model: nn.Module | None = None) -> Any:
    """The model in an engine of DeepSpeed's with our optimizer, bound."""
    import deepspeed

    from muonlm.bridge.deepspeed import bind, muon_for_deepspeed

    model = new_model() if model is None else model
    engine, *_ = deepspeed.initialize(model=model, optimizer=muon_for_deepspeed(model, **(muon or MUON)), config=config)
    bind(engine)
    return engine


def train(engine: Any, num_steps: int, begin: int = 0) -> list[float]:
    """Take steps on this rank's share of each step's sequences; the mean losses over all ranks."""
    losses = []
    rank, world = dist.get_rank(), dist.get_world_size()
    num_micro = engine.gradient_accumulation_steps()
    for step in range(begin, begin + num_steps):
        total = 0.0
        for micro in tokens(step).chunk(world)[rank].chunk(num_micro):
            loss = loss_of(engine, micro)
            engine.backward(loss)
            engine.step()
            total += loss.item() / num_micro
        mean = torch.tensor(total, dtype=torch.float64)
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter whole, as the model computes with it.

    DeepSpeed's safe_get_full_fp32_param gives permuted values under round_robin_gradients (0.19.8).
    """
    import deepspeed

    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=hasattr(params[0], "ds_id")):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


@pytest.fixture(scope="session")
def _deepspeed() -> None:
    """Import it before ranks are forked."""
    pytest.importorskip("deepspeed")
    import_deepspeed(torch.device("cpu"))
    for module in ("deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2"):
        importlib.import_module(module)


@pytest.fixture
def gpt(_deepspeed: None) -> SimpleNamespace:
    """The functions of this file."""
    return SimpleNamespace(
        new_model=new_model, tokens=tokens, loss_of=loss_of, reference=reference, config=ds_config,
        engine=new_engine, train=train, weights=weights_of, muon=MUON,
    )  # fmt: skip


@pytest.fixture
def on_ranks(run_ranks: Callable[..., list[Any]], _deepspeed: None) -> Callable[..., list[Any]]:
    """`run_ranks` for what starts an engine: more patient."""

    def run(fn: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> list[Any]:
        return run_ranks(fn, world_size, *args, timeout_s=240, **options)

    return run
