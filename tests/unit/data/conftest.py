"""Real text (sources of the standard library) and small data sets prepared from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muonlm.config.data import PrepareConfig
from muonlm.data.prepare import prepare
from muonlm.data.sources import stdlib_files

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """64 module sources between 2 and 40 kB, about 1 MB together."""
    files = [path for path in stdlib_files() if 2_000 < path.stat().st_size < 40_000]
    return [path.read_text("utf-8") for path in files[:64]]


@pytest.fixture(scope="session")
def books(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts as one file each."""
    folder = tmp_path_factory.mktemp("books")
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="session")
def make_config(books: Path) -> Callable[..., PrepareConfig]:
    """A small configuration over `books`: several shards of each split; keyword arguments replace its tables."""

    def make(output: Path, **changes: Any) -> PrepareConfig:
        table: dict[str, Any] = {
            "source": {"kind": "text", "files": [f"{books}/*.txt"]},
            "output": str(output),
            "tokenizer": {"vocab_size": 400},
            "validation_fraction": 0.3,
            "chunk_bytes": 300_000,
        }
        return PrepareConfig.model_validate(table | changes)

    return make


@pytest.fixture(scope="session")
def prepared(make_config: Callable[..., PrepareConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished data set of `books`; tests copy it before they damage it."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(make_config(output), progress=False)
    return output
