"""Loading: layers, overrides, kinds, alternatives, names, and back to TOML."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonlm.config.errors import ConfigError
from muonlm.config.layers import key_lines
from muonlm.config.load import (
    apply_overrides,
    available,
    dump_toml,
    find,
    load_compare,
    load_prepare,
    load_train,
    load_train_dict,
    validate,
)
from muonlm.config.schema import AdamWConfig, AuxConfig, MuonConfig, NewtonSchulzConfig, TrainConfig

LOADERS = {"train": load_train, "compare": load_compare, "data": load_prepare}
SHIPPED = [(kind, name) for kind in LOADERS for name in available(kind)]


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_shipped_configs_load_and_round_trip(kind: str, name: str, folder: Path) -> None:
    config = LOADERS[kind](name)
    write(folder, copy=dump_toml(config))
    assert LOADERS[kind]("copy.toml") == config


def test_dump_round_trips_values_far_from_the_defaults(folder: Path) -> None:
    overrides = [
        *('name="a.b-c"', "optim.kind=adamw", "optim.lr=1e-12", "optim.eps=1e300", "model.num_kv_heads=2"),
        *("loop.tokens=9_007_199_254_740_993", "track.peak_flops=1", 'data.path="a\\"b\\\\c\\né"', "run_dir=x y"),
    ]
    config = load_train("smoke", overrides)
    write(folder, copy=dump_toml(config))
    assert load_train("copy.toml") == config
    assert config.data.path == 'a"b\\c\né'
    assert "steps =" not in dump_toml(config).split("[loop]")[1].split("[")[0]


def test_extends_merges_tables_the_later_over_the_earlier_and_the_file_over_all(folder: Path) -> None:
    write(folder, **{"sub/one": 'name = "one"\nseed = 1\n[data]\npath = "one"\nseq_len = 8\n[loop]\nsteps = 99\n'})
    write(folder, **{"sub/two": 'extends = ["three.toml"]\nseed = 2\n[data]\nseq_len = 16\n'})
    write(folder, **{"sub/three": "seed = 3\n[data]\nseq_len = 32\nverify = 'never'\n"})
    write(folder, mine='extends = ["sub/one.toml", "sub/two"]\nname = "mine"\n')
    config = load_train("mine.toml")
    assert (config.name, config.seed, config.loop.steps) == ("mine", 2, 99)
    assert (config.data.path, config.data.seq_len, config.data.verify) == ("one", 16, "never")


def test_extends_takes_names_that_come_with_the_package(folder: Path) -> None:
    write(folder, mine='extends = ["smoke"]\nname = "mine"\n')
    assert load_train("mine") == load_train("smoke", ["name=mine"])


def test_overrides_are_toml_values_and_bare_words(folder: Path) -> None:
    config = load_train(
        "smoke",
        [
            *("optim.kind=adamw", "optim.lr = 1e-2", "model.tie_embeddings=true", "loop.batch_size=1_000"),
            *("optim.aux={lr = 0.5, beta1 = 0.1}", "data.path=some/dir", 'track.wandb="offline"'),
            *("name=2026-01-31", "track.wandb_project=124", "seed=1", "seed=2"),
        ],
    )
    assert config.optim == AdamWConfig(lr=1e-2, aux=AuxConfig(lr=0.5, beta1=0.1))
    assert (config.model.tie_embeddings, config.loop.batch_size) == (True, 1000)
    assert (config.data.path, config.track.wandb) == ("some/dir", "offline")
    with pytest.raises(ConfigError, match=r'seed = "1\\nname = 2"'):
        load_train("smoke", ["seed=1\nname = 2"])
    # Dates and numbers stay text where text is wanted.
    assert (config.name, config.track.wandb_project, config.seed) == ("2026-01-31", "124", 2)


def test_new_kind_drops_what_it_lacks_from_layers_below(folder: Path) -> None:
    write(folder, base='extends = ["smoke"]\n[optim]\nlr = 0.5\nmomentum = 0.8\n[optim.newton_schulz]\nsteps = 3\n')
    assert load_train("base").optim == MuonConfig(lr=0.5, momentum=0.8, newton_schulz=NewtonSchulzConfig(steps=3))
    assert load_train("base", ["optim.kind=adamw", "optim.beta1=0.7"]).optim == AdamWConfig(lr=0.5, beta1=0.7)
    write(folder, upper='extends = ["base"]\n[optim]\nkind = "adamw"\n')
    assert load_train("upper").optim == AdamWConfig(lr=0.5)
    with pytest.raises(ConfigError, match=r'optim.momentum = 0.9\n +belongs to optim.kind = "muon"'):
        load_train("base", ["optim.momentum=0.9", "optim.kind=adamw"])
    # The kind that the table has by default drops nothing: neither what is right nor what is wrong.
    assert load_train("base", ["optim.kind=muon"]).optim == load_train("base").optim
    write(folder, wrong='extends = ["smoke"]\n[optim]\nbeta1 = 0.5\n')
    with pytest.raises(ConfigError, match=r"wrong.toml:3: optim.beta1 = 0.5"):
        load_train("wrong", ["optim.kind=muon"])


def test_one_alternative_drops_the_other_from_layers_below(folder: Path) -> None:
    write(folder, base='extends = ["smoke"]\n[loop]\nsteps = 5\n')
    loop = load_train("base", ["loop.tokens=100000"]).loop
    assert (loop.tokens, loop.steps) == (100_000, None)
    write(folder, base='extends = ["smoke"]\n[loop]\nsteps = 5\ntokens = 100000\n')
    with pytest.raises(ConfigError, match=r"base.toml:3: loop.steps = 5\n"):
        load_train("base")
    with pytest.raises(ConfigError, match="give exactly one"):
        load_train("smoke", ["loop.tokens=100000", "loop.steps=5"])


def test_apply_overrides_leaves_its_input_and_unsets_with_none() -> None:
    raw = load_train_dict("smoke", ["optim.kind=muon", "optim.nesterov=false"])
    before = repr(raw)
    changed = apply_overrides(raw, {"optim.kind": "adamw", "loop.steps": None, "loop": {"tokens": 50_000}})
    assert repr(raw) == before
    config = validate(TrainConfig, changed, "changed")
    assert config.optim == AdamWConfig()
    assert (config.loop.tokens, config.loop.steps) == (50_000, None)
    assert apply_overrides({"loop": {"steps": 3}}, {"loop.tokens": 8}) == {"loop": {"tokens": 8}}
    assert apply_overrides({}, {"optim": {"kind": "adamw"}, "optim.lr": 1.0}) == {"optim": {"kind": "adamw", "lr": 1.0}}


def test_arms_stand_above_the_settings_of_all_arms_above_the_base(folder: Path) -> None:
    write(folder, base='extends = ["smoke"]\n[loop]\nbatch_size = 0\n[optim]\nnesterov = 3\n')
    arm = '[[arms]]\nname = "{0}"\nlr = [0.1]\naux_lr = [0.1]\nset = {{{1}, schedule.final_ratio = 0.5}}\n'
    arms = arm.format("adamw", 'optim.kind = "adamw"') + arm.format("muon", "optim.nesterov = true")
    head = 'name = "c"\nbase = "base"\nreference = "adamw"\nbudgets_tokens = [20480]\nseeds = [0]\n'
    write(folder, c=f"{head}{arms}[set]\nloop.batch_size = 4\nschedule.final_ratio = 9\n")
    assert [a.name for a in load_compare("c").arms] == ["adamw", "muon"]


def test_path_wins_over_name_and_folders_are_no_configs(folder: Path) -> None:
    (folder / "smoke").mkdir()
    assert find("train", "smoke") == available("train")["smoke"]
    write(folder, smoke='extends = ["../elsewhere.toml"]\n')
    assert find("train", "smoke.toml").resolve() == folder / "smoke.toml"
    write(folder, own="seed = 1\n")
    assert find("train", "own").resolve() == folder / "own.toml"
    with pytest.raises(ConfigError, match=r"smoke.toml: no such file"):
        find("train", "smoke/smoke.toml")


def test_key_lines() -> None:
    text = (
        "# comment\n\ntop = 1\na.'b.c' = 2\n[t]\nlong = [\n  1, # ]\n  '''x\n[no.table]\nno = 1''',\n]\n\n"
        "after = {x = 1, y = {z = 2}}\n[[arms]]\nname = 'p'\n[arms.set]\nk = 1\n"
        "[[arms]]\nname = 'q'\n[[arms.sub]]\nv = 1\n"
    )
    lines = key_lines(text)
    assert lines["top",] == 3
    assert lines["a", "b.c"] == 4
    assert (lines["t",], lines["t", "long"], lines["t", "after"], lines["t", "after", "y", "z"]) == (5, 6, 13, 13)
    assert (lines["arms",], lines["arms", 0], lines["arms", 0, "name"]) == (14, 14, 15)
    assert lines["arms", 0, "set", "k"] == 17
    assert (lines["arms", 1], lines["arms", 1, "name"], lines["arms", 1, "sub", 0, "v"]) == (18, 19, 21)
    assert ("no", "table") not in lines


@given(st.lists(st.sampled_from(["k = 1", "", "# x", "s = '''\na = 1\n'''", "[t]", "l = [\n1,\n]"]), max_size=6))
def test_key_lines_of_any_layout(parts: list[str]) -> None:
    lines = [*parts, "[last]", "key = 1"]
    text = "\n".join(lines)
    assert key_lines(text)["last", "key"] == text.count("\n") + 1
