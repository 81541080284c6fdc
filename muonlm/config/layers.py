"""Layers of raw configuration: read from TOML with the line of every key, merged by the rules of the schema."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from muonlm.config.errors import ConfigError
from muonlm.config.fields import classes, default_kind, variants
from muonlm.config.schema import Section

Keys = tuple[str | int, ...]
"""Position of a value: ("arms", 0, "lr")."""


class Place(NamedTuple):
    """Where a value was written: a file with a line, or the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


class Raw(dict[str, Any]):
    """Nested tables not yet validated, with the place where each value was written."""

    def __init__(self, values: dict[str, Any], places: dict[Keys, Place] | None = None) -> None:
        super().__init__(values)
        self.places: dict[Keys, Place] = places if places is not None else dict(getattr(values, "places", {}))

    def place(self, keys: Keys) -> Place | None:
        """Where the value at `keys`, or the nearest table around it, was written."""
        return next((self.places[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.places), None)


def read_toml(path: Path) -> Raw:
    """The tables of a TOML file. Raises ConfigError with file and line where it is not TOML."""
    shown = display(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: not UTF-8 text (byte {error.start}); a config is a TOML file") from error
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_error(shown, text, str(error))) from error
    return Raw(values, {keys: Place(shown, line) for keys, line in key_lines(text).items()})


def display(path: Path) -> str:
    """The path relative to the working directory where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def key_lines(text: str) -> dict[Keys, int]:
    """Line of every key of a valid TOML text, by parsing one statement at a time."""
    lines: dict[Keys, int] = {}
    table: Keys = ()
    last: dict[Keys, int] = {}
    chunk, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        start = start if chunk else number
        chunk += line + "\n"
        try:
            parsed = tomllib.loads(chunk)
        except tomllib.TOMLDecodeError:
            continue  # a string, list or table that goes on in the next line
        if chunk.lstrip().startswith("["):
            table = _header(parsed, last)
            lines.setdefault(table, start)
            if isinstance(table[-1], int):
                lines.setdefault(table[:-1], start)
        else:
            for keys in positions(parsed):
                lines.setdefault(table + keys, start)
        chunk = ""
    return lines


def _header(parsed: dict[str, Any], last: dict[Keys, int]) -> Keys:
    """Position that a `[table]` or `[[list of tables]]` header opens; `last` holds the last index of each list."""
    keys: Keys = ()
    rest: Any = parsed
    while isinstance(rest, dict) and rest:
        (name,) = rest
        rest = rest[name]
        keys += (name,)
        if isinstance(rest, list):
            last[keys] = last.get(keys, -1) + 1
        if keys in last:
            keys += (last[keys],)
    return keys


def positions(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """Position of everything inside nested tables and lists."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, item in items:
        yield (*keys, key)
        yield from positions(item, (*keys, key))


def merge(model: type[Section], lower: Raw, upper: Raw) -> Raw:
    """`upper` over `lower`, table by table. A None in `upper` unsets a key. Neither input is changed.

    Where `upper` switches the `kind` of a table, keys of `lower` that the new kind does not have are dropped;
    where it sets one of a table's alternatives (`loop.steps` for `loop.tokens`), the others are.
    """
    return Raw(_merge(model, lower, upper), {**lower.places, **upper.places})


def _merge(model: type[Section] | None, lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    given = [name for name in (model.alternatives if model else ()) if upper.get(name) is not None]
    dropped = {name for name in model.alternatives if name not in given} if model and given else set()
    merged = {key: value for key, value in lower.items() if key not in dropped}
    for key, value in upper.items():
        info = model.model_fields.get(key) if model else None
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = _merge_table(info, below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _merge_table(info: FieldInfo | None, lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    by_kind = variants(info) if info else {}
    if not by_kind:
        models = classes(info) if info else []
        return _merge(models[0] if models else None, lower, upper)
    old = lower.get("kind", default_kind(info) if info else None)
    new = upper.get("kind", old)
    model = by_kind.get(new) if isinstance(new, str) else None
    if model and new != old:
        lower = {key: value for key, value in lower.items() if key in model.model_fields}
    return _merge(model, lower, upper)


_SYNTAX = {
    "Invalid value": 'a value is a number, true or false, "text" in quotes, a [list] or a {table}',
    "Cannot overwrite a value": "this key is given twice",
    "Expected '=' after a key in a key/value pair": "a line is `key = value` or `[table]`",
    "Invalid statement": "a line is `key = value` or `[table]`",
}


def _syntax_error(shown: str, text: str, message: str) -> str:
    lines = text.split("\n")
    where = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    problem = message[: where.start()] if where else message
    twice = re.fullmatch(r"Cannot declare \((.*?),?\) twice", problem)
    if twice:
        names = re.findall("'([^']+)'", twice[1])
        problem = f"the table [{'.'.join(names)}] is opened twice"
    elif where and not where[1]:
        problem = "the file ends inside a value: a list, table or string is not closed"
    line = int(where[1]) if where and where[1] else max(len(text.rstrip("\n").split("\n")), 1)
    column = int(where[2]) if where and where[2] else len(lines[line - 1]) + 1
    return (
        f"{shown}:{line}: not valid TOML: {_SYNTAX.get(problem, problem[:1].lower() + problem[1:])}\n"
        f"    {lines[line - 1]}\n    {' ' * (column - 1)}^"
    )
