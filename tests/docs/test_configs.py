"""Every file in configs/ loads, and what it describes can be planned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from muonlm.cli.main import main
from muonlm.config.errors import UserError
from muonlm.config.load import load_compare, load_prepare, load_train
from muonlm.data.manifest import read_manifest

CONFIGS = Path(__file__).parents[2] / "configs"


def names(kind: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.toml"))


def test_every_config_belongs_to_a_kind():
    loadable = {f"{kind}/{name}.toml" for kind in ("train", "compare", "data") for name in names(kind)}
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_file()} == loadable


@pytest.mark.parametrize("name", names("train"))
def test_train_configs_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]):
    """On the GPUs that the file is for, it fits into their memory."""
    assert load_train(name).name == name
    text = (CONFIGS / "train" / f"{name.removesuffix('-adamw')}.toml").read_text()
    where = ["--world-size", "1", "--memory-gb", "80"]
    if machines := re.search(r"for (\d+) GPUs(?:, (\d+) nodes of 8 H100)?", text):
        gpus, nodes = int(machines[1]), int(machines[2] or 1)
        where = ["--nodes", str(nodes), "--gpus-per-node", str(gpus // nodes), "--gpu", "h100-80gb"]
    found = main(["plan", name, "--vocab-size", str(load_train(name).model.vocab_size or 1024), *where])
    printed = capsys.readouterr()
    assert found == 0, printed.err + printed.out[printed.out.find("does not fit") :]
    assert "FLOP" in printed.out


@pytest.mark.parametrize("name", names("train"))
def test_data_of_train_configs_can_be_prepared(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the command that a run says which misses them: a data config has their name, and writes them."""
    monkeypatch.chdir(tmp_path)
    path = Path(load_train(name).data.path)
    with pytest.raises(UserError, match=rf"run `muonlm data prepare {path.name} output={path}` first"):
        read_manifest(path)
    assert load_prepare(path.name).output == str(path)


@pytest.mark.parametrize("name", names("compare"))
def test_compare_configs_tune_both_arms_alike(name: str):
    config = load_compare(name)
    assert len({(len(arm.lr), len(arm.aux_lr)) for arm in config.arms}) == 1
    if name == "demo":
        assert all(len(arm.lr) >= 3 and len(arm.aux_lr) >= 3 for arm in config.arms)


@pytest.mark.parametrize("name", names("data"))
def test_data_configs_load(name: str):
    assert load_prepare(name).output == f"data/{name}"
