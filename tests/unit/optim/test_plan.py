"""The plan of an exchange, run without ranks: every element reaches its owners once, and every holder its results."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from muonlm.optim.copies import Program, Traffic, compile_plan, run_copies
from muonlm.optim.layout import Box, Layout, MeshShard, flat_ranges, mesh_layout, replicated
from muonlm.optim.pieces import Piece, Split, pieces_of
from muonlm.optim.plan import Plan, Round, Segment, Task, make_plan

NEVER = 2**63


@dataclass(frozen=True)
class Case:
    """Everything that `make_plan` is given."""

    layouts: list[Layout]
    pieces: list[Piece]
    ranks: int
    bucket_bytes: int
    split_min_flops: int
    pinned: frozenset[int]

    def plan(self) -> Plan:
        """The plan, with elements of four bytes."""
        return make_plan(
            self.pieces,
            self.layouts,
            self.ranks,
            element_bytes=4,
            bucket_bytes=self.bucket_bytes,
            split_min_flops=self.split_min_flops,
            pinned=self.pinned,
        )


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, int, int], sizes: tuple[int, ...]) -> Layout:
    """Replicas, flat ranges, or a cut of one or two dims, over all ranks of a mesh."""
    ranks = math.prod(sizes)
    kind = draw(st.sampled_from(["replicated", "flat", "mesh", "mesh", "mesh"]))
    if kind == "replicated":
        return replicated(shape, range(ranks))
    if kind == "flat":
        numel = math.prod(shape)
        cuts = draw(st.lists(st.integers(0, numel), max_size=ranks - 1))
        borders = sorted({0, numel, *cuts})
        owners = draw(st.permutations(range(ranks)))
        return flat_ranges(shape, [(owners[i], a, b) for i, (a, b) in enumerate(pairwise(borders))])
    dims = [draw(st.sampled_from([None, 0, 1, 2])) for _ in sizes]
    strided = len(dims) == 2 and dims[0] == dims[1] is not None
    axes = tuple(MeshShard(dim, strided=strided and number == 0) for number, dim in enumerate(dims))
    return mesh_layout(shape, (sizes, tuple(range(ranks))), axes)


@st.composite
def splits(draw: st.DrawFn, shape: tuple[int, int, int]) -> Split | None:
    """Some division of the rows or columns of a weight, or none."""
    dim = draw(st.integers(0, 1))
    groups = draw(st.sampled_from([n for n in (1, 2, 3) if shape[1 + dim] % n == 0]))
    period = shape[1 + dim] // groups
    cuts = draw(st.lists(st.integers(1, period), max_size=2))
    sizes = tuple(b - a for a, b in pairwise(sorted({0, period, *cuts})))
    split = Split(sizes, groups, separate_groups=draw(st.booleans()), dim=dim)
    return draw(st.sampled_from([None, split]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A few parameters, each in a layout and a split of its own."""
    sizes = draw(st.sampled_from([(1,), (2,), (3,), (5,), (2, 2), (2, 3)]))
    all_layouts, pieces = [], []
    for index in range(draw(st.integers(1, 4))):
        shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)))
        all_layouts.append(draw(layouts(shape, sizes)))
        pieces += pieces_of(index, f"p{index}", shape, draw(splits(shape)))
    return Case(
        layouts=all_layouts,
        pieces=pieces,
        ranks=math.prod(sizes),
        bucket_bytes=draw(st.sampled_from([1, 100, 400, 2**20])),
        split_min_flops=draw(st.sampled_from([0, NEVER])),
        pinned=frozenset(draw(st.sets(st.integers(0, len(all_layouts) - 1)))),
    )


def whole(case: Case, param: int) -> torch.Tensor:
    """A parameter whose elements are their own numbers."""
    shape = case.layouts[param].shape
    return torch.arange(math.prod(shape)).view(shape)


