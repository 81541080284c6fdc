"""What Muon takes of the dense decoder, from the configuration alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from muonlm.config.errors import UserError
from muonlm.config.optim import MuonConfig, Role
from muonlm.config.schema import TrainConfig
from muonlm.model.flops import block_matrices
from muonlm.optim.pieces import Piece, pieces_of
from muonlm.optim.select import is_selected, split_of


def muon_matrices(config: TrainConfig, vocab_size: int) -> list[Piece]:
    """The matrices that Muon orthogonalizes, `optim.overrides` included; none with AdamW. `param` counts parameters.

    Raises UserError when a split does not divide its weight.
    """
    if not isinstance(config.optim, MuonConfig):
        return []
    pieces: list[Piece] = []
    for number, (name, role, shape) in enumerate(_matrices(config, vocab_size)):
        rule, split = "muon" if role == "hidden" else "adamw", None
        for override in config.optim.overrides:
            if is_selected(override, names=[name], role=role, classes=["Linear"]):
                rule, split = override.rule or rule, split_of(override.split)
        if rule == "muon":
            try:
                pieces += pieces_of(number, name, (1, *shape), split)
            except UserError as error:
                raise UserError(f"optim.overrides: {error}") from None
    return pieces


def _matrices(config: TrainConfig, vocab_size: int) -> Iterator[tuple[str, Role, tuple[int, int]]]:
    """Name, role and shape of every linear layer's weight."""
    for layer in range(config.model.num_layers):
        for name, shape in block_matrices(config.model, layer).items():
            yield f"model.layers.{layer}.{name}", "hidden", shape  # type: ignore[misc]
    if not config.model.tie_embeddings:
        yield "lm_head.weight", "head", (vocab_size, config.model.hidden_size)
