"""Training prepares data that is missing, where the config says how, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from muonlm.config.data import PrepareConfig
from muonlm.config.errors import UserError
from muonlm.config.schema import DataConfig
from muonlm.data import prepare as module


def test_only_what_is_missing_is_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[PrepareConfig, bool]] = []

    def prepare(config: PrepareConfig, *, progress: bool = True) -> None:
        calls.append((config, progress))
        Path(config.output).mkdir(exist_ok=True)
        (Path(config.output) / "manifest.json").write_text("{}")

    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    data = DataConfig(path="data/stdlib", prepare="stdlib")
    module.prepare_if_missing(data)
    ((config, progress),) = calls
    assert (config.output, config.source.kind, progress) == (data.path, "python-stdlib", True)
    module.prepare_if_missing(data)
    assert len(calls) == 1
    # A directory without a manifest is unfinished work, to be gone on with.
    (Path(data.path) / "manifest.json").unlink()
    module.prepare_if_missing(data, progress=False)
    assert calls[1][1] is False
    module.prepare_if_missing(DataConfig(path=str(tmp_path / "none")))
    assert len(calls) == 2


def test_a_mistyped_path_is_not_filled_with_other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"data/mien does not exist, and the data config stdlib .* writes to data/stdlib"
    ):
        module.prepare_if_missing(DataConfig(path="data/mien", prepare="stdlib"))
    assert not Path("data/mien").exists()
