"""`muonlm bench train`: the peers train the same model on the same sequences, and the result says what was measured."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muonlm.bench import train as bench
from muonlm.bench.peers_transformers import Samples, missing_packages
from muonlm.bench.plain import PlainGPT
from muonlm.config.errors import UserError
from muonlm.config.model import GPTConfig
from muonlm.data.dataset import open_split
from muonlm.data.loader import BatchOrder, batch
from muonlm.model.build import build_model
from muonlm.train.records import Meter

TINY = GPTConfig(num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2)

_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
_OUTER = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_FEED_FORWARD = {
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}


@pytest.fixture
def tiny_config(tmp_path: Path, stdlib_data: Path) -> str:
    """A train config of seconds."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        f'name = "tiny"\n[data]\npath = "{stdlib_data}"\nseq_len = 32\n'
        "[model]\nnum_layers = 1\nhidden_size = 32\nintermediate_size = 48\nnum_heads = 2\n"
        "[loop]\nsteps = 20\nbatch_size = 4\n"
    )
    return str(path)


def test_the_loop_of_stock_operators_has_the_same_model():
    """Its loss with our weights is ours, so that neither side does less."""
    ours, stock = build_model(TINY, 50, 0), PlainGPT(TINY, 50, seq_len=16)
    params = dict(ours.named_parameters())
    assert len(params) == len(list(stock.parameters()))
    with torch.no_grad():
        for name, param in stock.named_parameters():
            first, *rest = name.split(".")
            if first == "blocks":
                layer, part = rest[0], rest[1]
                where = f"self_attn.{_ATTENTION[part]}" if part in _ATTENTION else _FEED_FORWARD[part]
                param.copy_(params[f"model.layers.{layer}.{where}.weight"])
            else:
                param.copy_(params[_OUTER[first]])
    ids = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stock(ids[:, :-1], ids[:, 1:]), ours(ids[:, :-1], ids[:, 1:]))


def test_the_trainer_gets_the_sequences_of_the_run(stdlib_data: Path):
    data = open_split(str(stdlib_data), "train", 32, "never")
    order = BatchOrder(data.num_sequences, 3)
    samples = Samples(data, order, 8)
    assert len(samples) == 8
    ids = torch.stack([samples[index]["input_ids"] for index in range(8)])
    assert torch.equal(ids, batch(data, order, 0, 8)[0])


def slowed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """The function, after a wait."""

    def wrapper(*args: Any) -> Any:
        time.sleep(seconds)
        return function(*args)

    return wrapper


def test_loading_and_recording_are_shares_of_the_time(tiny_config: str, monkeypatch: pytest.MonkeyPatch):
    """A loader and a recorder that are made slow show up where they belong, each near its share."""
    load, steps = bench.train_step.batch, 20
    monkeypatch.setattr(bench.train_step, "batch", slowed(load, 0.05))
    slow_loader = bench._ours("adamw")(tiny_config, steps, 1, "float32")
    assert slow_loader.loading > 0.5 > slow_loader.recording
    monkeypatch.setattr(bench.train_step, "batch", load)
    record = Meter.train_record
    monkeypatch.setattr(Meter, "train_record", slowed(record, 0.5))
    slow_recorder = bench._ours("adamw")(tiny_config, steps, 1, "float32")
    assert slow_recorder.recording > 0.5 > slow_recorder.loading


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_packages()), reason="needs transformers and accelerate")
def test_all_contenders_train_and_are_compared(tiny_config: str):
    result = bench.bench_train(tiny_config, steps=20, rounds=1, threads=1, precision="float32")
    assert set(result["rounds"]) == {bench.OURS, bench.TRAINER, bench.SAME_MODEL, bench.STOCK, bench.OURS_MUON}
    assert all(speed > 0 for speeds in result["rounds"].values() for speed in speeds)
    ours, trainer = result["tokens_per_s"][bench.OURS], result["tokens_per_s"][bench.TRAINER]
    assert result["ratios"][f"{bench.OURS} / {bench.TRAINER}"] == pytest.approx(ours / trainer)
    assert result["precision"] == "float32"
    bench.show(result)


def test_too_few_steps_are_refused():
    with pytest.raises(UserError, match="at least 20"):
        bench.main(["demo", "--steps", "10"])
