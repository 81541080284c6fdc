"""The plan of an exchange, run without ranks: every element reaches its owners once, and every holder its results."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from muonlm.optim.layout import Layout, MeshShard, mesh_layout, replicated
from muonlm.optim.pieces import Split, pieces_of
from muonlm.optim.plan import Plan, Round, Segment, make_plan
from tests.unit.optim.plan_cases import NEVER, Case, cases, expected_of, locals_of


def assert_both_ends_agree(rounds: list[Round]) -> None:
    """What one rank sends to another is what the other expects, in the same order."""
    for sender, work in enumerate(rounds):
        for receiver, other in enumerate(rounds):
            for out, incoming in ((work.gather_out, other.gather_in), (work.scatter_out, other.scatter_in)):
                assert out.get(receiver, []) == incoming.get(sender, [])


def placed(segment: Segment, matrix: torch.Tensor) -> torch.Tensor:
    """Where a segment lies in its task's matrix."""
    _, rows, cols = segment.box.shape
    return matrix[segment.row : segment.row + rows, segment.col : segment.col + cols]


@settings(max_examples=250, deadline=None)
@given(cases())
def test_every_element_travels_once_there_and_once_back(case: Case) -> None:
    plan = case.plan()
    held = [locals_of(case, rank) for rank in range(case.ranks)]
    results = [[torch.zeros_like(flat) for flat in flats] for flats in held]
    computed: dict[int, int] = defaultdict(int)
    for number in range(plan.num_rounds):
        rounds = [plan.round(number, rank) for rank in range(case.ranks)]
        assert_both_ends_agree(rounds)
        for rank, work in enumerate(rounds):
            expected = {task: expected_of(case, task) for task in work.tasks}
            arrived = {task: torch.full_like(matrix, -1) for task, matrix in expected.items()}
            counts = {task: torch.zeros_like(matrix) for task, matrix in expected.items()}
            for sender, segments in work.gather_in.items():
                for segment in segments:
                    placed(segment, arrived[segment.task]).copy_(segment.view_of(held[sender][segment.param]))
                    placed(segment, counts[segment.task]).add_(1)
            for task, matrix in expected.items():
                assert torch.equal(arrived[task], matrix)
                assert bool((counts[task] == 1).all())
                computed[task.piece] += matrix.numel()
            for receiver, segments in work.scatter_out.items():
                for segment in segments:
                    mine = segment.view_of(held[receiver][segment.param])
                    assert torch.equal(placed(segment, expected[segment.task]), mine)
                    segment.view_of(results[receiver][segment.param]).add_(1)
            assert all(task.worker == rank for task in work.tasks)
    assert computed == {index: piece.rows * piece.cols for index, piece in enumerate(case.pieces)}
    for flats in results:
        assert all(bool((flat == 1).all()) for flat in flats)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_bytes_sent_are_those_of_what_leaves_the_rank(case: Case) -> None:
    plan = case.plan()
    travels = [False] * plan.num_rounds
    for rank in range(case.ranks):
        counted = {"gather": 0, "scatter": 0}
        for number in range(plan.num_rounds):
            work = plan.round(number, rank)
            for phase, out in (("gather", work.gather_out), ("scatter", work.scatter_out)):
                leaving = [s for receiver, segments in out.items() if receiver != rank for s in segments]
                travels[number] = travels[number] or bool(leaving) or any(len(task.team) > 1 for task in work.tasks)
                counted[phase] += 4 * sum(math.prod(s.box.shape) for s in leaving)
        if not plan.is_broadcast:
            assert plan.bytes_sent(rank) == counted
    assert plan.travels == travels or plan.is_broadcast


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_round_assembles_no_more_than_a_bucket(case: Case) -> None:
    plan = case.plan()
    for number in range(plan.num_rounds):
        works = [plan.round(number, rank) for rank in range(case.ranks)]
        assert any(work.tasks for work in works)
        for work in works:
            pieces = [(case.pieces[task.piece], len(task.team)) for task in work.tasks]
            sizes = [4 * piece.rows * piece.cols // team for piece, team in pieces]
            assert len(sizes) <= 1 or sum(sizes) <= case.bucket_bytes


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_team_covers_the_longer_side_in_order(case: Case) -> None:
    plan = replace(case, split_min_flops=0).plan()
    for index, piece in enumerate(case.pieces):
        tasks = plan.tasks(index)
        assert tuple(task.worker for task in tasks) == plan.assignment.workers[index]
        borders = [task.begin for task in tasks] + [tasks[-1].end]
        assert borders[0] == 0
        assert borders[-1] == max(piece.rows, piece.cols)
        assert all(task.end == border for task, border in zip(tasks, borders[1:], strict=True))
    for number in range(plan.num_rounds):
        for rank in range(case.ranks):
            is_alone = [len(task.team) == 1 for task in plan.round(number, rank).tasks]
            assert is_alone == sorted(is_alone)  # nobody is kept waiting by a matrix that only one rank computes


def test_what_a_team_of_all_holders_shares_travels_too() -> None:
    layouts = [replicated((1, 16, 16), (0, 1)), mesh_layout((1, 2, 2), ((2,), (0, 1)), (MeshShard(1),))]
    pieces = [piece for i, layout in enumerate(layouts) for piece in pieces_of(i, f"p{i}", layout.shape, None)]
    plan = make_plan(pieces, layouts, 2, split_min_flops=0, bucket_bytes=1)
    assert plan.assignment.workers[0] == (0, 1)
    assert plan.travels == [True, True]


def test_all_ranks_of_a_team_come_to_shared_matrices_in_the_same_round_and_order() -> None:
    shape = (1, 64, 64)
    pieces = [piece for i in range(5) for piece in pieces_of(i, f"p{i}", shape, None)]
    mesh = ((8,), tuple(range(8)))
    plan = make_plan(pieces, [mesh_layout(shape, mesh, (MeshShard(1),))] * 5, 8, split_min_flops=0, bucket_bytes=9000)
    teams: dict[tuple[int, ...], dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for number in range(plan.num_rounds):
        for rank in range(8):
            for task in plan.round(number, rank).tasks:
                teams[task.team][rank].append((number, task.piece))
    assert any(len(team) > 1 for team in teams)
    for orders in teams.values():
        assert len({tuple(order) for order in orders.values()}) == 1


def test_broadcast_counts_the_padded_contribution_to_all_others() -> None:
    shapes = [(1, 8, 8), (1, 4, 8), (1, 8, 8)]
    pieces = [piece for i, shape in enumerate(shapes) for piece in pieces_of(i, f"p{i}", shape, None)]
    plan = make_plan(pieces, [replicated(shape, range(3)) for shape in shapes], 3, split_min_flops=NEVER)
    assert plan.is_broadcast
    assert plan.broadcast_numel(0) == 64
    assert plan.bytes_sent(0) == plan.bytes_sent(2) == {"gather": 0, "scatter": 2 * 64 * 2}


def test_stacks_cut_between_experts_stay_where_they_are() -> None:
    layout = mesh_layout((6, 8, 4), ((4,), (0, 1, 2, 3)), (MeshShard(0),))
    plan = make_plan(pieces_of(0, "experts", (6, 8, 4), None), [layout], 4, pinned=frozenset({0}))
    assert plan.assignment.workers == ((0,), (0,), (1,), (1,), (2,), (2,))
    assert all(plan.bytes_sent(rank) == {"gather": 0, "scatter": 0} for rank in range(4))
    assert plan.travels == [False]


def _plan(layout: Layout | None = None, split: Split | None = None, name: str = "w", ranks: int = 2, **options) -> Plan:
    mesh = ((ranks,), tuple(range(ranks)))
    layout = layout or mesh_layout((1, 16, 8), mesh, (MeshShard(1),))
    pieces = pieces_of(0, name, layout.shape, split) + pieces_of(1, "v", (1, 8, 8), None)
    return make_plan(pieces, [layout, mesh_layout((1, 8, 8), mesh, (MeshShard(1),))], ranks, **options)


def test_digests_differ_when_anything_differs() -> None:
    mesh = ((2,), (0, 1))
    plans = [
        _plan(),
        _plan(ranks=3),
        _plan(name="other"),
        _plan(layout=mesh_layout((1, 16, 8), mesh, (MeshShard(2),))),
        _plan(layout=mesh_layout((1, 16, 8), ((2,), (1, 0)), (MeshShard(1),))),
        _plan(layout=mesh_layout((1, 16, 9), mesh, (MeshShard(1),))),
        _plan(split=Split((8, 8))),
        _plan(split=Split((4, 4), groups=2)),
        _plan(split=Split((4, 12))),
        _plan(element_bytes=4),
        _plan(steps=6),
        _plan(split_min_flops=0),
        _plan(layout=replicated((1, 16, 8), (0, 1)), split=Split((8, 8)), bucket_bytes=1),
        _plan(layout=replicated((1, 16, 8), (0, 1)), split=Split((8, 8))),
    ]
    digests = [plan.digest() for plan in plans]
    assert len(set(digests)) == len(digests)
    assert _plan().digest() == digests[0]


def test_a_matrix_has_one_line() -> None:
    lines = _plan(split=Split((4, 4), groups=2)).lines()
    assert len(lines) == 3
    assert lines[0].startswith("w/0 8x8 made of (0, 0, 0)+(1, 4, 8), (0, 8, 0)+(1, 4, 8): (1, 16, 8) over a mesh (2,)")
    assert lines[0].endswith("in round 0")


def test_a_split_must_divide_the_weight() -> None:
    with pytest.raises(ValueError, match="covers 12 of the 16 rows"):
        pieces_of(0, "w", (1, 16, 8), Split((4, 8)))
