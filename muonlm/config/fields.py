"""Reading the schema: which tables and keys there are, and what a value of each may be, in a reader's words.

Error messages, `--help` and docs/config.md all take their words from here, so that they cannot disagree.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from muonlm.config.schema import NAME_PATTERN, Section

_PLURAL = {"whole number": "whole numbers", "number": "numbers", "text": "texts", "table": "tables"}
_PATTERNS = {NAME_PATTERN: "text of letters, digits, '.', '_' and '-' that starts with none of '.' and '-'"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Table:
    """One table of a config: where it stands, the `kind` values that select it (if any), and its model."""

    path: str
    model: type[Section]
    kinds: tuple[str, ...] = ()
    default_kind: str | None = None
    is_list: bool = False

    @property
    def description(self) -> str:
        """What the table is for."""
        return inspect.getdoc(self.model) or ""

    def entries(self) -> Iterator[tuple[str, FieldInfo]]:
        """Dotted name and field of every key that is a value and not a table of its own."""
        for name, info in self.model.model_fields.items():
            if not classes(info):
                yield f"{self.path}.{name}".lstrip("."), info


def tables(model: type[Section], path: str = "") -> Iterator[Table]:
    """All tables of a config, outermost first; one entry for each variant of a table that has kinds."""
    yield Table(path, model)
    yield from _tables_below(model, path, set())


def _tables_below(model: type[Section], path: str, seen: set[tuple[str, type[Section]]]) -> Iterator[Table]:
    for name, info in model.model_fields.items():
        below = f"{path}.{name}".lstrip(".")
        by_kind = variants(info)
        found = [cls for cls in classes(info) if (below, cls) not in seen]
        for cls in found:
            kinds = tuple(kind for kind, variant in by_kind.items() if variant is cls)
            yield Table(below, cls, kinds, default_kind(info), get_origin(plain(info.annotation)) is list)
        # Variants share tables (optim.aux): what both have is listed once, after the variants themselves.
        for cls in found:
            seen.add((below, cls))
            yield from _tables_below(cls, below, seen)


def plain(annotation: Any) -> Any:
    """The type without `| None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [arg for arg in get_args(annotation) if arg is not types.NoneType]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def classes(info: FieldInfo) -> list[type[Section]]:
    """The models a field may hold, alone, as a variant or in a list; empty where it holds a plain value."""
    kind = plain(info.annotation)
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [part for part in parts if inspect.isclass(part) and issubclass(part, Section)]


def variants(info: FieldInfo) -> dict[str, type[Section]]:
    """`kind` value -> model, for a field that has kinds; else empty."""
    if info.discriminator is None:
        return {}
    return {kind: cls for cls in classes(info) for kind in get_args(cls.model_fields["kind"].annotation)}


def default_kind(info: FieldInfo) -> str | None:
    """The `kind` of the field's default value, None where there is none."""
    return getattr(info.default, "kind", None) if info.discriminator is not None else None


def unit(info: FieldInfo) -> str:
    """Unit of a field, or an empty string."""
    extra = info.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def default_text(info: FieldInfo) -> str | None:
    """The default as TOML, "unset" for None, and None for a required field."""
    if info.default is PydanticUndefined or info.default is ...:
        return None
    return "unset" if info.default is None else toml_value(info.default)


def type_text(info: FieldInfo) -> str:
    """What a right value is: type, bounds, allowed values."""
    bounds = {name: getattr(item, name) for item in info.metadata for name in _BOUNDS if hasattr(item, name)}
    pattern = next((item.pattern for item in info.metadata if getattr(item, "pattern", None)), None)
    base = _PATTERNS.get(pattern, f"text that matches {pattern}") if pattern else base_text(info.annotation)
    limits = " and ".join(f"{_BOUNDS[name]} {_number(value)}" for name, value in bounds.items())
    if any(getattr(item, "min_length", 0) for item in info.metadata) and not pattern:
        least = next(item.min_length for item in info.metadata if hasattr(item, "min_length"))
        limits = "not empty" if least == 1 else f"{least} entries or more"
    return f"{base}, {limits}" if limits else base


def base_text(annotation: Any) -> str:
    """The type alone, in words."""
    kind = plain(annotation)
    if get_origin(kind) is Literal:
        return either(get_args(kind))
    if get_origin(kind) is list:
        item = base_text(get_args(kind)[0])
        return f"list of {_PLURAL.get(item, item)}"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return names.get(kind, "table")


def item_type(info: FieldInfo) -> Any:
    """Type of the entries of a list field."""
    return get_args(plain(info.annotation))[0]


def either(values: tuple[Any, ...] | list[str]) -> str:
    """`"a", "b" or "c"`."""
    shown = [toml_value(value) for value in values]
    return f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]


def toml_value(value: Any, limit: int = 60) -> str:
    """A value as one would write it in TOML, on one line, cut to `limit` characters."""
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(toml_value(item) for item in value) + "]"
    elif isinstance(value, bool | str):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value)
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)
