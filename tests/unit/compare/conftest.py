"""The synthetic training loop in place of the worker processes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from muonlm.compare import workers


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The module `synthetic` next to this file (test modules cannot import each other)."""
    spec = importlib.util.spec_from_file_location("synthetic_training", Path(__file__).with_name("synthetic.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def training(synthetic: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """A fake training loop that runs in threads; records which run directories it trained."""
    fake = synthetic.FakeTraining()
    monkeypatch.setattr(workers, "make_pool", synthetic.thread_pool)
    monkeypatch.setattr(workers, "run_trial", fake)
    return fake
