"""Does Muon leave the hidden matrices with a flatter spectrum than AdamW? Read from the last checkpoints of runs.

With singular values s_i of a matrix and q_i = s_i^2 / sum_j s_j^2:
effective rank = exp(-sum_i q_i ln q_i) / min(rows, columns), in (0, 1], 1 where all singular values are equal
(the exponential of the entropy of the squared singular values, as in arXiv:2509.26030; Roy and Vetterli's original of
2007 uses s_i instead of s_i^2);
stable rank = sum_i s_i^2 / s_1^2, between 1 and min(rows, columns).

Both are measured on the weights and on what training changed (weights minus initialisation, which the seed gives
back): in short runs of small models much of the spectrum of the weights is still that of the random initialisation.
"""

from __future__ import annotations

import tomllib
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.table import Table

from muonlm.checkpoint.store import latest
from muonlm.config.errors import UserError
from muonlm.config.load import validate
from muonlm.config.schema import TrainConfig
from muonlm.model.build import build_model
from muonlm.model.flops import block_matrices, is_router

MEASURES = ("effective_rank", "stable_rank", "update_effective_rank", "update_stable_rank")


def effective_rank(singular_values: torch.Tensor) -> float:
    """Exponential of the entropy of the normalised squares over their number; 0 for a zero matrix."""
    energy = singular_values.double() ** 2
    if not energy.sum() > 0:
        return 0.0
    share = energy / energy.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return float(entropy.exp()) / share.numel()


def stable_rank(singular_values: torch.Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm; 0 for a zero matrix."""
    energy = singular_values.double() ** 2
    return float(energy.sum() / energy.max()) if energy.max() > 0 else 0.0


def run(run_dirs: Sequence[str | Path]) -> dict[str, Any]:
    """Spectra of each run by kind of hidden matrix (mean over layers), and the verdict on Muon against AdamW.

    Raises UserError for a run without a complete checkpoint.
    """
    runs = [_measure(Path(path)) for path in run_dirs]
    return {"schema": 1, "runs": runs, "verdict": _verdict(runs)}


def table(result: dict[str, Any]) -> Table:
    """The effective ranks as a table: a row for each kind of matrix, weights and update of each run."""
    grid = Table(title="effective rank (weights / update)", title_justify="left")
    grid.add_column("matrix")
    for entry in result["runs"]:
        grid.add_column(f"{entry['optimizer']}, seed {entry['seed']}\n{entry['run_dir']}", justify="right")
    for kind in result["runs"][0]["kinds"]:
        cells = [entry["kinds"].get(kind, {}) for entry in result["runs"]]
        grid.add_row(
            kind,
            *(f"{c.get('effective_rank', 0):.2f} / {c.get('update_effective_rank', 0):.2f}" for c in cells),
        )
    return grid


def _measure(run_dir: Path) -> dict[str, Any]:
    config = _config(run_dir)
    checkpoint = latest(run_dir)
    if checkpoint is None:
        raise UserError(f"{run_dir} has no complete checkpoint; a run writes one at its end")
    names = {
        f"model.layers.{layer}.{name}": name.removesuffix(".weight").rsplit(".", 1)[-1]
        for layer in range(config.model.num_layers)
        for name, shape in block_matrices(config.model, layer).items()
        if len(shape) == 2 and not is_router(name)
    }
    stored: dict[str, Any] = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    vocab_size = stored["model.model.embed_tokens.weight"].size[0]
    initial = build_model(config.model, vocab_size, config.seed).state_dict()
    weights = {f"model.{name}": torch.empty_like(initial[name]) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.load(weights, checkpoint_id=checkpoint, no_dist=True)

    by_kind: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, kind in names.items():
        weight = weights[f"model.{name}"]
        values = {"": torch.linalg.svdvals(weight), "update_": torch.linalg.svdvals(weight - initial[name])}
        by_kind[kind].append(
            {f"{prefix}effective_rank": effective_rank(s) for prefix, s in values.items()}
            | {f"{prefix}stable_rank": stable_rank(s) for prefix, s in values.items()}
        )
    means = {
        kind: {key: sum(layer[key] for layer in layers) / len(layers) for key in MEASURES}
        for kind, layers in by_kind.items()
    }
    return {
        "run_dir": str(run_dir),
        "optimizer": config.optim.kind,
        "seed": config.seed,
        "step": int(checkpoint.name.removeprefix("step_")),
        "kinds": means,
    }


def _config(run_dir: Path) -> TrainConfig:
    try:
        raw = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{run_dir} is no run directory: {error.strerror}: config.toml") from error
    return validate(TrainConfig, raw, str(run_dir / "config.toml"))


def _verdict(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare the means over the runs of each optimizer, matrix kind by matrix kind."""
    groups = {kind: [r["kinds"] for r in runs if r["optimizer"] == kind] for kind in ("muon", "adamw")}
    if not groups["muon"] or not groups["adamw"]:
        return {"text": "No verdict: this needs at least one run of Muon and one of AdamW.", "reproduced": None}

    def mean(optimizer: str, kind: str, key: str) -> float:
        members = groups[optimizer]
        return sum(kinds[kind][key] for kinds in members) / len(members)

    kinds = list(runs[0]["kinds"])
    higher = [k for k in kinds if mean("muon", k, "effective_rank") > mean("adamw", k, "effective_rank")]
    examples = ", ".join(
        f"{k} {mean('adamw', k, 'effective_rank'):.2f} -> {mean('muon', k, 'effective_rank'):.2f}"
        for k in ("o_proj", "down_proj")
        if k in kinds
    )
    lead = "Muon's matrices have the higher effective rank in" if higher else "Muon's effective rank is not higher in"
    amount = "all" if len(higher) == len(kinds) else f"{len(higher)} of" if higher else "any of"
    return {
        "text": f"{lead} {amount} {len(kinds)} kinds of hidden matrices (AdamW -> Muon: {examples}).",
        "reproduced": len(higher) == len(kinds),
    }
