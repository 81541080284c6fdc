"""Whatever is wrong with the input is found before the first step, on all ranks, and leaves no run behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from muonlm.config.errors import UserError
from muonlm.track.metrics import read_metrics
from muonlm.train.loop import train
from muonlm.train.peak_flops import peak_flops

SHORT = {"loop.steps": 8, "checkpoint.interval_steps": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.vocab_size": 300}, "model.vocab_size 300 is less than the 512 token ids"),
        ({"data.seq_len": 10_000_000, "model.max_seq_len": 10_000_000}, "sequence longer than the data"),
        ({"data.path": "/nowhere"}, "/nowhere"),
        ({"loop.batch_size": 7, "loop.micro_batch_size": 2}, "loop.batch_size 7 is not divisible"),
        ({"track.reference": "/nowhere"}, "track.reference: /nowhere is no directory"),
    ],
)
def test_mistakes_are_found_before_training(make_config, changes, message) -> None:
    config = make_config(**SHORT, **changes)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not Path(config.resolved_run_dir, "config.toml").exists()
    train(make_config(**SHORT, **{"eval.interval_steps": 0, "eval.final_tokens": 1}))


def test_all_ranks_refuse_together(make_config, run_ranks) -> None:
    config = make_config(**{"loop.batch_size": 5, "dist.timeout_s": 20.0})

    def one_rank(rank, size):
        with pytest.raises(UserError, match="not divisible by 2 ranks"):
            train(config)
        missing = make_config(**{"track.reference": "/nowhere", "dist.timeout_s": 20.0})
        with pytest.raises(UserError, match=r"track\.reference: /nowhere"):
            train(missing)  # only rank 0 looks for it
        return True

    assert run_ranks(one_rank, 2, join=False) == [True, True]


def test_short_validation_is_used_as_it_is_and_said(make_config, stdlib_data, capfd) -> None:
    config = make_config(**SHORT, **{"eval.tokens": 10, "eval.final_tokens": 10**9})
    train(config)
    told = capfd.readouterr().err
    assert "eval.tokens is 10, less than one sequence" in told
    assert "eval.final_tokens is 1000000000, but the validation split has" in told
    evals = [r for r in read_metrics(config.resolved_run_dir) if r["kind"] == "eval"]
    available = json.loads((stdlib_data / "manifest.json").read_text())["splits"]["validation"]["num_tokens"]
    assert [r["eval_tokens"] for r in evals] == [32, (available - 1) // 32 * 32]


def test_a_vocabulary_may_be_padded(make_config, tmp_path) -> None:
    config = make_config(**SHORT, **{"model.vocab_size": 576})
    assert train(config).state == "finished"
    assert "576x" in (Path(config.resolved_run_dir) / "rules.txt").read_text()


def test_a_reference_on_another_text_is_refused(make_config) -> None:
    reference = make_config("first", **SHORT)
    train(reference)
    file = Path(reference.resolved_run_dir) / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "validation_fingerprint": "of another text"}))
    with pytest.raises(UserError, match="validation text of another text there"):
        train(make_config("second", **SHORT, **{"track.reference": reference.run_dir}))


def test_ratio_to_a_reference_run(make_config) -> None:
    changes = {"loop.steps": 20, "eval.interval_steps": 2, "checkpoint.interval_steps": 0}
    reference = make_config("slow", **changes, **{"optim.lr": 4e-4, "optim.aux": {"lr": 4e-3}})
    train(reference)
    with pytest.raises(UserError, match="tokens of an evaluation 192 there, 96 here"):
        train(make_config("other", **changes, **{"track.reference": reference.run_dir, "eval.tokens": 100}))
    fast = make_config("fast", **changes, **{"track.reference": reference.run_dir})
    train(fast)
    evals = [r for r in read_metrics(fast.resolved_run_dir) if r["kind"] == "eval"]
    on_way = [r["tokens_ratio"] for r in evals if r["tokens_ratio"] is not None]
    assert on_way
    assert all(ratio > 1 for ratio in on_way)
    assert evals[-1]["final"]
    assert evals[-1]["tokens_ratio"] == evals[-2]["tokens_ratio"]
    blind = make_config("blind", **SHORT, **{"eval.interval_steps": 0})
    train(blind)
    third = make_config("third", **SHORT, **{"track.reference": blind.run_dir})
    with pytest.raises(UserError, match="holds no evaluation along the way"):
        train(third)


def test_missing_data_is_prepared_when_a_recipe_is_given(make_config, tmp_path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} and some text of the same kind\n" * 30)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'output = "{tmp_path}/made"\n[source]\nkind = "text"\nfiles = ["{tmp_path}/text/*.txt"]\n'
        "[tokenizer]\nvocab_size = 280\n"
    )
    config = make_config(**SHORT, **{"data.path": str(tmp_path / "made"), "data.prepare": str(recipe)})
    assert train(config).state == "finished"
    assert (tmp_path / "made" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H20", 148), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
        ("AMD Instinct MI300X", 1307), ("NVIDIA GeForce GTX 1080", None), ("NVIDIA B200", 2250),
    ],
)  # fmt: skip
def test_peak_of_known_devices(name, tflops) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


def test_the_loop_imports_nothing_slow() -> None:
    """transformers and datasets cost seconds; tensorboard and wandb are optional."""
    code = "import sys, muonlm.train.loop; print(*(m for m in sys.modules if '.' not in m))"
    root = Path(__file__).parents[3]
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert not {"transformers", "datasets", "tensorboard", "wandb", "matplotlib", "pandas"} & set(loaded.split())
