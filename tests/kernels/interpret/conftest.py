"""Kernels on CPU tensors under Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/kernels/interpret`.

Triton reads the variable when it is first imported, and kernels of an interpreting process cannot be compiled, so these
tests have a process of their own; without the variable they are not collected.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


def _load(name: str) -> ModuleType:
    """A module of this directory, which is no package. Dataclasses look their module up in sys.modules."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if os.environ.get("TRITON_INTERPRET") == "1":
    _load("triton_interpreter").install()
    _load("kernel_checks")
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def interpreter() -> ModuleType:
    """The module with `checks` and the conversions of bfloat16."""
    return sys.modules["triton_interpreter"]


@pytest.fixture(scope="session")
def kernel_checks() -> ModuleType:
    """What each kernel must do."""
    return sys.modules["kernel_checks"]


@pytest.fixture
def clean(interpreter):
    """Records the launches of a test, and fails it if one of them accessed memory wrongly.

    Memory that torch allocates without values holds NaN meanwhile: that is what this mode of torch is used for.
    """
    torch.use_deterministic_algorithms(True)
    try:
        with interpreter.checks() as launches:
            yield launches
    finally:
        torch.use_deterministic_algorithms(False)
    assert [fault for launch in launches for fault in launch.faults()] == []
