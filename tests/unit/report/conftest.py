"""A finished synthetic comparison, made once by the code of tests/unit/compare."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from muonlm.compare import workers
from muonlm.compare.run import compare
from muonlm.report.build import build_report


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """The synthetic training loop (test modules cannot import each other)."""
    path = Path(__file__).parents[1] / "compare" / "synthetic.py"
    spec = importlib.util.spec_from_file_location("synthetic_training_for_report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def finished(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a comparison in which AdamW's lr lies at an edge and one of Muon's runs diverged."""
    directory = tmp_path_factory.mktemp("comparison")
    training = synthetic.FakeTraining()
    training.diverging_lr = 8e-3
    config = synthetic.make_config(directory, name="amp")
    weak = config.arms[0].model_copy(update={"lr": [2.5e-4, 5e-4, 1e-3, 1.6e-3]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "make_pool", synthetic.thread_pool)
        patch.setattr(workers, "run_trial", training)
        compare(config.model_copy(update={"arms": [weak, config.arms[1]]}))
    return directory / "out"


@pytest.fixture
def comparison(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished comparison that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture(scope="session")
def reported(finished: Path) -> Path:
    """The finished comparison with its report, for tests that only read."""
    build_report(finished)
    return finished
