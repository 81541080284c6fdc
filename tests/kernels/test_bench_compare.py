"""The side-by-side benchmark: that its figures mean what it says, and what it does with peers that are not there."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import muonlm_kernels
from muonlm_kernels import polar_factor
from muonlm_kernels.bench import compare, measure, peers, timing
from muonlm_kernels.bench.measure import Plan, Shape
from muonlm_kernels.bench.peers import Contender, Missing

SOURCE = Path(muonlm_kernels.__file__).parent.parent
CPU = torch.device("cpu")
SHAPE = Shape(None, 8, 12)
PLAN = Plan(rounds=3, budget_s=60.0, longest_call_s=60.0)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    words = (sys.executable, "-m", "muonlm_kernels.bench", *words)
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=120)


def sleeper(name: str, seconds: float, *, ours: bool) -> Contender:
    def orthogonalize(grad: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return grad

    return Contender(name, "none", torch.float32, orthogonalize, ours=ours)


def measured(*found: Contender, shape: Shape = SHAPE, plan: Plan = PLAN) -> dict[str, Any]:
    result = measure.compare([shape], found, [], plan=plan, device=CPU, timer=timing.cpu_timer(0.0))
    (block,) = result["shapes"]
    return block


def test_the_command_writes_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = command(
        *("compare", "--shapes", "24x40", "3x32x16", "--rounds", "3", "--threads", "1", "--device", "cpu"),
        *("--dtype", "bfloat16", "--json", str(out)),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["schema"] == "muonlm-kernels-compare/1"
    assert (result["machine"]["threads"], result["machine"]["torch"]) == (1, torch.__version__)
    assert [block["shape"] for block in result["shapes"]] == ["24x40", "3x32x16"]
    assert [block["dense_flops"] for block in result["shapes"]] == [
        5 * (4 * 24 * 24 * 40 + 2 * 24**3),
        3 * 5 * (4 * 16 * 16 * 32 + 2 * 16**3),
    ]
    for block in result["shapes"]:
        rows = {row["name"]: row for row in block["contenders"]}
        assert {"muonlm jordan", "muonlm default", "torch.optim.Muon"} <= set(rows)
        assert len(rows) + len(result["missing"]) == 2 + len(peers._PEERS)
        for name in ("muonlm jordan", "muonlm default", "torch.optim.Muon"):
            row = rows[name]
            assert row["skipped"] is None
            assert 0 < row["relative_error"] < 0.3
            assert 0 < row["singular_values"][0] < row["singular_values"][1] < row["singular_values"][2] < 1.3
            assert min(row["seconds_of_rounds"]) <= row["seconds"] <= max(row["seconds_of_rounds"])
            assert f"| {name} " in done.stdout
        pairs = {(pair["ours"], pair["peer"]) for pair in block["ratios"]}
        assert ("muonlm jordan", "torch.optim.Muon") in pairs
        # The same work in the same precision leaves the same error.
        assert rows["muonlm jordan"]["relative_error"] == pytest.approx(
            rows["torch.optim.Muon"]["relative_error"], abs=0.02
        )


@pytest.mark.parametrize(
    ("words", "dtype"), [([], None), (["--dtype", "auto"], None), (["--dtype", "float32"], torch.float32)]
)
def test_the_precision_is_automatic_unless_it_is_given(
    words: list[str], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def contenders(*arguments: Any) -> tuple[list[Contender], list[Missing]]:
        seen.append(arguments)
        return [sleeper("ours", 0, ours=True)], []

    monkeypatch.setattr(compare, "contenders", contenders)
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    assert compare.run(parser.parse_args(["--device", "cpu", "--shapes", "4x4", "--rounds", "1", *words])) == 0
    assert seen == [(CPU, "jordan", dtype)]


def test_a_ratio_below_1_means_that_ours_is_faster() -> None:
    slow, fast = 0.05, 0.0005  # far enough apart for a busy machine
    block = measured(sleeper("ours", fast, ours=True), sleeper("peer", slow, ours=False))
    (pair,) = block["ratios"]
    assert (pair["ours"], pair["peer"]) == ("ours", "peer")
    assert 0 < pair["interval"][0] <= pair["time_ratio"] <= pair["interval"][1] < 0.7
    ours, peer = block["contenders"]
    assert ours["share_of_matmul_rate"] > peer["share_of_matmul_rate"] > 0
    block = measured(sleeper("ours", slow, ours=True), sleeper("peer", fast, ours=False))
    assert block["ratios"][0]["time_ratio"] > 1.5


def test_the_share_is_of_the_matmul_rate_of_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_matmul_size", lambda device: 10)
    seconds = {"ours": 4.0, "matmul": 2.0}

    def timer(call: Callable[[], object]) -> float:
        return seconds["matmul" if isinstance(call, partial) and call.func is torch.mm else "ours"]

    shape = Shape(2, 3, 5)
    plan = replace(PLAN, longest_call_s=1e9)
    result = measure.compare([shape], [sleeper("ours", 0, ours=True)], [], plan=plan, device=CPU, timer=timer)
    block = result["shapes"][0]
    dense = 2 * 5 * (4 * 3 * 3 * 5 + 2 * 3**3)
    fast = measure.dtype_name(muonlm_kernels.newton_schulz(torch.ones(1, 1)).dtype)
    assert block["matmul"] == {"size": 10, "dtype": fast, "flops_per_s": 2 * 10**3 / 2.0}
    assert block["contenders"][0]["share_of_matmul_rate"] == pytest.approx(dense / 4.0 / 1000.0)


def test_errors_are_those_of_the_result() -> None:
    def scaled(grad: torch.Tensor) -> torch.Tensor:
        return polar_factor(grad) * 1.5

    block = measured(Contender("ours", "none", torch.float32, scaled, ours=True), shape=Shape(2, 12, 7))
    row = block["contenders"][0]
    assert row["relative_error"] == pytest.approx(0.5, rel=1e-6)
    assert row["orthogonality_error"] == pytest.approx(1.5**2 - 1, rel=1e-6)
    assert row["singular_values"] == pytest.approx([1.5] * 3, rel=1e-6)


def test_what_changes_its_input_changes_nobody_elses() -> None:
    sums = []

    def destroy(grad: torch.Tensor) -> torch.Tensor:
        return grad.zero_()

    def watch(grad: torch.Tensor) -> torch.Tensor:
        sums.append(float(grad.abs().sum()))
        return grad

    measured(
        Contender("peer", "none", torch.bfloat16, destroy), Contender("ours", "none", torch.bfloat16, watch, ours=True)
    )
    # Two calls to warm up and one or more in each round.
    assert len(sums) >= 2 + PLAN.rounds
    assert len(set(sums)) == 1
    assert sums[0] > 0


def test_a_peer_that_fails_is_named_and_ours_raises() -> None:
    def fail(grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand much more")

    good = sleeper("ours", 0, ours=True)
    block = measured(good, replace(good, name="peer", ours=False, orthogonalize=fail))
    assert block["contenders"][1]["skipped"] == "failed: RuntimeError: no such kernel"
    assert block["ratios"] == []
    with pytest.raises(RuntimeError, match="no such kernel"):
        measured(replace(good, orthogonalize=fail))


def test_a_contender_that_would_take_too_long_is_not_called() -> None:
    def never(grad: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called")

    slow = Contender("peer", "none", torch.float32, never)
    (row,) = measured(slow, plan=replace(PLAN, longest_call_s=1e-12))["contenders"]
    assert row["skipped"].startswith("a call would take about")
    assert row["skipped"].endswith("the longest that is measured is 1e-12 s")
    assert "seconds" not in row


def test_what_is_slow_here_is_called_twice_and_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a product in its precision takes: 1 s here, where 3 s are allowed for five rounds."""
    calls = []

    def slow(grad: torch.Tensor) -> torch.Tensor:
        calls.append(time.sleep(0.05))
        return grad

    flops = SHAPE.dense_flops
    monkeypatch.setattr(measure, "_matmul_rate", lambda dtype, *_: flops if dtype == torch.bfloat16 else 1e6 * flops)
    found = [sleeper("ours", 0, ours=True), Contender("peer", "none", torch.bfloat16, slow)]
    plan = replace(PLAN, rounds=6, budget_s=3.0)
    result = measure.compare([SHAPE], found, [], plan=plan, device=CPU, timer=timing.cpu_timer(0.0))
    (block,) = result["shapes"]
    assert len(calls) == 2
    assert [len(row["seconds_of_rounds"]) for row in block["contenders"]] == [6, 1]
    (pair,) = block["ratios"]
    ours, peer = block["contenders"]
    assert pair["time_ratio"] == ours["seconds_of_rounds"][0] / peer["seconds"]
    assert (pair["interval"], pair["coverage"]) == ([pair["time_ratio"]] * 2, 0.0)
    text = compare.text_of(result)
    assert "peer: timed once, as a call takes 0." in text
    assert "median of rounds; below 1 ours is faster" in text
    (ratios,) = [line for line in text.splitlines() if line.startswith("| 8x12 ")]
    assert ratios.split("|")[2].strip() == f"{pair['time_ratio']:.2g} (1 round)"


