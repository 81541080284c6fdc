"""One message for all that is wrong with a config: place, key, value, and what would be right."""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from muonlm.config import fields
from muonlm.config.layers import Keys, Place, Raw
from muonlm.config.schema import Section


class Problem(NamedTuple):
    """Values (place, text) that are wrong together, and what to do about them."""

    values: list[tuple[Place, str]]
    advice: str


class Spot(NamedTuple):
    """What the schema says about one position: the position in the file, the table's model, field and kind."""

    keys: Keys
    model: type[Section]
    info: FieldInfo | None
    kind: str | None
    siblings: dict[str, type[Section]]


def describe(model: type[Section], error: ValidationError, raw: Raw, origin: str) -> str:
    """Everything that is wrong, in the order of the files, in one text."""
    problems = [_problem(model, item, raw, Place(origin)) for item in error.errors(include_url=False)]
    problems.sort(key=lambda problem: _order(problem.values[0][0], origin))
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{origin}: {count}"]
    for problem in problems:
        lines += [f"  {place}: {text}" for place, text in problem.values]
        lines += textwrap.wrap(problem.advice, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _order(place: Place, origin: str) -> tuple[bool, bool, str, int]:
    return (place.line is None and place.source != origin, place.source != origin, place.source, place.line or 0)


def _problem(model: type[Section], item: Any, raw: Raw, origin: Place) -> Problem:
    spot = locate(model, item["loc"])
    place = raw.place(spot.keys) or origin
    name, value = dotted(spot.keys), item["input"]
    match item["type"]:
        case "value_error":
            text = str(item["ctx"]["error"])
            return Problem(list(_named(spot.keys, text, raw)) or [(place, f"[{name}]" if name else "config")], text)
        case "missing":
            return Problem([(place, f"{name} is missing")], _wanted(spot.info, "give it: "))
        case "extra_forbidden":
            return Problem([(place, f"{name} = {fields.toml_value(value)}")], _unknown(model, spot))
        case "union_tag_not_found":
            kinds = fields.either(list(fields.variants(spot.info))) if spot.info else ""
            if not isinstance(value, dict):
                return Problem([(place, f"{name} = {fields.toml_value(value)}")], _table(name, kinds))
            return Problem([(place, f"{name}.kind is missing")], f"give it: {kinds}")
        case "union_tag_invalid":
            kind = value["kind"]
            place = raw.place((*spot.keys, "kind")) or origin
            kinds_known = list(fields.variants(spot.info)) if spot.info else []
            advice = f"must be {fields.either(kinds_known)}{_near(kind, kinds_known)}"
            return Problem([(place, f"{name}.kind = {fields.toml_value(kind)}")], advice)
        case _:
            return Problem([(place, f"{name} = {fields.toml_value(value)}")], _wrong(spot, name, value))


def locate(model: type[Section], loc: Keys) -> Spot:
    """Follow an error's location through the schema; the kind that stands in it is no key of the file."""
    keys: Keys = ()
    info: FieldInfo | None = None
    kind: str | None = None
    siblings: dict[str, type[Section]] = {}
    owner = model
    rest = list(loc)
    below: type[Section] | None = model
    while rest:
        key = rest.pop(0)
        keys += (key,)
        if isinstance(key, int) or below is None:
            continue
        owner, info = below, below.model_fields.get(key)
        found = fields.classes(info) if info else []
        below = found[0] if found else None
        by_kind = fields.variants(info) if info else {}
        if by_kind and rest:
            kind, siblings = str(rest.pop(0)), by_kind
            below = by_kind[kind]
        elif rest and below is not None and not isinstance(rest[0], int):
            kind, siblings = None, {}
    return Spot(keys, owner, info, kind, siblings)


def dotted(keys: Keys) -> str:
    """`arms[0].lr` for ("arms", 0, "lr")."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def _named(section: Keys, text: str, raw: Raw) -> Iterator[tuple[Place, str]]:
    """The values that a rule over several keys names in its text, where the user wrote them."""
    words = dict.fromkeys(word.rstrip(".") for word in re.findall(r"[a-z_][a-z_0-9.]*", text))
    for word in words:
        parts = tuple(word.split("."))
        for keys in (section + parts, parts):
            if keys in raw.places and (found := _value_at(raw, keys)) is not None:
                yield raw.places[keys], f"{dotted(keys)} = {fields.toml_value(found)}"
                break


def _value_at(value: Any, keys: Keys) -> Any:
    for key in keys:
        if isinstance(value, dict):
            value = value.get(str(key))
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return None
    return value


def _wanted(info: FieldInfo | None, lead: str = "must be ") -> str:
    if info is None:
        return f"{lead}a value"
    if fields.classes(info):
        return f"{lead}a table; {info.description}"
    return f"{lead}{_article(fields.type_text(info))}{_unit(info)}. {info.description}"


def _wrong(spot: Spot, name: str, value: Any) -> str:
    info = spot.info
    assert info is not None, "only unknown keys have no field, and they are handled before"
    if fields.classes(info) and not isinstance(value, list):
        return _table(name)
    in_list = isinstance(spot.keys[-1], int)
    wanted = fields.base_text(fields.item_type(info)) if in_list else fields.type_text(info)
    return f"must be {_article(wanted)}{_unit(info)}{_hint(wanted, value)}"


def _unit(info: FieldInfo) -> str:
    return f" [{fields.unit(info)}]" if fields.unit(info) else ""


def _article(wanted: str) -> str:
    return f"a {wanted}" if wanted.startswith(("whole", "number", "list", "table")) else wanted


def _table(name: str, kinds: str = "") -> str:
    header = f"[[{name.split('[')[0]}]]" if name.endswith("]") else f"[{name}]"
    return f"must be a table: write {header} and its keys below" + (f", with kind = {kinds}" if kinds else "")


def _hint(wanted: str, value: Any) -> str:
    """The likeliest slip behind a value of the wrong type."""
    if wanted.startswith("whole number") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "; inf and nan are not allowed"
    if isinstance(value, str):
        if wanted == "true or false" and value.lower() in ("true", "false"):
            return f"; write {value.lower()}"
        if "number" in wanted and re.fullmatch(r"[-+]?[\d_]*\.?\d+([eE][-+]?\d+)?", value):
            return f"; write {'0' if value.startswith('.') else ''}{value} without quotes"
        return _near(value, re.findall(r'"([^"]+)"', wanted))
    if wanted.startswith("text") and isinstance(value, int | float):
        return f'; write "{value}"'
    if wanted.startswith("list") and not isinstance(value, dict | list):
        return f"; write [{fields.toml_value(value)}]"
    return ""


def _near(word: Any, known: list[str]) -> str:
    found = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f'; did you mean "{found[0]}"?' if found else ""


def _unknown(model: type[Section], spot: Spot) -> str:
    """Advice for a key that its table does not have: of another kind, misspelt, in the wrong table, or unknown."""
    key, around = str(spot.keys[-1]), dotted(spot.keys[:-1])
    prefix = f"{around}." if around else ""
    owners = [kind for kind, cls in spot.siblings.items() if key in cls.model_fields]
    if owners:
        return f"belongs to {prefix}kind = {fields.either(owners)}; here it is {fields.toml_value(spot.kind)}"
    known = list(spot.model.model_fields)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"unknown key; did you mean {prefix}{close[0]}?"
    elsewhere = [name for table in fields.tables(model) for name, _ in table.entries() if name.split(".")[-1] == key]
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(dict.fromkeys(elsewhere))}?"
    said = rf"\b{re.escape(key.replace('_', ' '))}\b"  # learning_rate, of which the text of lr speaks
    described = [n for n, info in spot.model.model_fields.items() if re.search(said, info.description or "", re.I)]
    if len(described) == 1:
        return f"unknown key; did you mean {prefix}{described[0]}?"
    table = "the top level" if not around else around if around.endswith("]") else f"[{around}]"
    return f"unknown key; {table} has {', '.join(known)}"
