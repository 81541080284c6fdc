"""A plan as few strided copies, run without ranks: they do what the plan says, and do not grow with the experts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings

from muonlm.optim.copies import Program, Traffic, compile_plan, run_copies
from muonlm.optim.layout import Layout, MeshShard, flat_ranges, mesh_layout, replicated
from muonlm.optim.pieces import Split, pieces_of
from muonlm.optim.plan import make_plan
from tests.unit.optim.plan_cases import NEVER, Case, cases, expected_of, locals_of


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
