"""Kernels compiled ahead of time, which needs no GPU: `pytest -m aot tests/kernels/aot`, a minute or two.

Only collected where `-m` says `aot`, because nobody else should wait for the compiler. A process that interprets
kernels (TRITON_INTERPRET=1) cannot compile them, so these tests have one of their own.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """True keeps a file from being collected, None leaves it to others."""
    return None if "aot" in config.getoption("markexpr") else True
