"""The result of a comparison in plain words: what was shown, or why nothing was.

"Reproduced" means that the low end of the interval of the token ratio lies above 1 and that nothing makes the ratio
doubtful. Where something does, the verdict is open (None) and says what to change; it is False only where the runs
themselves speak against a saving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muonlm.compare.progress import short_tokens
from muonlm.compare.ratio import MAX_BUDGET_STEP
from muonlm.config.errors import UserError
from muonlm.config.schema import TrainConfig


def decide(
    ratios: Sequence[Mapping[str, Any]], arms: Sequence[Mapping[str, Any]], reference: str, scope: str
) -> dict[str, Any]:
    """The `verdict` of compare.json: text, reproduced, and per arm its label, headline, doubts, remarks.

    `ratios` and `arms` are those of compare.json; `scope` is the sentence about the size of the experiment.
    """
    by_name = {arm["name"]: arm for arm in arms}
    parts = [
        _arm_verdict(entry, by_name[entry["arm"]], by_name[reference])
        for entry in ratios
        if entry["method"] == "budget"
    ]
    answers = {part["reproduced"] for part in parts}
    reproduced = answers.pop() if len(answers) == 1 else False if False in answers else None
    text = " ".join(" ".join([f"{p['label']}.", p["headline"], *p["doubts"], *p["remarks"]]) for p in parts)
    return {"text": f"{text} {scope}".strip(), "reproduced": reproduced, "arms": parts, "scope": scope}


def _arm_verdict(entry: Mapping[str, Any], arm: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    doubts = [*_edges(arm), *_edges(reference), *_gaps(entry), *_unknown(entry)]
    low, high = entry["low"], entry["high"]
    reproduced = None if doubts or low is None else bool(low > 1)
    return {
        "arm": arm["name"],
        "reproduced": reproduced,
        "label": _label(entry, reproduced),
        "headline": _headline(entry, arm["name"], reference["name"], is_doubtful=bool(doubts)),
        "doubts": doubts,
        "remarks": [] if high is None else _remarks(entry, arm["name"], reference["name"]),
    }


def _label(entry: Mapping[str, Any], reproduced: bool | None) -> str:
    if reproduced is None:
        return "Not decided"
    if reproduced:
        return "Token saving shown"
    return "More tokens needed, not fewer" if entry["high"] < 1 else "No token saving shown"


def _headline(entry: Mapping[str, Any], arm: str, reference: str, *, is_doubtful: bool) -> str:
    mean, low, high = entry["mean"], entry["low"], entry["high"]
    if mean is None:
        bound = entry.get("bound")
        known = f"; all that is known is a mean over seeds {bound['sign']} {bound['value']:.2f}" if bound else ""
        return f"The token ratio of {reference} to {arm} could not be measured{known}."
    if is_doubtful:
        spread = f" ({low:.2f} to {high:.2f})" if low is not None else ""
        return f"Measured {mean:.2f} times the tokens of {arm} for {reference}{spread}; do not rely on it yet."
    needs = f"For the same loss {reference} needs {mean:.2f} times the tokens of {arm}"
    if low is None:
        return f"{needs}, by one seed."
    includes = "; the interval includes 1" if low <= 1 <= high else ""
    return f"{needs} (95% interval {low:.2f} to {high:.2f}, {entry['num_seeds']} seeds{includes})."


def _edges(arm: Mapping[str, Any]) -> list[str]:
    best = arm.get("best")
    if not best:
        return []
    doubts = []
    for key in ("lr", "aux_lr"):
        grid = arm[key]
        if best[f"{key}_is_interior"]:
            continue
        if len(grid) == 1:
            doubts.append(f"{key} of {arm['name']} was not tuned: only {grid[0]:g} was tried.")
            continue
        extreme, way = ("lowest", "downwards") if best[key] == grid[0] else ("highest", "upwards")
        doubts.append(
            f"The best {key} of {arm['name']} is the {extreme} that was tried ({best[key]:g}): the optimum lies at the "
            f"edge of the grid; extend it {way} before believing the ratio."
        )
    return doubts


def _gaps(entry: Mapping[str, Any]) -> list[str]:
    """Interpolating a convex curve overstates its loss: harmless on the arm's curve, flattering on the reference's."""
    wide = [
        s["gap"]
        for s in entry["per_seed"]
        if s["interpolated"] == "reference" and (s["gap"] or 0) > MAX_BUDGET_STEP * 1.01
    ]
    if not wide or (entry["high"] or 0) < 1:
        return []
    return [
        f"The reference was interpolated between budgets {max(wide):.2f} times apart, which inflates the ratio; "
        f"add budgets in between (at most {MAX_BUDGET_STEP:.2f} times apart)."
    ]


def _unknown(entry: Mapping[str, Any]) -> list[str]:
    doubts = []
    for sign, advice in (
        (">", f"the smallest run of {entry['arm']} is already better than the reference: give it a smaller budget"),
        ("<", f"the reference's smallest run is already better than any of {entry['arm']}: give it a smaller budget"),
    ):
        seeds = [s for s in entry["per_seed"] if s["censored"] == sign]
        if seeds:
            names = ", ".join(f"seed {s['seed']} {sign} {s['bound']:.2f}" for s in seeds)
            doubts.append(f"Outside of what was measured ({names}): {advice}.")
    doubts += [f"Seed {s['seed']}: {s['note']}." for s in entry["per_seed"] if s["note"]]
    if entry["num_seeds"] == 1:
        doubts.append("One seed gives no interval; run at least two, better five.")
    return doubts


def _remarks(entry: Mapping[str, Any], arm: str, reference: str) -> list[str]:
    remarks = []
    clock = entry["wall_clock"]
    if clock["mean"] is not None:
        interval = f" ({clock['low']:.2f} to {clock['high']:.2f})" if clock["low"] is not None else ""
        remarks.append(
            f"In training time on this machine, {reference} takes {clock['mean']:.2f} times as long as {arm}{interval}."
        )
    wide = [
        s["gap"] for s in entry["per_seed"] if s["interpolated"] == "arm" and (s["gap"] or 0) > MAX_BUDGET_STEP * 1.01
    ]
    if wide:
        remarks.append(
            f"The budgets of {arm} around the crossing are {max(wide):.2f} times apart (better at most "
            f"{MAX_BUDGET_STEP:.2f}): the ratio is understated, because straight lines lie above a convex curve."
        )
    return remarks


def scope_of(config: TrainConfig, tokens: int) -> str:
    """One sentence on model size, tokens and corpus, and that nothing follows for larger ones."""
    corpus, vocab_size = Path(config.data.path).name, config.model.vocab_size
    try:
        from muonlm.data.manifest import read_manifest

        manifest = read_manifest(Path(config.data.path))
        vocab_size = manifest.vocab_size
        corpus = str(manifest.source.get("name") or manifest.source.get("kind") or corpus)
    except UserError:
        pass  # the data may lie on another machine by now
    size = f"{config.model.num_layers} layers of width {config.model.hidden_size}"
    if vocab_size:
        from muonlm.model.flops import count_parameters

        counts = count_parameters(config.model, vocab_size)
        size = f"{short_tokens(counts['total'])} parameters ({short_tokens(counts['hidden'])} in hidden matrices)"
    return (
        f"This holds for a model of {size}, up to {short_tokens(tokens)} training tokens of {corpus}, "
        "one batch size and these settings. Nothing follows for larger models, longer runs or other data."
    )
