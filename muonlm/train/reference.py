"""Whether the run that `track.reference` names can be compared with this one."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig
from muonlm.data.dataset import TokenDataset
from muonlm.track.ratio import ReferenceCurve


def check_reference(config: TrainConfig, validation_data: TokenDataset, eval_tokens: int) -> None:
    """Raise UserError when the reference run is missing, has no evaluations, or measured its loss on something else."""
    if config.track.reference is None:
        return
    reference = Path(config.track.reference)
    if reference.resolve() == Path(config.resolved_run_dir).resolve():
        raise UserError(f"track.reference: {reference} is the run directory of this run itself")
    curve = ReferenceCurve.from_run(reference)
    try:
        recorded = json.loads((reference / "environment.json").read_text(encoding="utf-8"))
        seq_len = tomllib.loads((reference / "config.toml").read_text(encoding="utf-8"))["data"].get("seq_len", 128)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"track.reference: {reference} is no complete run directory: {error}") from error
    pairs = {
        "tokenizer": (recorded.get("tokenizer_fingerprint"), validation_data.tokenizer_fingerprint),
        "validation text": (recorded.get("validation_fingerprint"), validation_data.fingerprint),
        "data.seq_len": (seq_len, config.data.seq_len),
        "tokens of an evaluation": (curve.eval_tokens, eval_tokens),
    }
    differing = [f"{what} {theirs} there, {ours} here" for what, (theirs, ours) in pairs.items() if theirs != ours]
    if differing:
        raise UserError(
            f"track.reference: losses of {reference} are not comparable with this run's: {'; '.join(differing)}"
        )
