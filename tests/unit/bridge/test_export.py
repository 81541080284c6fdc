"""What `muonlm export` writes, transformers reads, and computes the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from muonlm.bridge import weights
from muonlm.cli.main import main
from muonlm.config.errors import UserError
from muonlm.model.gpt import GPT

Export = Callable[..., tuple[GPT, Path]]
DENSE = {"kind": "gpt", "num_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
IDS = torch.randint(0, 500, (3, 40), generator=torch.Generator().manual_seed(0))


def auto_model(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def on_disk(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_logits_equal_those_of_transformers(raw_model: dict[str, Any], export: Export) -> None:
    model, directory = export(raw_model)
    model.eval()
    with torch.no_grad():
        ours, theirs = model(IDS), auto_model(directory)(IDS).logits
    assert ours.abs().max() > 1
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(ours.abs().max()))


def test_files_have_the_names_of_the_hub(export: Export) -> None:
    """One matrix an expert: what releases of transformers before 5, and other engines, read."""
    table = {**DENSE, "kind": "moe", "num_experts": 3, "experts_per_token": 1, "expert_size": 20}
    model, directory = export(table, "--dtype", "bfloat16")
    tensors = on_disk(directory)
    assert {name for name in tensors if ".layers.1.mlp." in name} == {
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        *(f"model.layers.1.mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"model.layers.1.mlp.experts.{e}.{part}_proj.weight" for e in range(3) for part in ("gate", "up", "down")),
    }
    stack = model.state_dict()["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(tensors["model.layers.1.mlp.experts.2.down_proj.weight"], stack[2].bfloat16())
    # The correction decides between experts whose scores are close: it stays as it was.
    bias = tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(bias, model.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert auto_model(directory).dtype == torch.bfloat16


def test_shards_hold_everything_once_and_no_more_than_they_may(export: Export) -> None:
    model, directory = export({**DENSE, "kind": "moe"}, "--shard-size", "40kB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 5
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    found = {name: file.name for file in files for name in load_file(file)}
    assert found == index["weight_map"]
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert all(sum(size) <= 40_000 or len(size) == 1 for size in sizes)
    assert sum(map(sum, sizes)) == index["metadata"]["total_size"]
    assert sum(map(sum, sizes)) == sum(tensor.nbytes for tensor in model.state_dict().values())
    auto_model(directory)


def test_tied_head_is_not_written(export: Export) -> None:
    _, directory = export({**DENSE, "tie_embeddings": True})
    assert "lm_head.weight" not in on_disk(directory)


def test_permissions_are_those_of_other_files(export: Export) -> None:
    _, directory = export(DENSE)
    assert (directory / "model.safetensors").stat().st_mode == (directory / "config.json").stat().st_mode


def test_tokenizer_gives_the_ids_of_training(export: Export, stdlib_data: Path) -> None:
    from transformers import AutoTokenizer

    _, directory = export(DENSE)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = Path(weights.__file__).read_text() + " \n\n  naïve 漢字"
    assert tokenizer(text)["input_ids"] == Tokenizer.from_file(str(stdlib_data / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == json.loads((stdlib_data / "manifest.json").read_text())["end_of_text_id"]


def test_generates_with_its_tokenizer(export: Export) -> None:
    from transformers import AutoTokenizer

    model, directory = export({**DENSE, "kind": "moe"})
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = tokenizer(["def main(", "import"], return_tensors="pt", padding=True)
    out = auto_model(directory).generate(**prompts, max_new_tokens=8)
    prompt = tokenizer("import")["input_ids"]
    expected = torch.tensor([prompt])
    for _ in range(8):  # greedy, without a cache, by our own model: padding on the left changes nothing
        with torch.no_grad():
            expected = torch.cat((expected, model.eval()(expected)[:, -1].argmax(-1, keepdim=True)), 1)
    assert out[1, -8:].tolist() == expected[0, -8:].tolist()


def test_a_tokenizer_that_adds_tokens_loses_that(export: Export, stdlib_data: Path, tmp_path: Path) -> None:
    """Training adds nothing, so that a model would read texts that begin in a way it has never seen."""
    from muonlm.bridge.tokenizer import tokenizer_files

    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(stdlib_data / "manifest.json", data)
    state = json.loads((stdlib_data / "tokenizer.json").read_text())
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": special,
    }
    (data / "tokenizer.json").write_text(json.dumps(state))
    assert Tokenizer.from_file(str(data / "tokenizer.json")).encode("import").ids[0] == 0
    texts, _ = tokenizer_files(data, 64)
    assert 0 not in Tokenizer.from_str(texts["tokenizer.json"]).encode("import").ids


def test_card_has_the_numbers_of_the_run(export: Export) -> None:
    _, directory = export(DENSE)
    card = (directory / "README.md").read_text()
    assert "step 7 of 20" in card
    assert f"| tokens | {7 * 4 * 32:,} |" in card
    for text in ("Qwen3ForCausalLM", "| peak learning rate of the hidden matrices | 0.004 |", "of 32 tokens"):
        assert text in card


def test_records_after_the_step_are_left_out(tmp_path: Path) -> None:
    from muonlm.bridge.card import read_recorded

    lines = [
        {"kind": "eval", "step": 4, "loss": 3.0},
        {"kind": "train", "step": 7, "loss": 2.5},
        {"kind": "eval", "step": 7, "loss": 2.0},
        {"kind": "eval", "step": 9, "loss": 1.0},
        {"kind": "train", "step": 9, "loss": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recorded = read_recorded(tmp_path, 7)
    assert recorded.evaluation is not None
    assert recorded.train is not None
    assert (recorded.evaluation["loss"], recorded.train["loss"]) == (2.0, 2.5)


def test_directory_that_is_not_empty(export: Export, save_run: Callable[..., GPT], tmp_path: Path, capsys: Any) -> None:
    _, directory = export(DENSE)
    before = (directory / "model.safetensors").read_bytes()
    save_run({**DENSE, "num_layers": 1})
    assert main(["export", str(tmp_path / "run"), str(directory)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (directory / "model.safetensors").read_bytes() == before
    assert main(["export", str(tmp_path / "run"), str(directory), "--force"]) == 0
    assert auto_model(directory).config.num_hidden_layers == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_force_removes_nothing_that_is_no_model(save_run: Callable[..., GPT], tmp_path: Path, capsys: Any) -> None:
    save_run(DENSE)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "run"), "--force"]) == 2
    assert "no exported model" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.toml").exists()


def test_data_of_another_tokenizer_is_refused(save_run: Callable[..., GPT], tmp_path: Path, capsys: Any) -> None:
    save_run(DENSE)
    (tmp_path / "run" / "environment.json").write_text('{"tokenizer_fingerprint": "0123456789abcdef"}')
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_checkpoint_of_another_model_is_refused(save_run: Callable[..., GPT], tmp_path: Path, capsys: Any) -> None:
    save_run(DENSE)
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace("intermediate_size = 48", "intermediate_size = 40"))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    assert "gate_proj.weight has shape [48, 32], config.toml gives [40, 32]" in capsys.readouterr().err


def test_disk_that_is_too_small(
    save_run: Callable[..., GPT], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(DENSE)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100_000))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    assert "MiB are free" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_disk_that_fills_up_on_the_way(save_run: Callable[..., GPT], tmp_path: Path) -> None:
    """The size of files is bounded as a full disk bounds it; nothing is left behind."""
    save_run(DENSE)
    code = (
        "import resource, signal, sys; from muonlm.cli.main import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "export", str(tmp_path / "run"), str(tmp_path / "hf")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 2, result.stderr
    assert "could not be written" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("20MB", 2 * 10**7), ("1.5 kb", 1500), ("77", 77)])
def test_sizes(text: str, size: int) -> None:
    from muonlm.cli.export import parse_bytes

    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["5GiBs", "", "0", "-3MB", "GB"])
def test_no_sizes(text: str) -> None:
    from muonlm.cli.export import parse_bytes

    with pytest.raises(UserError, match="--shard-size"):
        parse_bytes(text)
