"""Build an initialised model, whole on one process or in the parts that ranks keep of it."""

from __future__ import annotations

import hashlib
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from muonlm.config.errors import ConfigError
from muonlm.config.schema import GPTConfig
from muonlm.model.gpt import GPT
from muonlm.model.regions import local
from muonlm.model.transfer import std_factor

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
CHUNK_NUMEL = 2**24  # of one random stream: what a rank draws for a part of a parameter, at least


def build_model(config: GPTConfig, vocab_size: int, seed: int) -> GPT:
    """An initialised fp32 model on the CPU, a function of its arguments alone: `materialize` of an `outline`."""
    model = outline(config, vocab_size)
    materialize(model, seed, torch.device("cpu"))
    return model


def outline(config: GPTConfig, vocab_size: int) -> GPT:
    """An fp32 model without values, on the meta device: to be cut over ranks before it takes memory.

    Raises:
        ConfigError: `config.vocab_size` is set and differs from `vocab_size`.
    """
    if config.vocab_size not in (None, vocab_size):
        raise ConfigError(
            f"model.vocab_size is {config.vocab_size}, but the data has {vocab_size} token ids; "
            "remove model.vocab_size or prepare the data with that vocabulary"
        )
    with torch.device("meta"):
        return GPT(config, vocab_size)


@torch.no_grad()
def materialize(model: GPT, seed: int, device: torch.device) -> None:
    """Allocate on `device` what this rank keeps of an outline, and fill it; communicates nothing.

    Norm weights are 1; every matrix is normal with standard deviation `init_std` times `std_factor`, those that write
    to the residual stream with 1 / sqrt(2 * num_layers) of that. Each parameter has random streams of its own, seeded
    by `seed`, its name and the place in it, drawn on the CPU. So its values depend neither on the order of
    construction, nor on other parameters, nor on how and over how many ranks it is cut; the global random state is
    neither read nor changed.
    """
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gives each module a parameter of its own
    for buffer in model.buffers():
        buffer.zero_()
    config = model.config
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            local(parameter).fill_(1.0)
            continue
        std = config.init_std * std_factor(config, name)
        if name.endswith(RESIDUAL_OUTPUTS):
            std /= (2 * config.num_layers) ** 0.5
        _fill(parameter, std, f"{seed}:{name}")


def _fill(parameter: Tensor, std: float, seed: str) -> None:
    """Draw the chunks, of whole indices of the first dim, that this rank has a part of, and keep that part."""
    part, shape = local(parameter), tuple(parameter.shape)
    start = [0] * len(shape)
    if isinstance(parameter, DTensor):
        size, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
        assert tuple(size) == tuple(part.shape), (seed, size, part.shape)
        start = list(offset)
    if part.numel() == 0:
        return
    inside = [slice(begin, begin + length) for begin, length in zip(start[1:], part.shape[1:])]
    begin, end = start[0], start[0] + part.shape[0]
    step = max(1, CHUNK_NUMEL // prod(shape[1:]))
    for number in range(begin // step, -(-end // step)):
        low, high = number * step, min((number + 1) * step, shape[0])
        generator = _generator(f"{seed}:{number}" if number else seed)
        chunk = torch.empty(high - low, *shape[1:]).normal_(0.0, std, generator=generator)
        first, last = max(begin, low), min(end, high)
        part[first - begin : last - begin].copy_(chunk[(slice(first - low, last - low), *inside)])


def _generator(seed: str) -> torch.Generator:
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
