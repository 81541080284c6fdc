"""The GPU report on a CPU: the launches are replaced by torch, the times by a table, everything between is real."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import muonlm_kernels
from muonlm_kernels import newton_schulz
from muonlm_kernels.bench import gpu_report
from muonlm_kernels.bench.gpu_report import Extent, write_report
from muonlm_kernels.bench.gpu_tune import Rig, check_kernels, check_methods
from muonlm_kernels.bench.peers import Contender, Missing

CPU = torch.device("cpu")
SIZE = (2, 17, 24)
EXTENT = Extent(checked=(SIZE,), dtypes=(torch.bfloat16,), tuned=(SIZE, (1, 8, 8)), iterated=("8x12",), rounds=3)
OPERATIONS = (
    *("xxt", "poly", "update", "update, transposed", "update, carried"),
    *("momentum", "stats", "scale_cast", "scale_cast, carried"),
)
UPDATES = {"update", "update, transposed", "update, carried"}


@dataclass(frozen=True)
class Config:
    """What stands in for a launch configuration; its time is `seconds`."""

    kernel: str
    seconds: float
    extra: dict[str, int] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return " ".join([self.kernel, str(self.seconds), *(f"g{value}" for value in self.extra.values())])


def symmetric(
    a: Any, b: Any, out: Any, config: Any, *, addend_KMM: Any = None, alpha: float = 1, beta: float = 1
) -> Any:
    result = alpha * (a.float() @ b.float().mT)
    return out.copy_(result if addend_KMM is None else result + beta * addend_KMM.float())


def update(
    b: Any,
    x: Any,
    out: Any,
    config: Any,
    *,
    alpha: float = 1,
    beta: float,
    lo_KMN: Any = None,
) -> Any:
    whole = x.float() + (0 if lo_KMN is None else lo_KMN.float())
    return rounded(beta * whole + alpha * (b.float() @ x.float()), out, lo_KMN)


def rounded(exact: Any, out: Any, lo: Any) -> Any:
    """Stores `exact`, and what rounding takes from it in `lo`."""
    out.copy_(exact)
    if lo is not None:
        lo.copy_(exact - out.float())
    return out


def stats(x: Any, config: Any) -> Any:
    """In two parts, by columns."""
    amax = torch.stack([part.abs().amax(dim=(1, 2)) for part in x.float().chunk(2, dim=2)], dim=1)
    squares = [part.square().sum(dim=(1, 2)) for part in x.float().chunk(2, dim=2)]
    return torch.stack([amax, torch.stack(squares, dim=1) / amax.square()], dim=1)


def momentum(grad: Any, buffer: Any, out: Any, config: Any, *, beta: float, weight: float, nesterov: bool) -> Any:
    buffer.mul_(beta).add_(grad.float(), alpha=weight)
    out.copy_(beta * buffer + weight * grad.float())
    return stats(out, config)


def scale_cast(x: Any, partials: Any, out: Any, config: Any, *, lo_KMN: Any = None) -> Any:
    amax, squares = partials.unbind(dim=1)
    norms = (squares * amax.square()).sum(dim=1).sqrt()
    rounded(x / norms[:, None, None], out, lo_KMN)
    return torch.ones(len(x), dtype=torch.bool)


KERNELS = SimpleNamespace(symmetric=symmetric, update=update, stats=stats, momentum=momentum, scale_cast=scale_cast)


def method(name: str, orthogonalize: Callable[[torch.Tensor], torch.Tensor], *, ours: bool = True) -> Contender:
    return Contender(name, "jordan", torch.bfloat16, orthogonalize, ours=ours)


def timer(call: Callable[[], object]) -> float:
    """Seconds by the configuration of the call; 3 for everything else."""
    call()
    given = call.args[0] if isinstance(call, partial) else None
    return given.seconds if isinstance(given, Config) else 3.0


@pytest.fixture
def rig() -> Rig:
    standard = method("muonlm standard", partial(newton_schulz, coefficients="jordan", steps=5, dtype=torch.bfloat16))
    return Rig(
        device=CPU,
        target="sm_90",
        kernels=KERNELS,
        candidates=lambda kernel, size: [Config(kernel, 2.0), Config(kernel, 1.5), Config(kernel, 1.5, {"group": 8})],
        pick=lambda kernel, size: Config(kernel, 2.0),
        methods=[standard],
        contenders=[method("peer", standard.orthogonalize, ours=False)],
        missing=[Missing("absent", "not installed (pip install absent)")],
        timer=timer,
    )


def report_of(rig: Rig, out: Path, extent: Extent = EXTENT) -> tuple[int, dict[str, Any]]:
    code = write_report(rig, extent, out)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return code, json.loads(out.read_text(), parse_constant=refuse)


def planted(**faults: Callable[..., Any]) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(KERNELS), **faults})


def test_the_report_is_complete(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = report_of(rig, tmp_path / "report.json")
    assert (code, report["failure"]) == (0, None)
    assert report["schema"] == "muonlm-gpu-report/1"
    assert report["machine"]["target"] == "sm_90"
    assert report["machine"]["torch"] == torch.__version__
    assert {row["operation"] for row in report["values"]} == {*OPERATIONS, "muonlm standard"}
    assert {row["state"] for row in report["values"]} == {"ok"}
    # Two of the three candidates are one apart from `extra`, and the picked one is among them.
    assert sum(row["operation"] == "xxt" for row in report["values"]) == 3
    assert [(row["operation"], row["size"]) for row in report["tuning"]] == [
        (operation, list(size)) for size in EXTENT.tuned for operation in OPERATIONS
    ]
    assert [block["shape"] for block in report["iterations"]["shapes"]] == ["8x12"]
    assert report["iterations"]["missing"][0]["name"] == "absent"
    printed = capsys.readouterr().out
    assert "\n".join(report["summary"]) in printed
    assert f"Written to {tmp_path / 'report.json'}." in printed
    assert "muonlm_kernels/gpu/configs.py" in printed
    for heading in ("# muonlm kernels on cpu", "## Kernels", "## Whole iterations"):
        assert any(line.startswith(heading) for line in report["summary"])


def test_the_fastest_configuration_is_chosen_and_rated_against_torch(rig: Rig, tmp_path: Path) -> None:
    _, report = report_of(rig, tmp_path / "report.json")
    row = next(row for row in report["tuning"] if row["operation"] == "poly")
    assert (row["best"], row["picked"]) == ("symmetric 1.5", "symmetric 2.0")
    assert row["seconds"] == {"torch": 3.0, "symmetric 2.0": 2.0, "symmetric 1.5": 1.5, "symmetric 1.5 g8": 1.5}
    assert row["time_ratio_to_torch"]["median"] == 0.5
    assert row["dense_flops"] == 2 * 2 * 32**3  # 17 rows are padded
    choices = report["chosen"]["symmetric"]
    assert [(choice["operation"], choice["size"]) for choice in choices[:2]] == [
        ("xxt", [2, 17, 24]),
        ("poly", [2, 17, 24]),
    ]
    assert all(choice["config"] == {"kernel": "symmetric", "seconds": 1.5, "extra": {}} for choice in choices)
    (line,) = [line for line in report["summary"] if line.startswith("| poly") and " 2x17x24 " in line]
    assert [cell.strip() for cell in line.split("|")[3:7]] == ["3000", "0.67", "0.50 [0.50, 0.50]", "symmetric 1.5"]


def test_the_picked_configuration_is_measured_too(rig: Rig, tmp_path: Path) -> None:
    _, report = report_of(replace(rig, pick=lambda kernel, size: Config(kernel, 2.5)), tmp_path / "report.json")
    row = report["tuning"][0]
    assert (row["picked"], row["seconds"][row["picked"]], row["best"]) == ("symmetric 2.5", 2.5, "symmetric 1.5")


def unmirrored(a: Any, b: Any, out: Any, config: Any, **options: Any) -> Any:
    return out.copy_(symmetric(a, b, out, config, **options).triu())


def last_column_lost(b: Any, x: Any, out: Any, config: Any, **options: Any) -> Any:
    update(b, x, out, config, **options)[..., -1] = 0
    return out


def no_addend(b: Any, x: Any, out: Any, config: Any, *, beta: float, **options: Any) -> Any:
    return update(b, x, out, config, beta=0, **options)


def nothing_read_of_what_was_carried(
    b: Any, x: Any, out: Any, config: Any, *, lo_KMN: Any = None, **options: Any
) -> Any:
    return update(b, x, out, config, lo_KMN=None if lo_KMN is None else lo_KMN.zero_(), **options)


def not_scaled(x: Any, partials: Any, out: Any, config: Any, *, lo_KMN: Any = None) -> Any:
    return rounded(x, out, lo_KMN)


def nothing_carried(x: Any, partials: Any, out: Any, config: Any, *, lo_KMN: Any = None) -> Any:
    if lo_KMN is not None:
        lo_KMN.zero_()
    return scale_cast(x, partials, out, config)


def momentum_not_stored(grad: Any, buffer: Any, out: Any, config: Any, **options: Any) -> Any:
    return momentum(grad, buffer.clone(), out, config, **options)


def norm_of_the_unrounded(grad: Any, buffer: Any, out: Any, config: Any, **options: Any) -> Any:
    return momentum(grad, buffer, out, config, **options) * torch.tensor([1.0, 1.002]).view(1, 2, 1)


@pytest.mark.parametrize(
    ("faults", "wrong"),
    [
        ({"symmetric": unmirrored}, {"xxt", "poly"}),
        ({"symmetric": lambda a, b, out, config, **_: symmetric(a, b, out, config)}, {"poly"}),
        ({"symmetric": lambda a, b, out, config, **_: out.fill_(torch.nan)}, {"xxt", "poly"}),
        ({"update": last_column_lost}, UPDATES),
        ({"update": no_addend}, UPDATES),
        ({"update": nothing_read_of_what_was_carried}, {"update, carried"}),
        ({"momentum": momentum_not_stored}, {"momentum"}),
        ({"momentum": norm_of_the_unrounded}, {"momentum"}),
        ({"stats": lambda x, config: stats(x[..., :-1], config)}, {"stats"}),
        ({"scale_cast": not_scaled}, {"scale_cast", "scale_cast, carried"}),
        ({"scale_cast": nothing_carried}, {"scale_cast, carried"}),
    ],
    ids=[
        "no mirror",
        "no addend",
        "NaN",
        "mask",
        "no a X",
        "no lo read",
        "not stored",
        "norm",
        "short norm",
        "not scaled",
        "no lo written",
    ],
)
def test_a_wrong_kernel_stops_the_report(faults: dict[str, Any], wrong: set[str], rig: Rig, tmp_path: Path) -> None:
    code, report = report_of(replace(rig, kernels=planted(**faults)), tmp_path / "report.json")
    assert code == 1
    assert {row["operation"] for row in report["values"] if row["state"] == "wrong"} == wrong
    assert report["failure"] == f"{3 * len(wrong)} of {len(report['values'])} results are wrong"
    assert (report["tuning"], report["chosen"], report["iterations"]) == ([], {}, None)
    assert any(line.startswith("**") and "are wrong" in line for line in report["summary"])


def test_an_error_that_is_small_beside_the_diagonal_is_seen(rig: Rig) -> None:
    """A step of the sum lost in one block: within the rounding of the diagonal, which is 1, but not of the others."""

    def without_step(a: Any, b: Any, out: Any, config: Any, **options: Any) -> Any:
        symmetric(a, b, out, config, **options)[:, :16, -16:] += 0.004
        return out

    size = (1, 128, 2048)
    rows = check_kernels(replace(rig, kernels=planted(symmetric=without_step)), size, torch.bfloat16)
    assert {row["state"] for row in rows if row["operation"] == "xxt"} == {"wrong"}


@pytest.mark.parametrize("factor", [1.1, torch.nan], ids=str)
def test_a_wrong_iteration_stops_the_report(factor: float, rig: Rig, tmp_path: Path) -> None:
    right = rig.methods[0].orthogonalize
    wrong = method("muonlm wrong", lambda grad: right(grad) * factor)
    code, report = report_of(replace(rig, methods=[wrong]), tmp_path / "report.json")
    assert code == 1
    assert [row["operation"] for row in report["values"] if row["state"] == "wrong"] == ["muonlm wrong"] * 2
    assert report["tuning"] == []


def test_iterations_are_checked_wide_and_tall(rig: Rig) -> None:
    assert [row["size"] for row in check_methods(rig, SIZE)] == [[2, 17, 24], [2, 24, 17]]
    assert {row["state"] for row in check_methods(rig, SIZE)} == {"ok"}


def test_a_configuration_that_cannot_be_launched_is_passed_over(rig: Rig, tmp_path: Path) -> None:
    def update_in_little_memory(b: Any, x: Any, out: Any, config: Config, **options: Any) -> Any:
        if config.seconds == 1.5:
            raise RuntimeError("out of resource: shared memory\nReducing block sizes may help")
        return update(b, x, out, config, **options)

    code, report = report_of(replace(rig, kernels=planted(update=update_in_little_memory)), tmp_path / "report.json")
    assert code == 0
    refused = [row for row in report["values"] if row["state"] != "ok"]
    assert {row["state"] for row in refused} == {"cannot launch: RuntimeError: out of resource: shared memory"}
    kernels = ("update", "update_lo")
    assert {row["config"] for row in refused} == {
        f"{kernel} {rest}" for kernel in kernels for rest in ("1.5", "1.5 g8")
    }
    assert {choice["config"]["seconds"] for kernel in kernels for choice in report["chosen"][kernel]} == {2.0}


def test_a_kernel_that_no_configuration_can_launch_is_a_failure(rig: Rig, tmp_path: Path) -> None:
    def never(*operands: Any, **options: Any) -> Any:
        raise RuntimeError("no")

    code, report = report_of(replace(rig, kernels=planted(stats=never)), tmp_path / "report.json")
    assert (code, report["failure"]) == (1, "no configuration can be launched of: stats bfloat16")


def test_the_report_is_written_when_something_breaks(rig: Rig, tmp_path: Path) -> None:
    def breaks(kernel: str, size: tuple[int, int, int]) -> Config:
        if size == (1, 8, 8):
            raise RuntimeError("device lost")
        return Config(kernel, 2.0)

    code, report = report_of(replace(rig, pick=breaks), tmp_path / "report.json")
    assert code == 1
    assert report["failure"].rstrip().endswith("RuntimeError: device lost")
    assert len(report["tuning"]) == len(OPERATIONS)


def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path: Path) -> None:
    source = Path(muonlm_kernels.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(source), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "muonlm_kernels.bench", "gpu", "--out", str(tmp_path / "report.json")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "gpu report: no GPU that this torch can use; run it on a machine with a CUDA or ROCm GPU"
    ]
    assert not (tmp_path / "report.json").exists()


def test_triton_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("muonlm_kernels.gpu")]:
        monkeypatch.delitem(sys.modules, name)
    assert gpu_report.run(argparse.Namespace(quick=True, out=Path("unused"))) == 2
    assert "triton is not installed" in capsys.readouterr().err