def matrix_of(case: Case, piece: Piece) -> torch.Tensor:
    """The matrix that a piece is, cut out of its parameter."""
    out = torch.full((piece.rows, piece.cols), -1)
    values = whole(case, piece.param)
    everything = Box((0, 0, 0), case.layouts[piece.param].shape)
    for part in piece.parts:
        block = values[part.box.within(everything)][0]
        out[part.row : part.row + block.shape[0], part.col : part.col + block.shape[1]] = block
    return out


def locals_of(case: Case, rank: int) -> list[torch.Tensor]:
    """What a rank holds of each parameter, flat."""
    out = []
    for param, layout in enumerate(case.layouts):
        everything = Box((0, 0, 0), layout.shape)
        held = layout.by_rank.get(rank, ())
        flat = torch.full((sum(holding.box.numel for holding in held),), -1)
        for holding in held:
            block = whole(case, param)[holding.box.within(everything)].reshape(-1)
            flat[holding.offset : holding.offset + len(block)] = block
        out.append(flat)
    return out


def expected_of(case: Case, task: Task) -> torch.Tensor:
    """The matrix, or part of its longer side, that a task works on."""
    piece = case.pieces[task.piece]
    matrix = matrix_of(case, piece)
    return matrix[task.begin : task.end] if piece.rows > piece.cols else matrix[:, task.begin : task.end]


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


def exchanged(
    programs: list[Traffic], sources: list[list[torch.Tensor]], targets: list[list[torch.Tensor]], ranks: int
) -> None:
    """One way of a round on all ranks: what stays, and what a collective would bring."""
    sent = [torch.full((sum(traffic.sizes_out),), -1) for traffic in programs]
    for traffic, source, target, buffer in zip(programs, sources, targets, sent, strict=True):
        run_copies(traffic.kept, source, target)
        run_copies(traffic.sent, source, [buffer])
    kinds = {traffic.collective for traffic in programs}
    assert len(kinds) == 1  # all ranks call the same
    for rank, traffic in enumerate(programs):
        if kinds == {"all_gather"}:
            parts = sent
        else:
            parts = [sent[other].split(programs[other].sizes_out)[rank] for other in range(ranks)]
        assert [len(part) for part in parts] == traffic.sizes_in
        run_copies(traffic.received, [torch.cat(parts)], targets[rank])
        assert kinds != {None} or not (traffic.sent or traffic.received)


def updates_of(program: Program, flats: list[torch.Tensor]) -> list[torch.Tensor]:
    """Local tensors side by side, as the program wants them."""
    out = []
    for members in program.storages:
        assert [len(flats[param]) for param, _ in members] == [numel for _, numel in members]
        out.append(torch.cat([flats[param] for param, _ in members] or [torch.empty(0, dtype=torch.int64)]))
    return out


def of_two_widths() -> Case:
    """Blocks of one shape follow each other in memory, but the first one's rows do not lie as far apart."""
    shapes = [(1, 8, 8), (1, 8, 16)]
    pieces = pieces_of(0, "p0", shapes[0], None) + pieces_of(1, "p1", shapes[1], Split((8, 8), dim=1))
    return Case([replicated(shape, [0]) for shape in shapes], pieces, 1, 2**20, NEVER, frozenset())


