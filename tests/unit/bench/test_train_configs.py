"""The named train configs: their sizes are those of their names, and what their first lines say of GPUs can be run."""

import re
from pathlib import Path

import pytest

from muonlm.config.load import load_train
from muonlm.config.ranks import micro_batch_size, rank_grid
from muonlm.model.flops import count_parameters

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "train"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml") if re.match(r"(gpt|moe)-\d+[mbt]", path.stem))
BASES = [name for name in NAMES if not name.endswith("-adamw")]
STDLIB_VOCAB = 1024
UNITS = {"m": 1e6, "b": 1e9, "t": 1e12}


def first_lines(name: str) -> str:
    """The comment that a config begins with, as one line."""
    text = (FOLDER / f"{name}.toml").read_text()
    return " ".join(line.lstrip("# ") for line in text.split("\nname")[0].splitlines())


def test_every_config_of_a_size_has_an_arm_for_each_optimizer():
    assert set(NAMES) == {*BASES, *(f"{name}-adamw" for name in BASES)}
    assert {"gpt-10m", "gpt-124m", "gpt-350m", "gpt-1b", "gpt-7b", "gpt-70b", "moe-16b-a3b", "moe-1t"} == set(BASES)


@pytest.mark.parametrize("name", BASES)
def test_sizes_are_those_of_the_name(name: str):
    config = load_train(name)
    counts = count_parameters(config.model, config.model.vocab_size or STDLIB_VOCAB)
    [(number, unit)] = re.findall(r"^\w+-(\d+)([mbt])", name)
    assert counts["total"] == pytest.approx(int(number) * UNITS[unit], rel=0.08)
    if active := re.search(r"-a(\d+)b", name):
        assert counts["active"] == pytest.approx(int(active[1]) * 1e9, rel=0.08)
    said = re.match(r"([\d.]+) ([MBT]) parameters", first_lines(name))
    if said:
        assert counts["total"] == pytest.approx(float(said[1]) * UNITS[said[2].lower()], rel=0.02)
    if said := re.search(r"([\d.]+) B of them met by a token", first_lines(name)):
        assert counts["active"] == pytest.approx(float(said[1]) * 1e9, rel=0.02)


@pytest.mark.parametrize("name", [name for name in BASES if name not in ("gpt-10m", "gpt-124m")])
def test_the_batch_divides_on_the_gpus_that_it_is_meant_for(name: str):
    config = load_train(name)
    num_gpus = int(re.findall(r"for (\d+) GPUs", first_lines(name))[0])
    grid = rank_grid(config, num_gpus)
    assert config.loop.batch_size % (grid.data * micro_batch_size(config, grid.data)) == 0
    assert config.num_steps > 2 * config.schedule.warmup_steps


@pytest.mark.parametrize("name", BASES)
def test_arms_share_all_but_the_optimizer(name: str):
    muon, adamw = load_train(name), load_train(f"{name}-adamw")
    assert (muon.optim.kind, adamw.optim.kind) == ("muon", "adamw")
    assert adamw.model_dump(exclude={"name", "optim"}) == muon.model_dump(exclude={"name", "optim"})
    assert adamw.optim.aux == muon.optim.aux
    assert adamw.optim.weight_decay == muon.optim.weight_decay
