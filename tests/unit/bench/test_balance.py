"""Owner balance and bytes of known models, computed without ranks, against the bars and the closed forms."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from muonlm.bench import balance
from muonlm.bench.balance import balance_of, plan_of
from muonlm.bench.costs import exchange_bytes, most_collectives
from muonlm.bench.zoo import ZOO, gpt
from muonlm.config.errors import UserError
from muonlm.model.flops import count_parameters
from muonlm.optim.assign import Assignment, Job, assign
from muonlm.optim.layout import Box, Layout, MeshShard, mesh_layout, replicated
from muonlm.optim.pieces import pieces_of
from muonlm.optim.plan import make_plan


def assigned(name: str, ranks: int) -> Assignment:
    """The assignment of a model's matrices that travel anyhow."""
    jobs = [Job(w.out_features, w.in_features) for w in ZOO[name].weights for _ in range(w.experts)]
    return assign(jobs, ranks)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *[("gpt-124m", ranks) for ranks in range(1, 19)],
        *[("llama-7b", ranks) for ranks in range(1, 57, 5)],
        *[("moe-16b", ranks) for ranks in (64, 500, 1024)],
        pytest.param("moe-16b", 1200, marks=pytest.mark.slow),
    ],
)
def test_four_matrices_a_rank_balance_within_a_tenth(name: str, ranks: int) -> None:
    assert ranks <= ZOO[name].num_matrices / 4
    assert assigned(name, ranks).imbalance <= 1.10


@pytest.mark.parametrize(
    ("name", "ranks"), [("gpt-124m", 144), ("llama-7b", 448), pytest.param("moe-16b", 10362, marks=pytest.mark.slow)]
)
def test_twice_as_many_ranks_as_matrices_balance_by_sharing(name: str, ranks: int) -> None:
    assert ranks == 2 * ZOO[name].num_matrices
    result = assigned(name, ranks)
    assert result.imbalance <= 1.5
    assert any(len(team) > 1 for team in result.workers)


def test_balanced_ranks_share_nothing() -> None:
    for ranks in (8, 16, 32, 64):
        assert balance_of(ZOO["llama-7b"], ranks)["shared"] == 0


def test_experts_that_lie_whole_on_ranks_stay_there() -> None:
    row = balance_of(ZOO["moe-16b-by-expert"], 16)
    assert row["max_over_mean"] <= 1.10
    others = sum(weight.numel for weight in ZOO["moe-16b"].weights if weight.experts == 1)
    assert row["formula_bytes"] == pytest.approx(exchange_bytes(others, 2, shards=16))


def test_figures_of_a_row() -> None:
    row = balance_of(ZOO["llama-7b"], 64)
    assert row["formula_bytes"] == pytest.approx(2 * 63 / 64**2 * 2 * 6_476_005_376)
    assert row["busiest_bytes"] == pytest.approx(row["formula_bytes"], rel=0.05)
    assert row["busiest_shared_bytes"] == 0
    assert row["rounds"] == 2  # 202 MB at 134 MB a round
    shared = balance_of(ZOO["llama-7b"], 448)
    assert shared["largest_team"] > 1
    assert shared["max_over_perfect"] > shared["max_over_mean"]
    assert shared["busiest_shared_bytes"] > 0


