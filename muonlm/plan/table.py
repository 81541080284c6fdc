"""A forecast as tables on the terminal. Imports no torch."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from muonlm.plan.forecast import Forecast
from muonlm.plan.memory import PHASES


def render(plan: Forecast, width: int = 120) -> str:
    """The forecast as text, in powers of 1000 with units."""
    console = Console(width=width, record=True, file=StringIO(), highlight=False, color_system=None)
    console.print(_title(plan))
    sections = {
        "Parameters": _parameters(plan),
        "Memory of a rank, where it may be largest": _memory(plan),
        "Sent by a rank in a step": _traffic(plan),
        "Work of a step": _work(plan),
        "Predicted time of a step, not measured": _time(plan),
    }
    for title, table in sections.items():
        console.print(Text(f"\n{title}"))
        console.print(table)
    console.print(_verdict(plan))
    return "\n".join(line.rstrip() for line in console.export_text().rstrip().splitlines())


def _title(plan: Forecast) -> str:
    machines = plan.machines
    axes = " x ".join(f"{size} {axis}" for axis, size in plan.grid.items() if size > 1 and axis != "expert") or "1 rank"
    experts = f"experts over {plan.grid['expert']}" if plan.grid["expert"] > 1 else ""
    nodes = -(-plan.world_size // machines.per_node)
    where = f"{plan.world_size:,} x {machines.name}" + (f" in {nodes:,} nodes" if nodes > 1 else "")
    engines = {"none": "", "ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "fsdp": "FSDP2"}
    return f"{plan.config.name} on {where}: {', '.join(part for part in (axes, engines[plan.engine], experts) if part)}"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _parameters(plan: Forecast) -> Table:
    table = _table(*(name for name, count in plan.parameters.items() if count))
    for column in table.columns:
        column.justify = "right"
    table.add_row(*(scaled(count) for count in plan.parameters.values() if count))
    return table


def _memory(plan: Forecast) -> Table:
    table = _table("", *PHASES)
    for name, sizes in plan.memory.rows.items():
        if any(sizes):
            table.add_row(name, *(scaled(size, "B") if size else "" for size in sizes))
    table.add_row("together", *(scaled(size, "B") for size in plan.memory.phases.values()))
    return table


def _traffic(plan: Forecast) -> Table:
    per_node = plan.machines.per_node
    table = _table("", "collective", "calls", "ranks", "in the node", "between nodes")
    for t in plan.sent:
        between = t.between_nodes(per_node)
        table.add_row(
            f"{t.phase}: {t.what}",
            *(t.collective, f"{t.calls:,}", f"{t.size:,}", scaled(t.num_bytes - between, "B"), scaled(between, "B")),
        )
    if not plan.sent:
        table.add_row("nothing")
    rows = {"together": None, "AdamW would send": False} if plan.sent else {}
    for name, muons in rows.items():
        total, between = plan.sent_bytes(muons=muons), plan.sent_bytes(muons=muons, between_nodes=True)
        table.add_row(name, "", "", "", scaled(total - between, "B"), scaled(between, "B"))
    return table


def _work(plan: Forecast) -> Table:
    owners, flops = plan.owners, plan.flops
    table = _table("", "all ranks", "a rank")
    rows = (("model, forward and backward", flops.model), ("recomputed by checkpointing", flops.recomputed))
    for name, value in rows:
        if value:
            table.add_row(name, scaled(value, "FLOP"), scaled(value / plan.world_size, "FLOP"))
    if owners.num_matrices:
        share = flops.newton_schulz / flops.model
        table.add_row(
            f"Newton-Schulz (+{share:.2%})", scaled(flops.newton_schulz, "FLOP"), scaled(owners.flops_mean, "FLOP")
        )
        table.add_row("  on the rank with most", "", scaled(owners.flops_max, "FLOP"))
        shared = f", {owners.num_shared:,} shared by several ranks" if owners.num_shared else ""
        table.add_row(f"  balance: largest / mean load {owners.imbalance:.3f}")
        table.add_row(f"  matrices: {owners.num_matrices:,}{shared}; rounds: {owners.num_rounds}")
    return table


def _time(plan: Forecast) -> Table:
    time = plan.time
    table = _table("", "seconds", "share")
    for name, seconds in {**time.rows, "together": time.total}.items():
        if seconds:
            table.add_row(name, f"{seconds:.3g}", f"{seconds / time.total:.1%}")
    return table


def _verdict(plan: Forecast) -> Text:
    machines, device = plan.machines, plan.machines.device
    lines = [
        f"assumed: products at {machines.matmul_share:.0%} of {scaled(device.peak_flops, 'FLOP/s')}, Newton-Schulz at "
        f"{machines.newton_schulz_share:.0%}, links at {machines.link_share:.0%} of "
        f"{scaled(device.node_bandwidth, 'B/s')} in a node and {scaled(machines.network_bandwidth, 'B/s')} between",
        "",
        f"model FLOP utilisation {plan.time.mfu:.1%}, Muon's share of a step {plan.time.muon_share:.2%} (predicted)",
        f"{plan.steps:,} steps, {scaled(plan.tokens)} tokens: {_days(plan.days)}, {plan.rank_hours:,.4g} "
        f"{'GPU' if device.kind == 'cuda' else 'rank'}-hours (predicted, without evaluations and checkpoints)",
        _batch(plan),
    ]
    if device.memory_bytes:
        share, there = f"{machines.usable_share:.0%}", scaled(device.memory_bytes, "B")
        whose = f"{share} of a rank's part of what this machine has left" if machines.is_here else f"{share} of {there}"
        lines.append(f"memory {scaled(plan.memory.peak, 'B')} of {scaled(machines.usable_bytes, 'B')} ({whose})")
    lines += [f"does not fit: {plan.misfit}"] if plan.misfit else [plan.advice] if plan.advice else []
    return Text("\n".join(lines))


def _batch(plan: Forecast) -> str:
    """What a rank computes in a step, and how much of it would fit at once."""
    share = plan.micro_batch * plan.micro_steps
    batches = f"{plan.micro_steps:,} micro-batch{'es' if plan.micro_steps > 1 else ''} of {plan.micro_batch:,}"
    text = f"a rank has {share:,} of a step's {plan.config.loop.batch_size:,} sequences, in {batches}"
    if not plan.machines.usable_bytes:
        return text
    largest = plan.largest_micro_batch
    fits = "none" if largest is None else f"{largest:,}" + (", all that it has" if largest == share else "")
    return f"{text}; largest micro-batch that fits: {fits}"


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:,.3g} days"
    hours = 24 * days
    return f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes"


def scaled(value: float, unit: str = "") -> str:
    """`value` with three or four digits and a prefix: 1.234 GB."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.95 or prefix == "E":
            return f"{value:.4g} {prefix}{unit}".rstrip()
        value /= 1000
    raise AssertionError
