"""Opening checks everything it promises; sequences are slices of the concatenated shards."""

from __future__ import annotations

import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from muonlm.config.data import PrepareConfig
from muonlm.config.errors import UserError
from muonlm.data import dataset as module
from muonlm.data.dataset import TokenDataset, describe, open_split, verify
from muonlm.data.manifest import read_manifest
from muonlm.data.prepare import prepare


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the data set to damage."""
    return shutil.copytree(prepared, tmp_path / "data")


def concatenation(path: Path, split: str) -> np.ndarray:
    """All tokens of a split, by the documented byte layout and nothing else."""
    parts = []
    for shard in read_manifest(path).splits[split].shards:
        raw = (path / shard.file).read_bytes()
        magic, version, size, tokens, documents = struct.unpack_from("<8sIIQQ", raw)
        assert (magic, version, size) == (b"MUONTOKS", 1, 2)
        assert len(raw) == 128 + (2 * tokens + 7) // 8 * 8 + 8 * documents
        parts.append(np.frombuffer(raw, "<u2", tokens, 128))
    return np.concatenate(parts).astype(np.int64)


@pytest.mark.parametrize("seq_len", [2, 64, 1000, 60_000])
def test_sequences_are_slices_of_the_concatenation(prepared: Path, seq_len: int) -> None:
    """60,000 tokens are several shards long here."""
    tokens = concatenation(prepared, "train")
    data = open_split(prepared, "train", seq_len)
    assert data.num_tokens == len(tokens)
    assert data.num_sequences == (len(tokens) - 1) // seq_len
    edge = np.cumsum([shard.num_tokens for shard in read_manifest(prepared).splits["train"].shards])[:-1] // seq_len
    indices = np.unique(np.concatenate([[0, data.num_sequences - 1], edge, edge - 1, edge + 1]))
    indices = np.random.default_rng(0).permutation(indices[(indices >= 0) & (indices < data.num_sequences)])
    found = data.sequences(indices)
    assert found.dtype == np.int64
    assert np.array_equal(found, np.stack([tokens[i * seq_len : i * seq_len + seq_len + 1] for i in indices]))


def test_exactly_one_sequence(prepared: Path) -> None:
    tokens = concatenation(prepared, "validation")
    data = open_split(prepared, "validation", len(tokens) - 1)
    assert data.num_sequences == 1
    assert np.array_equal(data.sequences(np.array([0]))[0], tokens)
    with pytest.raises(UserError, match=rf"sequence longer than the data.*needs {len(tokens) + 1} tokens"):
        open_split(prepared, "validation", len(tokens))


def test_index_outside_is_refused(prepared: Path) -> None:
    data = open_split(prepared, "train", 64)
    for bad in (-1, data.num_sequences):
        with pytest.raises(IndexError, match="outside"):
            data.sequences(np.array([0, bad]))
    assert data.sequences(np.array([], dtype=np.int64)).shape == (0, 65)


def test_a_batch_takes_well_under_a_millisecond(prepared: Path) -> None:
    data = open_split(prepared, "train", 128)
    indices = np.random.default_rng(0).integers(0, data.num_sequences, 16)
    best = min(_seconds(data, indices) for _ in range(200))
    assert best < 5e-4


def _seconds(data: TokenDataset, indices: np.ndarray) -> float:
    start = time.perf_counter()
    data.sequences(indices)
    return time.perf_counter() - start


def test_missing_directory_and_unfinished(prepared: Path, tmp_path: Path, damaged: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; run `muonlm data prepare CONFIG .*one of fineweb,.*stdlib"):
        open_split(tmp_path / "nothing", "train", 8)
    (damaged / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json.*run `muonlm data prepare"):
        open_split(damaged, "train", 8)


def test_damaged_manifest(damaged: Path) -> None:
    (damaged / "manifest.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match=r"manifest\.json is damaged or of another version"):
        open_split(damaged, "train", 8)


@pytest.mark.parametrize("keep", [100, -1, -2000])
def test_truncated_shard(damaged: Path, keep: int) -> None:
    file = damaged / "train-00001.bin"
    raw = file.read_bytes()
    file.write_bytes(raw[:keep])
    with pytest.raises(UserError, match=rf"train-00001\.bin is truncated: .* found {len(raw[:keep])} bytes"):
        open_split(damaged, "train", 8, "never")


def test_shard_gone_or_no_shard(damaged: Path) -> None:
    file = damaged / "train-00001.bin"
    file.write_bytes(b"something else" * 100)
    with pytest.raises(UserError, match="is not a token shard"):
        open_split(damaged, "train", 8)
    file.unlink()
    with pytest.raises(UserError, match="cannot read token shard"):
        open_split(damaged, "train", 8)


def flip(file: Path, offset: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("offset", [128, 3001, -1])
def test_flipped_bit_is_found_by_the_checksum(damaged: Path, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(damaged / "train-00000.bin", offset)
    open_split(damaged, "train", 8, "never")
    open_split(damaged, "validation", 8)
    for mode in ("auto", "always"):
        with pytest.raises(UserError, match=r"train-00000\.bin is damaged: checksum"):
            open_split(damaged, "train", 8, mode)
    monkeypatch.setattr(module, "AUTO_VERIFY_BYTES", 1000)
    open_split(damaged, "train", 8, "auto")


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 24, 32, 40, 48, 80])
def test_flipped_header_bit_is_always_found(damaged: Path, offset: int) -> None:
    flip(damaged / "train-00000.bin", offset)
    with pytest.raises(UserError, match=r"train-00000\.bin"):
        open_split(damaged, "train", 8, "never")


def test_shard_of_another_tokenizer(damaged: Path, make_config: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    prepare(make_config(tmp_path / "other", tokenizer={"vocab_size": 401}), progress=False)
    shutil.copy(tmp_path / "other" / "train-00001.bin", damaged)
    with pytest.raises(UserError, match=r"train-00001\.bin was written by another tokenizer"):
        open_split(damaged, "train", 8, "never")
    shutil.copy(tmp_path / "other" / "tokenizer.json", damaged)
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer that wrote these shards"):
        open_split(damaged, "validation", 8, "never")
    (damaged / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        open_split(damaged, "validation", 8, "never")


def test_describe(prepared: Path, texts: list[str]) -> None:
    summary = describe(prepared)
    train, validation = summary["splits"]["train"], summary["splits"]["validation"]
    assert train["documents"] + validation["documents"] == len(texts)
    assert train["text_bytes"] + validation["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert train["tokens"] == len(concatenation(prepared, "train"))
    assert train["bytes_per_token"] == train["text_bytes"] / train["tokens"] > 1
    assert summary["vocab_size"] == 400
    assert summary["tokenizer_fingerprint"] == open_split(prepared, "train", 8).tokenizer_fingerprint


def test_verify_lists_everything_that_is_wrong(damaged: Path) -> None:
    assert verify(damaged)["shards"] == len(list(damaged.glob("*.bin")))
    flip(damaged / "train-00000.bin", 200)
    flip(damaged / "validation-00001.bin", 200)
    with pytest.raises(UserError) as raised:
        verify(damaged)
    assert "train-00000.bin is damaged" in str(raised.value)
    assert "validation-00001.bin is damaged" in str(raised.value)
