"""The page of one training run."""

from __future__ import annotations

from muonlm.compare.progress import short_seconds, short_tokens
from muonlm.report import figures
from muonlm.report.page import Page, Picture, Section, Tile, Tone, Verdict
from muonlm.report.runs import Run
from muonlm.report.settings import environment_table, reproduce_block, toml_block

TONES: dict[str, Tone] = {"finished": "good", "failed": "bad", "preempted": "open", "running": "plain"}


def run_page(run: Run) -> Page:
    """Curves, settings and status of a run."""
    name = run.config.get("name", run.path.name)
    return Page(
        title=f"Training run {name}",
        verdicts=[_status(run)],
        tiles=_tiles(run),
        sections=[_curves(run), _norms(run), _settings(run)],
        footer=f"Made by muonlm from {run.path}.",
    )


def _status(run: Run) -> Verdict:
    status = run.status
    state = status.get("state", "unknown")
    loss = status.get("final_loss")
    headline = f"Validation loss {loss:.4f} nats per token" if loss is not None else f"The run is {state}."
    points = [f"Step {status.get('step', 0):,} of {status.get('num_steps', 0):,}."]
    if status.get("error"):
        points.append(f"Error: {status['error']}")
    return Verdict(TONES.get(state, "plain"), state, headline, points)


def _tiles(run: Run) -> list[Tile]:
    tiles = [
        Tile("Tokens", short_tokens(run.status.get("tokens", 0)), "trained on"),
        Tile("Time", short_seconds(run.status.get("seconds") or 0), "training alone, all attempts"),
    ]
    finals = [r for r in run.records if r["kind"] == "eval" and r["final"]]
    if finals and finals[-1].get("bits_per_byte") is not None:
        tiles.insert(0, Tile("Bits per byte", f"{finals[-1]['bits_per_byte']:.3f}", "comparable across tokenizers"))
    for key, title, shown, note in (
        ("tokens_per_s", "Speed", "{:,.0f}", "tokens per second, median"),
        ("optimizer_share", "Optimizer", "{:.1%}", "share of a step, median"),
        ("mfu", "MFU", "{:.1%}", "of the device's peak, median"),
    ):
        if (value := run.typical(key)) is not None:
            tiles.append(Tile(title, shown.format(value), note))
    return tiles


def _curves(run: Run) -> Section:
    train = [(r["tokens"], r["loss"]) for r in run.train]
    by_tokens = {"training batches": [train], "validation": [[(t, loss) for t, _, loss in run.evals]]}
    rates = {
        group: [[(r["tokens"], r["lr"][group]) for r in run.train if group in r["lr"]]]
        for group in (run.train[0]["lr"] if run.train else {})
    }
    pictures = [
        Picture(
            "loss", "Loss against tokens", "The validation loss is on the same held-out sequences every time.",
            "Training and validation loss against training tokens",
            figures.curves(by_tokens, "training tokens", "loss (nats per token)", crop=True, as_tokens=True),
        ),
        Picture(
            "learning_rate", "Learning rates", "", "Learning rate of each parameter group against training tokens",
            figures.curves(rates, "training tokens", "learning rate", as_tokens=True),
        ),
    ]  # fmt: skip
    return Section("Curves", figures=pictures if run.train else [])


def _norms(run: Run) -> Section:
    pictures = []
    for key, title, caption in (
        ("grad_norms", "Gradient norms", "L2 norm of each parameter group, before clipping."),
        ("update_rms", "Size of the updates", "Root mean square of a step's change, by parameter group."),
    ):
        groups = run.train[0].get(key, {}) if run.train else {}
        data = {g: [[(r["tokens"], r[key][g]) for r in run.train if g in r.get(key, {})]] for g in groups}
        if data:
            figure = figures.curves(data, "training tokens", title.lower(), as_tokens=True)
            pictures.append(Picture(key, title, caption, f"{title} against training tokens", figure))
    return Section("Gradients and updates", figures=pictures)


def _settings(run: Run) -> Section:
    return Section(
        "Settings",
        tables=[environment_table(run.environment, run.config.get("data", {}).get("path"))],
        blocks=[toml_block("Configuration", run.config), reproduce_block("train", run.path)],
    )
