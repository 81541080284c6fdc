"""lm-evaluation-harness measures on an exported model what our own model computes, with a local task and no network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from muonlm.checkpoint import store
from muonlm.cli.main import main
from muonlm.config.schema import TrainConfig
from muonlm.model.build import build_model
from muonlm.optim.build import build_optimizer
from muonlm.train.loop import train

# Short enough for one window each.
TEXTS = ["import os\n\ndef main():\n    return 1\n", "class Naïve(Exception):\n    pass\n", "x = [1, 2, 3]\n"]
TASK = """
task: heldout
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture
def trained(stdlib_data: Path, tmp_path: Path) -> TrainConfig:
    """A run of a few steps of a model with experts."""
    config = TrainConfig.model_validate(
        {
            "name": "tiny",
            "run_dir": str(tmp_path / "run"),
            "data": {"path": str(stdlib_data), "seq_len": 64},
            "model": {"kind": "moe", "num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
            "schedule": {"warmup_steps": 3},
            "loop": {"steps": 12, "batch_size": 8, "precision": "float32", "device": "cpu"},
            "eval": {"tokens": 256, "final_tokens": 256},
            "track": {"console": False},
        }
    )
    train(config)
    return config


def bits_per_byte(config: TrainConfig, data: Path) -> float:
    """Of TEXTS, each after an end-of-text token, under the model of the run's checkpoint."""
    manifest = json.loads((data / "manifest.json").read_text())
    model = build_model(config.model, manifest["vocab_size"], seed=99)
    path = store.latest(config.resolved_run_dir)
    assert path is not None
    with torch.random.fork_rng():
        store.load(path, store.ModelAndOptimizer(model, build_optimizer(model, config.optim)))
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[manifest["end_of_text_id"], *tokenizer.encode(text).ids]])
        assert ids.size(1) <= 64
        with torch.no_grad():
            nats += float(model.eval()(ids[:, :-1], ids[:, 1:])) * (ids.size(1) - 1)
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)


@pytest.mark.slow
def test_harness_measures_what_the_run_computes(
    trained: TrainConfig, stdlib_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    lm_eval: Any = pytest.importorskip("lm_eval", reason="needs the evaluation extra")
    from lm_eval.tasks import TaskManager

    assert main(["export", str(tmp_path / "run"), "--to", "hf", str(tmp_path / "hf")]) == 0
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "heldout.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tasks / "heldout.yaml").write_text(TASK.format(file=tasks / "heldout.jsonl"))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "hf"), "max_length": 64, "dtype": "float32"},
        tasks=["heldout"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    measured = found["results"]["heldout"]["bits_per_byte,none"]
    assert measured == pytest.approx(bits_per_byte(trained, stdlib_data), rel=1e-5)
