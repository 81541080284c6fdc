"""Checkpoints are bit-exact, whole or absent, and independent of the number of ranks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from muonlm.checkpoint import store
from muonlm.config.errors import UserError
from muonlm.config.schema import AdamWConfig, GPTConfig, MuonConfig
from muonlm.model.build import build_model
from muonlm.optim.build import build_optimizer

VOCAB = 50


def _trained(kind: str = "muon", steps: int = 3, seed: int = 0, **model) -> tuple[nn.Module, torch.optim.Optimizer]:
    config = GPTConfig(num_layers=1, hidden_size=16, intermediate_size=24, num_heads=2, **model)
    gpt = build_model(config, VOCAB, seed)
    optimizer = build_optimizer(gpt, MuonConfig(kind="muon") if kind == "muon" else AdamWConfig(kind="adamw"))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, VOCAB, (2, 9), generator=generator)
        gpt(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return gpt, optimizer


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {param: name for name, param in model.named_parameters()}
    tensors = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param, state in optimizer.state.items():
        tensors |= {f"{names[param]} {key}": value.clone() for key, value in state.items()}
    return tensors


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_exact_and_training_goes_on_alike(tmp_path, kind, tied) -> None:
    model, optimizer = _trained(kind, tie_embeddings=tied)
    expected = _tensors(model, optimizer)
    torch.manual_seed(7)
    path = store.save(tmp_path, 3, store.ModelAndOptimizer(model, optimizer), {"step": 3, "note": "x"}, keep=2)
    expected_random = torch.rand(3)
    assert path == store.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000003"
    fresh, fresh_optimizer = _trained(kind, steps=0, seed=5, tie_embeddings=tied)
    torch.manual_seed(8)
    assert store.load(path, store.ModelAndOptimizer(fresh, fresh_optimizer)) == {"step": 3, "note": "x"}
    assert torch.equal(torch.rand(3), expected_random)
    assert _same(_tensors(fresh, fresh_optimizer), expected)
    for group, old in zip(fresh_optimizer.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in old.items() if k != "params"}
    for one, its_optimizer in ((model, optimizer), (fresh, fresh_optimizer)):
        tokens = torch.arange(18).reshape(2, 9) % VOCAB
        one(tokens[:, :-1], tokens[:, 1:]).backward()
        its_optimizer.step()
    assert _same(_tensors(fresh, fresh_optimizer), _tensors(model, optimizer))


def test_keeps_the_newest_and_removes_left_overs(tmp_path) -> None:
    model, optimizer = _trained()
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 9, 10):
        (folder / ".unfinished_step_00000077").mkdir(parents=True, exist_ok=True)
        store.save(tmp_path, step, store.ModelAndOptimizer(model, optimizer), {}, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000009", "step_00000010"]
    store.save(tmp_path, 11, store.ModelAndOptimizer(model, optimizer), {}, keep=1)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000011"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "no marker", "torn marker"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, damage) -> None:
    model, optimizer = _trained()
    for step in (1, 2):
        store.save(tmp_path, step, store.ModelAndOptimizer(model, optimizer), {"step": step}, keep=2)
    newest = store.latest(tmp_path)
    assert newest is not None
    [data] = newest.glob("*.distcp")
    marker = newest / "complete.json"
    match damage:
        case "truncated":
            os.truncate(data, data.stat().st_size // 2)
        case "missing":
            data.unlink()
        case "no marker":
            marker.unlink()
        case "torn marker":
            os.truncate(marker, marker.stat().st_size // 2)
    assert store.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000001"
    assert "step_00000002 is incomplete" in caplog.text
    # The one that is whole counts, though the damaged one is newer.
    saved = store.save(tmp_path, 3, store.ModelAndOptimizer(model, optimizer), {"step": 3}, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000003"]
    assert store.latest(tmp_path) == saved


def test_no_checkpoint(tmp_path) -> None:
    assert store.latest(tmp_path) is None


def test_another_model_is_refused(tmp_path) -> None:
    path = store.save(tmp_path, 1, store.ModelAndOptimizer(*_trained()), {}, keep=1)
    config = GPTConfig(num_layers=2, hidden_size=16, intermediate_size=24, num_heads=2)
    other = build_model(config, VOCAB, 0)
    with pytest.raises(UserError, match=r"cannot be loaded: .*--fresh"):
        store.load(path, store.ModelAndOptimizer(other, build_optimizer(other, MuonConfig(kind="muon"))))


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch) -> None:
    model, optimizer = _trained()
    store.save(tmp_path, 1, store.ModelAndOptimizer(model, optimizer), {}, keep=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"checkpoint of step 2 could not be written .*are free.* from step_00000001"):
        store.save(tmp_path, 2, store.ModelAndOptimizer(model, optimizer), {}, keep=1)
    assert store.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000001"


def test_a_write_that_fails_half_way_leaves_the_older_one(tmp_path, run_ranks) -> None:
    """The system refuses to let a file grow, as a full disk does in the middle of a write."""

    def one_rank(rank, size):
        model, optimizer = _trained()
        store.save(tmp_path, 1, store.ModelAndOptimizer(model, optimizer), {}, keep=1)
        [data] = (tmp_path / "checkpoints" / "step_00000001").glob("*.distcp")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = data.stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            store.save(tmp_path, 2, store.ModelAndOptimizer(model, optimizer), {}, keep=1)
        except UserError as error:
            return str(error)
        return None

    [message] = run_ranks(one_rank, 1, join=False)
    assert "the checkpoint of step 2 could not be written" in message
    assert "it goes on from step_00000001" in message
    assert store.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000001"


def test_names_and_tensors_do_not_depend_on_ranks(tmp_path, run_ranks) -> None:
    """Saved from two ranks under DistributedDataParallel: the same tensors under the same names as from one process."""
    alone = store.save(tmp_path / "alone", 1, store.ModelAndOptimizer(*_trained()), {}, keep=1)

    def two(rank, size):
        model, optimizer = _trained()
        return store.save(
            tmp_path / "two", 1, store.ModelAndOptimizer(DistributedDataParallel(model), optimizer), {"a": 1}, keep=1
        )

    paths = run_ranks(two, 2)
    assert paths[0] == paths[1]
    reader = torch.distributed.checkpoint.FileSystemReader
    assert (
        reader(alone).read_metadata().state_dict_metadata.keys()
        == reader(paths[0]).read_metadata().state_dict_metadata.keys()
    )
    model, optimizer = _trained(steps=0, seed=3)
    assert store.load(paths[0], store.ModelAndOptimizer(model, optimizer)) == {"a": 1}
    assert _same(_tensors(model, optimizer), _tensors(*_trained()))
    files = json.loads((paths[0] / "complete.json").read_text())["files"]
    assert set(files) == {p.name for p in Path(paths[0]).iterdir()} - {"complete.json"}


def test_one_rank_out_of_space_is_an_error_on_all(tmp_path, run_ranks) -> None:
    def one_rank(rank, size):
        model, optimizer = _trained()
        store.save(tmp_path, 1, store.ModelAndOptimizer(model, optimizer), {}, keep=1)
        if rank == 0:
            usage = namedtuple("usage", "total used free")
            shutil.disk_usage = lambda path: usage(1, 1, 0)
        with pytest.raises(UserError, match="could not be written"):
            store.save(tmp_path, 2, store.ModelAndOptimizer(model, optimizer), {}, keep=1)
        return True

    assert run_ranks(one_rank, 2) == [True, True]


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata"])
def test_a_damaged_checkpoint_of_the_right_size_gives_way_to_the_one_before(tmp_path, caplog, pattern) -> None:
    model, optimizer = _trained()
    for step in (1, 2):
        store.save(tmp_path, step, store.ModelAndOptimizer(model, optimizer), {"step": step}, keep=2)
    (file,) = (tmp_path / "checkpoints" / "step_00000002").glob(pattern)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 16] = bytes(byte ^ 0xFF for byte in content[middle : middle + 16])
    file.write_bytes(content)
    assert store.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000001"
    assert f"{file.name} is damaged" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda marker: {**marker, "extra": {"step": 7}},
        lambda marker: {**marker, "files": {".metadata": 5}},
        lambda marker: {**marker, "files": []},
        lambda marker: [marker],
        lambda marker: {key: value for key, value in marker.items() if key != "crc32"},
    ],
    ids=["extra", "files of no kind", "no files", "list", "no checksum"],
)
def test_a_marker_that_was_changed_is_no_marker(tmp_path, change) -> None:
    model, optimizer = _trained()
    for step in (1, 2):
        store.save(tmp_path, step, store.ModelAndOptimizer(model, optimizer), {"step": step}, keep=2)
    marker = tmp_path / "checkpoints" / "step_00000002" / "complete.json"
    marker.write_text(json.dumps(change(json.loads(marker.read_text()))))
    assert store.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000001"


@pytest.mark.parametrize("content", [b"", b"rubbish", b"cos\nnowhere\n.", b"\x80\x04N."])
def test_metadata_that_torch_cannot_read_is_an_error_of_one_message(tmp_path, content) -> None:
    model, optimizer = _trained()
    path = store.save(tmp_path, 1, store.ModelAndOptimizer(model, optimizer), {}, keep=1)
    (path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded"):
        store.load(path, store.ModelAndOptimizer(model, optimizer))
