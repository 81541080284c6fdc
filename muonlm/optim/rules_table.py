"""What was decided, as text: rules.txt of a run directory."""

from __future__ import annotations

from collections.abc import Sequence

from muonlm.optim.pieces import Split
from muonlm.optim.plan import Plan
from muonlm.optim.rules import ParamRule, groups_of

_HEADER = ("parameter", "shape", "role", "rule", "group", "lr", "decay", "split")
_RIGHT = ("shape", "lr", "decay")


def rules_table(rules: Sequence[ParamRule], *plans: Plan) -> str:
    """The rules, one parameter a line, totals by group, and the exchange plans, one matrix a line."""
    rows = [_HEADER, *(_row(rule) for rule in rules)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for name, cell, width in zip(_HEADER, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    groups = groups_of(rules)
    lines += [_group_line(name, members) for name, members in groups.items()]
    by_rule = {name: [rule for rule in rules if rule.rule == name] for name in ("muon", "adamw")}
    parts = "; ".join(f"{name} {_count(members)}" for name, members in by_rule.items() if members)
    lines.append(f"total: {_count(rules)}; {parts}")
    return "\n".join(lines + [line for plan in plans if plan.pieces for line in _plan_lines(plan)])


def rules_summary(table: str) -> str:
    """Of the text of `rules_table`, what says how parameters are trained: a line a group, totals, plans by title."""
    return "\n".join(line for line in table.splitlines() if line.startswith(("group ", "total: ", "exchange plan: ")))


def split_text(split: Split | None) -> str:
    """A split in one word: 64+32+32; 4x(16+8+8) in groups, `each` with matrices of their own; `of columns`."""
    if split is None:
        return "-"
    text = "+".join(map(str, split.sizes))
    if split.groups > 1:
        text = f"{split.groups}x({text})" + (" each" if split.separate_groups else "")
    return text + (" of columns" if split.dim else "")


def _row(rule: ParamRule) -> tuple[str, ...]:
    return (
        rule.name,
        "x".join(map(str, rule.shape)),
        rule.role or "other",
        rule.rule,
        rule.group,
        f"{rule.lr:.2g}",
        f"{rule.weight_decay:.2g}",
        split_text(rule.split),
    )


def _group_line(name: str, members: Sequence[ParamRule]) -> str:
    of_all = members[0]  # members of a group agree in what is shown
    return f"group {name}: {_count(members)}, {of_all.rule}, lr {of_all.lr:.2g}, decay {of_all.weight_decay:.2g}"


def _count(rules: Sequence[ParamRule]) -> str:
    return f"{len(rules)} parameter{'s' if len(rules) > 1 else ''}, {sum(rule.numel for rule in rules):,} elements"


def _plan_lines(plan: Plan) -> list[str]:
    loads = plan.assignment.loads_flops
    ranks = f"{plan.num_ranks} rank" + ("s" if plan.num_ranks > 1 else "")
    rounds = f"{plan.num_rounds} round" + ("s" if plan.num_rounds > 1 else "")
    return [
        "",
        f"exchange plan: {len(plan.pieces)} matrices on {ranks} in {rounds}; Newton-Schulz "
        f"{sum(loads):,} FLOPs a step, largest load / mean {plan.assignment.imbalance:.3f}",
        *plan.lines(),
    ]
