"""Build an initialised model."""

from __future__ import annotations

import hashlib

import torch

from muonlm.config.errors import ConfigError
from muonlm.config.schema import GPTConfig
from muonlm.model.gpt import GPT

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


def build_model(config: GPTConfig, vocab_size: int, seed: int) -> GPT:
    """An fp32 model on the CPU, a function of its arguments alone.

    Norm weights are 1; every matrix is normal with standard deviation `init_std`, those that write to the residual
    stream with init_std / sqrt(2 * num_layers). Each parameter has a random stream of its own, seeded by `seed`
    and its name, so its values depend neither on the order of construction nor on the other parameters; the
    global random state is neither read nor changed.

    Raises:
        ConfigError: `config.vocab_size` is set and differs from `vocab_size`.
    """
    if config.vocab_size not in (None, vocab_size):
        raise ConfigError(
            f"model.vocab_size is {config.vocab_size}, but the data has {vocab_size} token ids; "
            "remove model.vocab_size or prepare the data with that vocabulary"
        )
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    model.to_empty(device="cpu")
    model.tie_weights()  # to_empty gives each module a parameter of its own
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            std = config.init_std
            if name.endswith(RESIDUAL_OUTPUTS):
                std /= (2 * config.num_layers) ** 0.5
            parameter.normal_(0.0, std, generator=_generator(seed, name))
    return model


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
