"""The sections that a comparison and a single run share: settings, environment, data, how to reproduce."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

import muonlm
from muonlm.config.errors import UserError
from muonlm.report.page import Block, Cell, Table, cells


def toml_block(title: str, config: Mapping[str, Any]) -> Block:
    """A configuration as TOML, folded."""
    return Block(title, tomli_w.dumps(_without_none(config)), folded=True)


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def environment_table(environment: Mapping[str, Any], data_path: str | None) -> Table:
    """Versions, device and fingerprint of the data."""
    facts = {"muonlm": muonlm.__version__, **environment}
    if data_path:
        facts |= data_facts(data_path)
    rows = [cells(str(key).replace("_", " "), Cell(_shown(value), "")) for key, value in facts.items()]
    return Table("Environment and data", ("", ""), rows, folded=True)


def data_facts(path: str) -> dict[str, Any]:
    """Where the tokens came from; only the path when the data is not on this machine."""
    from muonlm.data.dataset import describe

    try:
        found = describe(path)
    except UserError:
        return {"data": f"{path} (not on this machine)"}
    train = found["splits"]["train"]
    return {
        "data": path,
        "data source": found["source"],
        "vocabulary": f"{found['vocab_size']:,} token ids",
        "tokenizer fingerprint": found["tokenizer_fingerprint"],
        "training split": f"{train['tokens']:,} tokens, {train['bytes_per_token']:.2f} bytes per token",
    }


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return "-" if value is None else str(value)


def reproduce_block(verb: str, directory: Path) -> Block:
    """The command that repeats this, or goes on with it."""
    command = f"muonlm {verb} {shlex.quote(str(directory / 'config.toml'))}"
    return Block("This command repeats it elsewhere, and goes on with it here where something is missing:", command)


def arm_differences(arms: Sequence[Mapping[str, Any]]) -> Table:
    """Settings in which the arms differ; everything else is the same for all of them."""
    from muonlm.compare.trials import flatten

    flat = {arm["name"]: flatten(arm["config"]) | _best_rates(arm) for arm in arms}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    differing = [
        key
        for key in keys
        if key not in ("name", "run_dir") and len({str(settings.get(key)) for settings in flat.values()}) > 1
    ]
    rows = [cells(key, *(_shown(settings.get(key)) for settings in flat.values())) for key in differing]
    return Table("All that differs between the arms", ("setting", *flat), rows)


def _best_rates(arm: Mapping[str, Any]) -> dict[str, Any]:
    best = arm["best"]
    return {"optim.lr": best["lr"], "optim.aux.lr": best["aux_lr"]} if best else {}