@settings(max_examples=250, deadline=None)
@example(of_two_widths())
@given(cases())
def test_few_copies_do_what_the_plan_says(case: Case) -> None:
    """Every rank stacks the matrices of its tasks, and every result ends where its matrix came from."""
    plan = case.plan()
    programs = [compile_plan(plan, rank) for rank in range(case.ranks)]
    held = [locals_of(case, rank) for rank in range(case.ranks)]
    updates = [updates_of(program, flats) for program, flats in zip(programs, held, strict=True)]
    for number in range(plan.num_rounds):
        works = [program.rounds[number] for program in programs]
        stacks = [
            [
                torch.full(stack.shape, -1)
                if stack.lies_at is None
                else updates[rank][stack.lies_at.buffer][stack.lies_at.start[0] :][: math.prod(stack.shape)].view(
                    stack.shape
                )
                for stack in work.stacks
            ]
            for rank, work in enumerate(works)
        ]
        exchanged([work.gather for work in works], updates, stacks, case.ranks)
        for rank, work in enumerate(works):
            found = [matrix.tolist() for stack in stacks[rank] for matrix in stack]
            tasks = plan.round(number, rank).tasks
            assert sorted(found) == sorted(expected_of(case, task).tolist() for task in tasks)
            teams = [stack.team for stack in work.stacks if len(stack.team) > 1]
            assert teams == [task.team for task in tasks if len(task.team) > 1]
        # Results as they come for tall matrices: transposed in memory.
        results = [[(-stack - 5).mT.contiguous().mT for stack in own] for own in stacks]
        exchanged([work.scatter for work in works], results, updates, case.ranks)
    for program, own, flats in zip(programs, updates, held, strict=True):
        assert program.num_tasks == sum(stack.shape[0] for work in program.rounds for stack in work.stacks)
        for expected, storage in zip(updates_of(program, [-flat - 5 for flat in flats]), own, strict=True):
            assert torch.equal(storage, expected)


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


def num_copies(layout: Layout, ranks: int, pinned: frozenset[int] = frozenset({0})) -> list[int]:
    """Copies of rank 0 for a stack in this layout, and a stack that it does not find as it is to be."""
    plan = make_plan(pieces_of(0, "experts", layout.shape, None), [layout], ranks, pinned=pinned)
    counts = []
    for work in compile_plan(plan, 0).rounds:
        counts += [len(copies) for way in (work.gather, work.scatter) for copies in (way.kept, way.sent, way.received)]
        counts += [sum(stack.lies_at is None for stack in work.stacks)]
    return counts


@pytest.mark.parametrize("experts", [8, 64])
def test_copies_do_not_become_more_with_the_experts(experts: int) -> None:
    shape, four = (experts, 16, 8), ((4,), (0, 1, 2, 3))
    in_place = [0, 0, 0, 1, 0, 0, 0]
    assert num_copies(replicated(shape, [0]), 1) == in_place
    assert num_copies(mesh_layout(shape, four, (MeshShard(0),)), 4) == in_place
    assert num_copies(flat_ranges(shape, [(0, 0, 2 * 128), (1, 2 * 128, experts * 128)]), 2) == in_place
    # A quarter of the rows of each: one copy with each rank, and what stays.
    assert num_copies(mesh_layout(shape, four, (MeshShard(1),)), 4) == [1, 3, 3, 1, 3, 3, 1]
    # All ranks have all, and get all: one contribution of each rank, of which its own needs no stacking.
    assert num_copies(replicated(shape, range(4)), 4, frozenset())[2:6] == [0, 0, 1, 4]


@pytest.mark.parametrize("ranks", [1, 2])
def test_matrices_of_one_shape_are_stacked_together(ranks: int) -> None:
    """Twelve layers of query, key and a tall matrix: on one rank all lie as they are to be, on two halves are sent."""
    shapes = [(1, 8, 8), (1, 8, 8), (1, 16, 8)] * 12
    pieces = [piece for i, shape in enumerate(shapes) for piece in pieces_of(i, f"p{i}", shape, None)]
    mesh = ((ranks,), tuple(range(ranks)))
    plan = make_plan(pieces, [mesh_layout(shape, mesh, (MeshShard(1),)) for shape in shapes], ranks)
    (work,) = compile_plan(plan, 0).rounds
    sizes = [24, 12] if ranks == 1 else [12, 6]
    assert [stack.shape for stack in work.stacks] == [(sizes[0], 8, 8), (sizes[1], 16, 8)]
    for way in (work.gather, work.scatter):
        assert len(way.sent) == len(way.received) == (0 if ranks == 1 else 2)
    assert len(work.gather.kept) == (0 if ranks == 1 else 2)
    assert len(work.scatter.kept) == 2


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