def test_the_text_names_ratio_missing_and_skipped() -> None:
    found = [sleeper("ours", 0.0005, ours=True), sleeper("slow", 0.05, ours=False), sleeper("big", 0, ours=False)]
    result = measure.compare(
        [Shape(None, 4, 4)],
        [*found[:2], replace(found[2], orthogonalize=lambda grad: 1 / 0)],
        [Missing("absent", "not installed (pip install absent)")],
        plan=PLAN,
        device=CPU,
        timer=timing.cpu_timer(0.0),
    )
    text = compare.text_of(result)
    assert "Time of ours / time of the peer, median of rounds [75% interval]; below 1 ours is faster" in text
    assert "absent: not installed (pip install absent)" in text
    assert "big: failed: ZeroDivisionError: division by zero" in text
    (ratios,) = [line for line in text.splitlines() if line.startswith("| 4x4 ")]
    assert float(ratios.split("|")[2].split()[0]) < 1
    assert ratios.split("|")[3].strip() == "-"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "12"], "'12' is no shape; MxN or KxMxN is one, as in 1024x4096 or 12x768x768"),
        (["--shapes", "0x4"], "'0x4' is no shape"),
        (["--shapes", "3x4", "axb"], "'axb' is no shape"),
        (["--shapes", "1x2x3x4"], "'1x2x3x4' is no shape"),
        (["--shapes", "99999x99999"], "99999x99999 has more than 1,073,741,824 elements"),
        (["--rounds", "0"], "'0' is no number above 0"),
        (["--seconds", "nan"], "'nan' is no number above 0"),
        (["--threads", "two"], "'two' is no number from 1 to"),
        (["--threads", "100000"], "the cores of this machine"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--device", "tpu"], "'tpu' is not one of auto, cpu, cuda"),
        (["--coefficients", "jordn"], "invalid choice: 'jordn'"),
        (["--json", "no/such/folder/x.json"], "cannot write no/such/folder/x.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_end_with_one_message(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench")
    compare.add_arguments(parser)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_shape_ends_the_command_with_2() -> None:
    done = command("compare", "--shapes", "1024")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'1024' is no shape" in done.stderr
    assert "Traceback" not in done.stderr
