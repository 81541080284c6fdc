"""How ZeRO-1 and 2 lay parameters out in flat buckets so that matrices have whole owners: a pure function.

A bucket has one slot of equal length for each rank. Its gradients are reduced by one reduce_scatter, after which rank
r has slot r; after the step one all_gather brings all slots to all ranks. A matrix lies whole in one slot, so its owner
can orthogonalize it without further communication; parameters that are updated elementwise may be cut anywhere and fill
what is left. That is the communication of ZeRO-AdamW, (D - 1) / D of gradients and parameters, and the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from muonlm.optim.assign import shared_flops

MAX_PADDING = 0.05
_MAX_GROWTH = 32


@dataclass(frozen=True)
class Item:
    """A parameter: `numel` elements which are `count` matrices (rows, cols) one after the other, or none (count 0)."""

    numel: int
    count: int = 0
    rows: int = 0
    cols: int = 0


@dataclass(frozen=True)
class Entry:
    """Elements [begin, end) of parameter `item`, from `offset` on in the slot of `rank`."""

    item: int
    rank: int
    begin: int
    end: int
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Entries by rank and offset; `slot` is the length of a rank's part, `padding` the elements that nothing fills."""

    entries: tuple[Entry, ...]
    slot: int
    padding: int


@dataclass
class _Fill:
    """A bucket in the making: what each rank has in it, and which matrices, as (item, number), it owns."""

    fill: list[int]
    flops: list[int]
    owned: list[list[tuple[int, int]]] = field(default_factory=list)


def plan_buckets(items: Sequence[Item], num_ranks: int, bucket_numel: int, steps: int = 5) -> list[Bucket]:
    """Sort parameters, given in the order in which their gradients become ready, into buckets.

    Buckets are filled up to `bucket_numel` elements, and further, up to 32 times that, while more than 5 % of one
    would be padding; where that does not help, as with more ranks than matrices, matrices are cut like other
    parameters, the largest first. Owners are chosen for equal slots, and among equals for equal Newton-Schulz FLOPs
    over all buckets. Deterministic.
    """
    flops = [0] * num_ranks
    buckets, start = [], 0
    while start < len(items):
        end, size, best = start, 0, None
        while end < len(items):
            size += items[end].numel
            end += 1
            if size < bucket_numel and end < len(items):
                continue
            bucket, loads = _pack(items, range(start, end), num_ranks, flops, steps, frozenset())
            if best is None or _share(bucket) < _share(best[0]):
                best = bucket, loads, end
            if _share(bucket) <= MAX_PADDING or size >= _MAX_GROWTH * bucket_numel:
                break
        assert best is not None
        bucket, loads, end = best
        members = range(start, end)
        by_size = sorted((i for i in members if items[i].count), key=lambda i: (-items[i].numel // items[i].count, i))
        cut: frozenset[int] = frozenset()
        while _share(bucket) > MAX_PADDING and len(cut) < len(by_size):
            cut |= {by_size[len(cut)]}
            bucket, loads = _pack(items, members, num_ranks, flops, steps, cut)
        buckets.append(bucket)
        flops, start = loads, end
    return buckets


def padding_share(buckets: Sequence[Bucket], num_ranks: int) -> float:
    """Padding as a share of all elements that travel."""
    return sum(b.padding for b in buckets) / max(1, sum(b.slot * num_ranks for b in buckets))


def _share(bucket: Bucket) -> float:
    """Padding as a share of what the bucket holds."""
    held = sum(entry.end - entry.begin for entry in bucket.entries)
    return bucket.padding / max(1, held)


def _pack(
    items: Sequence[Item], members: range, num_ranks: int, flops: list[int], steps: int, cut: frozenset[int]
) -> tuple[Bucket, list[int]]:
    """One bucket of `members`, and the FLOPs of each rank with it. Matrices of the items in `cut` have no owner."""
    total = sum(items[i].numel for i in members)
    target = -(-total // num_ranks)
    state = _Fill([0] * num_ranks, list(flops), [[] for _ in range(num_ranks)])
    matrices = [(i, k) for i in members if i not in cut for k in range(items[i].count)]
    for item, number in sorted(matrices, key=lambda m: (-items[m[0]].numel // items[m[0]].count, m)):
        _place(items[item], item, number, state, target, steps)
    slot = max(target, *state.fill) if total else 0
    entries = _entries(items, state, [i for i in members if i in cut or not items[i].count], slot)
    return Bucket(tuple(entries), slot, slot * num_ranks - total), state.flops


def _place(item: Item, index: int, number: int, state: _Fill, target: int, steps: int) -> None:
    """Give a matrix to the rank with the least FLOPs among those with room; where none has room, to the emptiest."""
    size = item.numel // item.count
    limit = max(target, *state.fill)
    roomy = [r for r, used in enumerate(state.fill) if used + size <= limit]
    if roomy:
        rank = min(roomy, key=lambda r: (state.flops[r], state.fill[r], r))
    else:
        rank = min(range(len(state.fill)), key=lambda r: (state.fill[r], state.flops[r], r))
    state.fill[rank] += size
    state.flops[rank] += shared_flops(item.rows, item.cols, 1, steps)
    state.owned[rank].append((index, number))


def _entries(items: Sequence[Item], state: _Fill, flexible: list[int], slot: int) -> list[Entry]:
    """Owned matrices at the start of each slot, in order; then the flexible parameters, through all that is left."""
    entries: list[Entry] = []
    ends = []
    for rank, owned in enumerate(state.owned):
        offset = 0
        for item, number in sorted(owned):
            size = items[item].numel // items[item].count
            begin = number * size
            last = entries[-1] if entries else None
            if last and last.rank == rank and last.item == item and last.end == begin:
                entries[-1] = Entry(item, rank, last.begin, begin + size, last.offset)
            else:
                entries.append(Entry(item, rank, begin, begin + size, offset))
            offset += size
        ends.append(offset)
    rank = 0
    for item in flexible:
        begin = 0
        while begin < items[item].numel:
            if ends[rank] == slot:
                rank += 1
                continue
            length = min(items[item].numel - begin, slot - ends[rank])
            entries.append(Entry(item, rank, begin, begin + length, ends[rank]))
            begin, ends[rank] = begin + length, ends[rank] + length
    return sorted(entries, key=lambda entry: (entry.rank, entry.offset))


def item_of(shape: Sequence[int], *, has_matrices: bool, is_stack: bool) -> Item:
    """The item of a parameter: matrices (out, in), or (E, out, in) for a stack; other shapes are elementwise."""
    numel = math.prod(shape)
    if not has_matrices or numel == 0:
        return Item(numel)
    if is_stack:
        return Item(numel, shape[0], shape[1], math.prod(shape[2:]))
    return Item(numel, 1, shape[0], math.prod(shape[1:]))
