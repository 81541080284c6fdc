"""Tokens on their way to experts and back: sorted by expert, and sent to the ranks that hold them.

Shape suffixes: N tokens, K experts of each, S = N * K rows, D hidden, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from muonlm.dist import collectives
from muonlm.dist.collectives import Group

_KIND = "expert_all_to_all"


class Order(NamedTuple):
    """A permutation of rows: new row i is old row `order_S[i]`; `inverse_S` undoes it."""

    order_S: Tensor
    inverse_S: Tensor


def order_by(key_S: Tensor) -> Order:
    """The stable order of rows by `key_S`."""
    order = torch.argsort(key_S, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return Order(order, inverse)


def repeat_rows(x_ND: Tensor, order: Order, num_copies: int) -> Tensor:
    """A row for each of the `num_copies` experts of every token, in `order`: (S, D)."""
    out: Tensor = _RepeatRows.apply(x_ND, order, num_copies)
    return out


def sum_rows(y_SD: Tensor, order: Order, num_copies: int) -> Tensor:
    """The sum over the `num_copies` rows of every token, back from `order`: (N, D)."""
    out: Tensor = _SumRows.apply(y_SD, order, num_copies)
    return out


def reorder(x_S: Tensor, order: Order) -> Tensor:
    """Rows in `order`."""
    out: Tensor = _RepeatRows.apply(x_S, order, 1)
    return out


class _RepeatRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order, num_copies: int) -> Tensor:
        ctx.order, ctx.num_copies = order, num_copies
        return x.index_select(0, order.order_S if num_copies == 1 else order.order_S // num_copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_rows(grads[0], ctx.order, ctx.num_copies), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, order: Order, num_copies: int) -> Tensor:
        ctx.order, ctx.num_copies = order, num_copies
        y_SD = y_SD.index_select(0, order.inverse_S)
        return y_SD if num_copies == 1 else y_SD.unflatten(0, (-1, num_copies)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return repeat_rows(grads[0], ctx.order, ctx.num_copies), None, None


class Traffic(NamedTuple):
    """How many rows this rank sends to each rank of the group, and receives from it."""

    sent: list[int]
    received: list[int]
    group: Group


def exchange_counts(counts_E: Tensor, group: Group) -> tuple[Tensor, Traffic]:
    """From rows by expert, all experts, to rows by source rank and expert of this rank, (ranks, E / ranks).

    One all_to_all of E integers; waits for its result, since the host must know how much to receive.
    """
    num_ranks = dist.get_world_size(group)
    received = torch.empty_like(counts_E)
    collectives.all_to_all(received, counts_E, group=group, kind=_KIND)
    both = torch.stack((counts_E, received)).view(2, num_ranks, -1).sum(-1).tolist()
    return received.view(num_ranks, -1), Traffic(both[0], both[1], group)


def send_rows(x_S: Tensor, traffic: Traffic) -> Tensor:
    """Rows for other ranks out, rows from other ranks in, in the order of ranks; one all_to_all each way."""
    out: Tensor = _Send.apply(x_S, traffic)
    return out


def return_rows(x_S: Tensor, traffic: Traffic) -> Tensor:
    """The way back of `send_rows`."""
    return send_rows(x_S, Traffic(traffic.received, traffic.sent, traffic.group))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_S: Tensor, traffic: Traffic) -> Tensor:
        ctx.traffic = traffic
        return _all_to_all(x_S, traffic.sent, traffic.received, traffic.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grads[0], ctx.traffic.received, ctx.traffic.sent, ctx.traffic.group), None


def _all_to_all(x_S: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out = x_S.new_empty(sum(received), *x_S.shape[1:])
    return collectives.all_to_all(out, x_S.contiguous(), received, sent, group=group, kind=_KIND)
