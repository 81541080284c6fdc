"""The GPU report fits the kernels that are there: what it launches on a GPU is launched here, under the interpreter."""

from __future__ import annotations

import pytest
import torch

from muonlm_kernels.bench.gpu_report import launches, methods
from muonlm_kernels.bench.gpu_tune import Rig, check_kernels, check_methods
from muonlm_kernels.gpu import configs, symmetric, tma, update

TARGET = configs.INTERPRETER


@pytest.fixture
def rig() -> Rig:
    return Rig(
        device=torch.device("cpu"),
        target=TARGET,
        kernels=launches(),
        candidates=lambda kernel, size: configs.candidates(TARGET, kernel),
        pick=lambda kernel, size: configs.pick(TARGET, kernel, batch=size[0], rows=size[1], cols=size[2]),
        methods=methods(),
        contenders=[],
        missing=[],
        timer=lambda call: 1.0,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(2, 33, 40), (1, 64, 96)], ids=str)
def test_every_kernel_passes_the_reports_check(size: tuple[int, int, int], dtype: torch.dtype, rig: Rig) -> None:
    rows = check_kernels(rig, size, dtype)
    assert {(row["operation"], row["state"]) for row in rows} == {
        (operation, "ok")
        for operation in (
            *("xxt", "poly", "update", "update, transposed", "update, carried"),
            *("momentum", "stats", "scale_cast", "scale_cast, carried"),
        )
    }


def test_every_method_passes_the_reports_check(rig: Rig) -> None:
    rows = check_methods(rig, (1, 20, 40))
    assert len(rows) == 2 * len(rig.methods)
    assert [row for row in rows if row["state"] != "ok"] == []


def test_a_configuration_by_descriptors_launches_that_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    for module, name in ((symmetric, "symmetric"), (tma, "symmetric_tma"), (update, "update"), (tma, "update_tma")):
        monkeypatch.setattr(
            module, name, lambda left, right, out, config, *, name=name, **options: launched.append(name)
        )
    for kernel in ("symmetric", "update"):
        for form in (kernel, f"{kernel}_tma"):
            getattr(launches(), kernel)(None, None, None, configs.KernelConfig(form, 32, 32, 32, 4, 1))
    assert launched == ["symmetric", "symmetric_tma", "update", "update_tma"]
