"""A model starts from an exported one with the same numbers, however it is spread; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from muonlm.bridge.pretrained import load_pretrained
from muonlm.bridge.tokenizer import check_same_tokenizer
from muonlm.cli.main import main
from muonlm.config.errors import UserError
from muonlm.config.load import load_train
from muonlm.config.schema import TrainConfig
from muonlm.dist import process
from muonlm.model.build import build_model
from muonlm.model.gpt import GPT
from muonlm.train.setup import build

Export = Callable[..., tuple[GPT, Path]]
DENSE = {"kind": "gpt", "num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
# Shapes that three ranks cannot cut evenly.
EXPERTS = {
    **DENSE, "kind": "moe", "num_layers": 2, "num_experts": 4, "expert_size": 20, "num_shared_experts": 2,
    "num_kv_heads": 2, "head_dim": 10,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "fsdp 3": (3, {"zero": 3}),
    "zero-2 2": (2, {"zero": 2}),
    "tp x fsdp 2x2": (4, {"zero": 3, "tensor_parallel": 2}),
    "ep x fsdp 2x2": (4, {"zero": 3, "expert_parallel": 2}),
}
IDS = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(0))


def test_loss_is_that_of_the_exporting_run(raw_model: dict[str, Any], export: Export) -> None:
    """Through several files, and a model that began elsewhere."""
    model, directory = export(raw_model, "--shard-size", "30kB")
    other = build_model(model.config, model.vocab_size, seed=99)
    with torch.no_grad():
        before, wanted = other(IDS, IDS.roll(-1, 1)), model(IDS, IDS.roll(-1, 1))
        load_pretrained(other, directory)
        assert torch.equal(other(IDS, IDS.roll(-1, 1)), wanted)
    assert (before - wanted).abs() > 0.1
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_weights_that_transformers_saved(export: Export, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, directory = export(EXPERTS)
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "saved")
    other = build_model(model.config, model.vocab_size, seed=99)
    load_pretrained(other, tmp_path / "saved")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_narrow_weights_are_widened(export: Export) -> None:
    model, directory = export(DENSE, "--dtype", "bfloat16")
    other = build_model(model.config, model.vocab_size, seed=99)
    load_pretrained(other, directory)
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter.bfloat16().float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_takes_its_part(
    layout: str, export: Export, make_config: Callable[..., TrainConfig], run_ranks: Callable[..., list[Any]]
) -> None:
    model, directory = export(EXPERTS, "--shard-size", "30kB")
    size, dist = LAYOUTS[layout]
    changes = {"dist": dist, "loop": {"steps": 20, "batch_size": 12, "precision": "float32", "device": "cpu"}}
    config = TrainConfig.model_validate(make_config(EXPERTS).model_dump() | changes)

    def one_rank(rank: int, world_size: int) -> list[str]:
        parts = build(config, process.start(config.dist, "cpu"), {})
        load_pretrained(parts.model, directory)
        state = parts.model.state_dict()
        found = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
        return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, found[name])]

    assert run_ranks(one_rank, size, join=False) == [[]] * size


def test_import_writes_the_config_of_a_run(export: Export, tmp_path: Path, capsys: Any) -> None:
    model, directory = export(EXPERTS)
    file = tmp_path / "continue.toml"
    assert main(["import", str(directory), "--out", str(file)]) == 0
    config = load_train(str(file), ["name=more", "data.path=data/mine", "loop.steps=20"])
    assert config.init_from == str(directory)
    other = build_model(config.model, model.vocab_size, seed=99)
    load_pretrained(other, directory)
    assert torch.equal(other(IDS), model(IDS))
    capsys.readouterr()
    assert main(["import", str(directory), "--out", str(file)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["import", str(directory)]) == 0
    assert capsys.readouterr().out == file.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, r"model.num_layers is 3, there it is 2"),
        ({"tie_embeddings": True}, r"model.tie_embeddings is True"),
        ({"activation": "relu2"}, r"model.activation is 'relu2'"),
        ({"kind": "moe"}, r"model.kind is 'moe', there it is 'gpt'"),
        ({"vocab_size": 900}, r"900 token ids, that of .* 512; set model.vocab_size = 512"),
    ],
)
def test_another_model_is_refused(change: dict[str, Any], message: str, export: Export, make_config: Any) -> None:
    _, directory = export(DENSE)
    config = make_config({**DENSE, **change}).model
    other = build_model(config, config.vocab_size or 512, seed=99)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_pretrained(other, directory)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "integers"])
def test_weights_of_another_model_are_refused(kind: str, export: Export) -> None:
    model, directory = export(DENSE)
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "unknown":
        tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(1)  # quantized weights come with these
    elif kind == "integers":
        tensors[name] = tensors[name].to(torch.int8)
    else:
        tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, directory / "model.safetensors")
    words = {
        "missing": "is missing",
        "unknown": "_scale_inv is not known",
        "shape": r"has shape \[32, 48\]",
        "integers": "is I8",
    }
    with pytest.raises(UserError, match=words[kind]):
        load_pretrained(build_model(model.config, model.vocab_size, seed=99), directory)


def _lie(weights: dict[str, Any]) -> dict[str, Any]:
    """Every tensor said to be in the file that is none's but one's."""
    return dict.fromkeys(weights, sorted(weights.values())[-1])


@pytest.mark.parametrize("damage", [_lie, list, lambda weights: dict.fromkeys(weights, 7), lambda weights: None])
def test_broken_indexes_are_refused(damage: Any, export: Export) -> None:
    model, directory = export(DENSE, "--shard-size", "50kB")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "weight_map": damage(content["weight_map"])}))
    with pytest.raises(UserError, match="download or export the model again"):
        load_pretrained(build_model(model.config, model.vocab_size, seed=99), directory)


def test_broken_files_are_refused(export: Export) -> None:
    model, directory = export(DENSE, "--shard-size", "50kB")
    other = build_model(model.config, model.vocab_size, seed=99)
    file = sorted(directory.glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(UserError, match=f"{file.name} cannot be read"):
        load_pretrained(other, directory)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} cannot be read"):
        load_pretrained(other, directory)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="has neither"):
        load_pretrained(other, directory)


def test_data_of_another_tokenizer_is_refused(export: Export, stdlib_data: Path, tmp_path: Path, caplog: Any) -> None:
    _, directory = export(DENSE)
    check_same_tokenizer(directory, stdlib_data)  # though the export has no post-processor, and the layout is another
    data = tmp_path / "data"
    data.mkdir()
    state = json.loads((stdlib_data / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    one, other = sorted(vocab, key=vocab.get)[20:22]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (data / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="another tokenizer"):
        check_same_tokenizer(directory, data)
    assert "no tokenizer.json" not in caplog.text
    (directory / "tokenizer.json").unlink()
    check_same_tokenizer(directory, data)
    assert "no tokenizer.json" in caplog.text
    shutil.rmtree(data)
