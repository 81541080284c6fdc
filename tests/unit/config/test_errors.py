"""The full texts of what users read when a config is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

from muonlm.config.compare import CompareConfig
from muonlm.config.data import PrepareConfig
from muonlm.config.errors import ConfigError
from muonlm.config.load import load_compare, load_train, validate
from muonlm.config.schema import Section, TrainConfig

VALID = 'name = "x"\n[data]\npath = "d"\n[schedule]\nwarmup_steps = 0\n[loop]\nsteps = 10\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that paths in messages are short and fixed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_error(*overrides: str, **files: str) -> str:
    for name, text in files.items():
        Path(f"{name}.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_train(f"{list(files)[-1]}.toml", overrides)
    return str(caught.value)


def error_of(model: type[Section], raw: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(model, raw, "here")
    return str(caught.value)


def golden(text: str) -> str:
    return dedent(text).strip("\n")


def test_a_key_is_known_by_what_its_text_says(folder: Path) -> None:
    """`lr` by "learning rate"; a word that several texts have suggests none of them."""
    said = train_error("optim.learning_rate=0.1", "optim.aux.learning_rate=0.1", "optim.hidden_matrices=1", base=VALID)
    assert re.findall(r"did you mean (\S+)\?", said) == ["optim.aux.lr", "optim.lr"]
    assert said.count("unknown key; [optim] has kind, lr,") == 1


def test_all_problems_of_all_layers_in_one_message(folder: Path) -> None:
    base = VALID + '[optim]\nkind = "adamw"\nmomentum = 0.9\nbetas = [\n  0.9,\n  0.95,\n]\n[eval]\ntokens = true\n'
    bad = """
        extends = ["base"]
        name = "a b"
        batch_size = 3
        dataset = "stdlib"

        [data]
        seq_len = 1.5
        pth = "x"
        path = 3

        [schedule]
        kind = "cosin"
        final_ratio = 2
        [loop]
        steps = 1e6
        [model]
        rope_theta = inf
    """
    assert train_error("track=5", "loop.batch_size='8'", "optim.wd=3", base=base, bad=dedent(bad)) == golden("""
        bad.toml: 16 problems
          bad.toml:3: name = "a b"
              must be text of letters, digits, '.', '_' and '-' that starts with none of '.' and '-'
          bad.toml:4: batch_size = 3
              unknown key; did you mean loop.batch_size?
          bad.toml:5: dataset = "stdlib"
              unknown key; did you mean data?
          bad.toml:8: data.seq_len = 1.5
              must be a whole number, at least 2 [tokens]
          bad.toml:9: data.pth = "x"
              unknown key; did you mean data.path?
          bad.toml:10: data.path = 3
              must be text; write "3"
          bad.toml:13: schedule.kind = "cosin"
              must be "wsd", "cosine" or "linear"; did you mean "cosine"?
          bad.toml:14: schedule.final_ratio = 2
              must be a number, at least 0 and at most 1
          bad.toml:16: loop.steps = 1000000.0
              must be a whole number, at least 1 [optimizer steps]; write 1000000
          bad.toml:18: model.rope_theta = inf
              must be a number, above 0; inf and nan are not allowed
          base.toml:10: optim.momentum = 0.9
              belongs to optim.kind = "muon"; here it is "adamw"
          base.toml:11: optim.betas = [0.9, 0.95]
              unknown key; did you mean optim.beta2?
          base.toml:16: eval.tokens = true
              must be a whole number, at least 1 [tokens]
          command line: optim.wd = 3
              unknown key; [optim] has kind, lr, beta1, beta2, eps, weight_decay, non_finite, aux, overrides
          command line: loop.batch_size = "8"
              must be a whole number, at least 1 and at most 10000000 [sequences]; write 8 without quotes
          command line: track = 5
              must be a table: write [track] and its keys below
    """)


def test_rule_over_several_keys_names_the_place_of_each(folder: Path) -> None:
    text = VALID + "[model]\nhidden_size = 64\n"
    assert train_error("model.num_heads=5", mine=text) == golden("""
        mine.toml: 1 problem
          mine.toml:9: model.hidden_size = 64
          command line: model.num_heads = 5
              hidden_size 64 is not divisible by num_heads 5; change one of them or set head_dim
    """)


def test_missing_keys_and_unknown_kind(folder: Path) -> None:
    text = '[data]\nseq_len = 8\n[loop]\nbatch_size = 2\n[optim]\nkind = "moun"\nmomentum = "0.9"\n'
    assert train_error("name=", mine=text) == golden("""
        mine.toml: 4 problems
          mine.toml:1: data.path is missing
              give it: text. Directory with prepared token shards.
          mine.toml:3: [loop]
              give exactly one of loop.tokens and loop.steps
          mine.toml:6: optim.kind = "moun"
              must be "muon" or "adamw"; did you mean "muon"?
          command line: name is missing
              give it: text of letters, digits, '.', '_' and '-' that starts with none of '.' and '-'. Name
              of the run.
    """)


def test_tables_without_kind_have_the_default_one(folder: Path) -> None:
    assert train_error(mine=VALID + "[optim]\nbeta1 = 0.9\n") == golden("""
        mine.toml: 1 problem
          mine.toml:9: optim.beta1 = 0.9
              belongs to optim.kind = "adamw"; here it is "muon"
    """)


def test_data_config() -> None:
    assert error_of(PrepareConfig, {"source": {"name": "x", "split": 3}, "output": "o"}) == golden("""
        here: 1 problem
          here: source.kind is missing
              give it: "text", "jsonl", "parquet", "dataset", "python-stdlib" or "sotu"
    """)
    assert error_of(PrepareConfig, {"source": {"kind": "text", "files": [], "name": "x"}}) == golden("""
        here: 3 problems
          here: source.files = []
              must be a list of texts, not empty
          here: source.name = "x"
              belongs to source.kind = "dataset"; here it is "text"
          here: output is missing
              give it: text. Directory to write; `data.path` of a train config.
    """)
    assert "source = 3\n      must be a table: write [source] and its keys below" in error_of(
        PrepareConfig, {"source": 3, "output": "o"}
    )


def test_entries_of_lists(folder: Path) -> None:
    arms = [{"name": "a", "lr": [1], "aux_lr": ["q"], "z": 3}, 4]
    raw = {"name": "x", "arms": arms, "reference": "a", "base": "b", "seeds": 3, "budgets_tokens": ["1"]}
    assert error_of(CompareConfig, raw) == golden("""
        here: 5 problems
          here: arms[0].aux_lr[0] = "q"
              must be a number
          here: arms[0].z = 3
              unknown key; arms[0] has name, set, lr, aux_lr, budgets_tokens
          here: arms[1] = 4
              must be a table: write [[arms]] and its keys below
          here: budgets_tokens[0] = "1"
              must be a whole number [tokens]; write 1 without quotes
          here: seeds = 3
              must be a list of whole numbers, not empty; write [3]
    """)


def test_arms_of_a_comparison_are_checked_where_they_are_written(folder: Path) -> None:
    Path("base.toml").write_text(VALID)
    text = """
        name = "c"
        base = "base.toml"
        reference = "adamw"
        budgets_tokens = [10_000]
        seeds = [0]
        [[arms]]
        name = "adamw"
        lr = [0.001]
        aux_lr = [0.001]
        set = {"optim.kind" = "adamw"}
        [[arms]]
        name = "muon"
        lr = [-0.001]
        aux_lr = [0.001]
        [arms.set]
        optim.beta1 = 0.9
        "optim.kind" = "muon"
    """
    Path("c.toml").write_text(dedent(text))
    with pytest.raises(ConfigError) as caught:
        load_compare("c.toml")
    assert str(caught.value) == golden("""
        c.toml, arm 'muon': 2 problems
          c.toml:14: optim.lr = -0.001
              must be a number, above 0
          c.toml:17: optim.beta1 = 0.9
              belongs to optim.kind = "adamw"; here it is "muon"
    """)
    with pytest.raises(ConfigError) as caught:
        load_compare("c.toml", ["base=bsae.toml"])
    assert str(caught.value).startswith('command line: base = "bsae.toml"\nbsae.toml: no such file\n')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[optim]\nkind = muon\n",
            'mine.toml:2: not valid TOML: a value is a number, true or false, "text" in quotes, a [list] or a {table}\n'
            "    kind = muon\n           ^",
        ),
        ("[a]\n[a]\n", "mine.toml:2: not valid TOML: the table [a] is opened twice\n    [a]\n      ^"),
        ("a = 1\na = 2\n", "mine.toml:2: not valid TOML: this key is given twice\n    a = 2\n         ^"),
        ("name x", "mine.toml:1: not valid TOML: a line is `key = value` or `[table]`\n    name x\n         ^"),
        (
            "x = [1,\n  2",
            "mine.toml:2: not valid TOML: the file ends inside a value: a list, table or string is not closed\n"
            "      2\n       ^",
        ),
    ],
)
def test_toml_syntax(folder: Path, text: str, message: str) -> None:
    assert train_error(mine=text) == message


def test_files_that_cannot_be_read(folder: Path) -> None:
    Path("latin.toml").write_bytes(b'name = "\xe9"\n')
    with pytest.raises(ConfigError, match=r"latin.toml: not UTF-8 text \(byte 8\)"):
        load_train("latin.toml")


def test_overrides_that_are_none(folder: Path) -> None:
    assert train_error("fresh", "optim.lr=[1", "=3", "a..b=1", mine=VALID) == golden("""
        command line: fresh
              an override is key=value, as in loop.steps=100
          command line: optim.lr=[1
              not a TOML value: Unclosed array (at end of document)
          command line: =3
              an override is key=value, as in loop.steps=100
          command line: a..b=1
              an override is key=value, as in loop.steps=100
    """)
    assert "optim.lr: optim is given both a value and keys below it" in train_error("optim=3", "optim.lr=1", mine=VALID)


def test_unknown_names(folder: Path) -> None:
    Path("mine.toml").write_text(VALID)
    with pytest.raises(ConfigError) as caught:
        load_train("smoek")
    lines = str(caught.value).splitlines()
    assert lines[:2] == ['no train config is called "smoek"', "  did you mean smoke?"]
    assert lines[2].startswith("  train configs that come with muonlm: ")
    assert "smoke" in lines[2]
    assert lines[3:] == ["  or give the path of a TOML file"]


def test_extends_that_cannot_be_followed(folder: Path) -> None:
    assert train_error(mine='\nextends = ["smoek"]').startswith(
        'mine.toml:2: extends = ["smoek"]\nno train config is called "smoek"\n  did you mean smoke?'
    )
    assert train_error(mine='extends = "base"') == (
        'mine.toml:1: extends = "base"\n      must be a list: extends = ["base"]'
    )
    circle = train_error(a='extends = ["b.toml"]', b='extends = ["a.toml"]')
    assert circle == "b.toml: extends itself: b.toml -> a.toml -> b.toml"


def test_no_jargon_of_the_validation_library() -> None:
    raw = {"name": 3, "seed": -1, "data": [], "model": {"init_std": "x"}, "optim": [], "loop": {"steps": []}}
    text = error_of(TrainConfig, raw)
    for word in ("Input should", "valid", "dictionary", "instance", "discriminator", "tag", "extra", "Value error"):
        assert word not in text


def test_overrides_of_the_optimizer(folder: Path) -> None:
    bad = VALID + dedent("""
        [[optim.overrides]]
        lr = 0.1
        [[optim.overrides]]
        names = "*.q_proj.weight"
        rule = "sgd"
        [[optim.overrides]]
        roles = ["hiden"]
        lr = -1
        weight_deacy = 0.1
        [[optim.overrides]]
        modules = ["Linear"]
        [[optim.overrides]]
        modules = ["Linear"]
        rule = "adamw"
        scaling = "jordan"
        [[optim.overrides]]
        modules = ["Linear"]
        [optim.overrides.split]
        sizes = [0]
    """)
    assert train_error(mine=bad) == golden("""
        mine.toml: 9 problems
          mine.toml:9: [optim.overrides[0]]
              select parameters by at least one of roles, names and modules
          mine.toml:12: optim.overrides[1].names = "*.q_proj.weight"
              must be a list of texts, not empty
          mine.toml:13: optim.overrides[1].rule = "sgd"
              must be "muon" or "adamw"
          mine.toml:15: optim.overrides[2].roles[0] = "hiden"
              must be "hidden", "experts", "convolution", "embedding", "head", "router", "norm" or "bias";
              did you mean "hidden"?
          mine.toml:16: optim.overrides[2].lr = -1
              must be a number, above 0
          mine.toml:17: optim.overrides[2].weight_deacy = 0.1
              unknown key; did you mean optim.overrides[2].weight_decay?
          mine.toml:18: [optim.overrides[3]]
              nothing is changed: give at least one of group, rule, lr, weight_decay, scaling, split
          mine.toml:23: optim.overrides[4].scaling = "jordan"
          mine.toml:22: optim.overrides[4].rule = "adamw"
              scaling and split say nothing about parameters with rule = "adamw"
          mine.toml:27: optim.overrides[5].split.sizes = [0]
              every number in sizes must be at least 1
    """)


def test_muon_in_an_override_needs_its_kind(folder: Path) -> None:
    bad = VALID + '[optim]\nkind = "adamw"\n[[optim.overrides]]\nroles = ["head"]\nrule = "muon"\n'
    assert train_error(mine=bad) == golden("""
        mine.toml: 1 problem
          mine.toml:10: optim.overrides = [{roles = ["head"], rule = "muon"}]
          mine.toml:9: optim.kind = "adamw"
              optim.overrides with rule = "muon" need optim.kind = "muon"
    """)