def test_a_plan_looks_at_each_block_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices times ranks is millions; what one rank needs is not."""
    calls = 0
    original = Box.intersect

    def count(self: Box, other: Box) -> Box | None:
        nonlocal calls
        calls += 1
        return original(self, other)

    monkeypatch.setattr(Box, "intersect", count)
    plan = plan_of(ZOO["moe-16b"], 1024)
    plan.round(0, 5)
    assert calls < 300_000  # 1024 * 5181 is 5.3 million


def _mesh(sizes: tuple[int, ...], *axes: MeshShard) -> Callable[[tuple[int, int, int]], Layout]:
    ranks = tuple(range(16))
    return lambda shape: mesh_layout(shape, (sizes, ranks), axes)


@pytest.mark.parametrize(
    ("layout", "shards", "replicas"),
    [
        (_mesh((16,), MeshShard(1)), 16, 1),
        (_mesh((16,), MeshShard(2)), 16, 1),
        (_mesh((4, 4), MeshShard(None), MeshShard(1)), 4, 4),
        (_mesh((2, 8), MeshShard(None), MeshShard(1)), 8, 2),
        (_mesh((4, 4), MeshShard(1, strided=True), MeshShard(1)), 16, 1),
        (_mesh((4, 4), MeshShard(1), MeshShard(2)), 16, 1),
        (lambda shape: replicated(shape, range(16)), 1, 16),
    ],
    ids=["fsdp", "tp", "hsdp 4x4", "hsdp 2x8", "fsdp-tp same dim", "fsdp-tp", "replicated"],
)
def test_the_closed_form_is_the_mean_over_the_ranks(
    layout: Callable[[tuple[int, int, int]], Layout], shards: int, replicas: int
) -> None:
    shapes = [(1, 64, 64), (1, 192, 64), (1, 64, 192)] * 16
    layouts = [layout(shape) for shape in shapes]
    pieces = [piece for i, shape in enumerate(shapes) for piece in pieces_of(i, f"p{i}", shape, None)]
    plan = make_plan(pieces, layouts, 16, element_bytes=4)
    mean = statistics.fmean(sum(plan.bytes_sent(rank).values()) for rank in range(16))
    numel = sum(a * b * c for a, b, c in shapes)
    assert mean == pytest.approx(exchange_bytes(numel, 4, shards=shards, replicas=replicas), rel=0.01)


def test_collectives_of_a_step_at_most() -> None:
    assert most_collectives(100, 100) == 4
    assert most_collectives(101, 100) == 6


def test_the_zoo_is_what_it_says() -> None:
    assert (ZOO["gpt-124m"].num_matrices, ZOO["gpt-124m"].numel) == (72, 84_934_656)
    assert (ZOO["llama-7b"].num_matrices, ZOO["llama-7b"].numel) == (224, 6_476_005_376)
    assert ZOO["moe-16b"].num_matrices == ZOO["moe-16b-by-expert"].num_matrices == 26 * (4 + 3 + 3 * 64) + 7
    assert 14e9 < ZOO["moe-16b"].numel < 16e9
    for model in ZOO.values():
        names = [weight.name for weight in model.weights]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("numel", [1e5, 1e6, 30e6, 1e9])
def test_a_gpt_of_about_so_many_elements(numel: float) -> None:
    model = gpt(numel)
    assert model.numel == pytest.approx(numel, rel=0.3)
    assert model.config is not None
    assert count_parameters(model.config, 100)["hidden"] == model.numel


def test_balance_prints_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    assert balance.main(["--models", "gpt-124m", "--ranks", "1", "16", "--json", str(out)], prog="balance") == 0
    text = capsys.readouterr().out
    assert "| 16    |    1.000 |" in text
    assert "gpt-124m: GPT-2 small" in text
    result = json.loads(out.read_text())
    assert [row["ranks"] for row in result["models"][0]["rows"]] == [1, 16]


@pytest.mark.parametrize("wrong", [["--models", "gpt-5"], ["--ranks", "0"], ["--bucket-mb", "-1"], ["--rank", "4"]])
def test_wrong_options_end_with_two(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        balance.main(wrong, prog="balance")
    assert error.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_layouts_need_enough_ranks() -> None:
    from muonlm.bench.placement import check_layout

    check_layout("hsdp", 4)
    check_layout("replicated", 1)
    for layout, ranks in (("hsdp", 2), ("fsdp-tp", 5), ("fsdp", 1), ("tp", 1)):
        with pytest.raises(UserError, match=f"layout {layout} needs"):
            check_layout(layout, ranks)
