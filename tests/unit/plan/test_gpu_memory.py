"""Forecast memory against what a GPU really needs, in shapes whose activations outweigh everything else."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from muonlm.config.schema import TrainConfig
from muonlm.model.build import materialize, outline
from muonlm.optim.build import build_optimizer
from muonlm.plan.memory import make_model, memory_of

VOCAB_SIZE = 50304
GPT = {"kind": "gpt", "num_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "num_heads": 12}
WIDE = GPT | {"num_layers": 6, "hidden_size": 2048, "intermediate_size": 5632, "num_heads": 16, "num_kv_heads": 4}
EXPERTS = {"kind": "moe", "num_experts": 32, "experts_per_token": 4, "expert_size": 512}
MOE = WIDE | EXPERTS | {"hidden_size": 1024, "intermediate_size": 2816}
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "gpt-124m": (GPT | {"tie_embeddings": True}, 32, 1024),
    "wide": (WIDE, 4, 4096),
    "moe": (MOE, 8, 2048),
    "relu2": (GPT | {"activation": "relu2"}, 24, 1024),
    "no gate": (GPT | {"gated": False}, 24, 1024),
}
CASES = [(shape, kind, False) for shape in ("gpt-124m", "wide", "moe") for kind in ("none", "selective", "full")]
CASES += [("relu2", "none", False), ("no gate", "none", False)]
CASES += [
    ("gpt-124m", "none", True),
    ("gpt-124m", "selective", True),
    ("gpt-124m", "full", True),
    ("moe", "none", True),
]


def make(shape: str, checkpointing: str, compiled: bool) -> TrainConfig:
    model, batch, seq_len = SHAPES[shape]
    loop = {"steps": 100, "batch_size": batch, "precision": "bfloat16"}
    return TrainConfig.model_validate(
        {
            "name": "gpu",
            "data": {"path": "x", "seq_len": seq_len},
            "model": model,
            "loop": loop | {"activation_checkpointing": checkpointing, "compile": compiled},
        }
    )


def peaks(config: TrainConfig) -> tuple[int, int, float]:
    """Peak bytes of a forward and of a backward pass, beyond those before the model, and tokens a second of a step."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = outline(config.model, VOCAB_SIZE)
    for block in model.blocks:
        block.set_recompute(config.loop.activation_checkpointing)
    if config.loop.compile:
        model.compile_parts()
    materialize(model, 0, torch.device("cuda"))
    optimizer = build_optimizer(model, config.optim, iterate_dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB_SIZE, (config.loop.batch_size, config.data.seq_len), generator=generator).cuda()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):  # the last of them counts: state is there, and code compiled
        begin.record()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(ids, ids)
        forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        backward = torch.cuda.max_memory_allocated() - before
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end.record()
    torch.cuda.synchronize()
    return forward, backward, config.batch_tokens / begin.elapsed_time(end) * 1e3


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("shape", "checkpointing", "compiled"), CASES)
def test_peaks_are_those_of_a_gpu(shape: str, checkpointing: str, compiled: bool) -> None:
    torch._dynamo.reset()
    config = make(shape, checkpointing, compiled)
    memory = memory_of(
        make_model(config, world_size=1, vocab_size=VOCAB_SIZE, device="cuda"), micro_batch=config.loop.batch_size
    )
    forward, backward, speed = peaks(config)
    loss, *passes, _ = memory.phases.values()
    print(
        f"{shape} {checkpointing} compiled={compiled}: GB, forecast / real: loss {loss / 1e9:.2f} {forward / 1e9:.2f}"
    )
    print(f"backward {max(passes) / 1e9:.2f} {backward / 1e9:.2f}; {speed:,.0f} tokens/s")
    assert loss == pytest.approx(forward, rel=0.02)
    assert max(passes) == pytest.approx(backward, rel=0.15)
