"""Errors and decisions that all ranks must share, so that none waits for another that has given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from muonlm.config.errors import UserError
from muonlm.dist import collectives

T = TypeVar("T")


@contextmanager
def raised_on_all_ranks() -> Iterator[None]:
    """An error inside the block on any rank is raised on every rank when the block ends.

    The block must not hold collectives, else a rank that failed leaves the others waiting in one. One gather of
    small objects. Other ranks raise UserError where the original was one, else RuntimeError, and name the rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    reports = collectives.gather_objects(None if error is None else (isinstance(error, UserError), str(error)))
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            raise (UserError if report[0] else RuntimeError)(f"rank {rank}: {report[1]}")


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its value on every rank; its error is raised on every rank.

    One gather and one broadcast of the (pickled) value.
    """
    value: T | None = None
    with raised_on_all_ranks():
        if collectives.rank() == 0:
            value = function()
    result: T = collectives.broadcast_object(value)
    return result


def first_difference(every: list[list[str]]) -> tuple[int, str] | None:
    """Of the ranks' lists, the first rank whose list is not that of rank 0, and where they part; None if all equal."""
    rank = next((rank for rank, lines in enumerate(every) if lines != every[0]), None)
    if rank is None:
        return None
    for mine, theirs in zip(every[0], every[rank], strict=False):
        if mine != theirs:
            return rank, f"rank 0 has {mine}, rank {rank} {theirs}"
    more, fewer = (rank, 0) if len(every[rank]) > len(every[0]) else (0, rank)
    return rank, f"rank {more} also has {every[more][len(every[fewer])]}"
