"""The shard file round-trips, and no write ever leaves half a file under its final name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.config.errors import UserError
from muonlm.data.shards import map_document_starts, map_tokens, payload_sha256, read_header, write_atomic, write_shard


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), dtype=st.sampled_from(["<u2", "<u4"]))
def test_round_trip(lengths: list[int], dtype: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    top = np.iinfo(dtype).max
    documents = [np.arange(top - length, top, dtype=dtype) for length in lengths]
    written = write_shard(path, documents, text_bytes=77, vocab_size=top, tokenizer_fingerprint="ab" * 32)
    header = read_header(path)
    assert header == written
    assert (header.num_tokens, header.num_documents, header.text_bytes) == (sum(lengths), len(lengths), 77)
    assert header.file_bytes == path.stat().st_size
    assert header.sha256 == payload_sha256(path)
    assert map_tokens(path, header).dtype == np.dtype(dtype)
    assert np.array_equal(map_tokens(path, header), np.concatenate(documents))
    assert map_document_starts(path, header).tolist() == np.cumsum([0, *lengths[:-1]]).tolist()


def test_final_name_is_untouched_until_the_content_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def crash(handle: int) -> None:
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    monkeypatch.undo()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (_is_old(path), replace(*names)))
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def _is_old(path: Path) -> None:
    assert path.read_bytes() == b"old"


def test_directory_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "nothing" / "x", b"")
