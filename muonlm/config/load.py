"""From a config name to a validated config: TOML files that extend each other, then overrides, then the schema.

A name is the path of a TOML file, or the name of one in the checkout's `configs/<kind>/`, or in the wheel's.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo

import muonlm
from muonlm.config import fields, messages
from muonlm.config.compare import CompareConfig
from muonlm.config.data import PrepareConfig
from muonlm.config.errors import ConfigError
from muonlm.config.layers import Keys, Place, Raw, display, merge, positions, read_toml
from muonlm.config.schema import Section, TrainConfig

AnyConfig = TypeVar("AnyConfig", bound=Section)
COMMAND_LINE = Place("command line")
KINDS: dict[str, type[Section]] = {"train": TrainConfig, "compare": CompareConfig, "data": PrepareConfig}


def load_train(name_or_path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The train config of that name. Raises ConfigError that lists everything wrong with it."""
    return validate(TrainConfig, load_train_dict(name_or_path, overrides), name_or_path)


def load_prepare(name_or_path: str, overrides: Sequence[str] = ()) -> PrepareConfig:
    """The data config of that name. Raises ConfigError that lists everything wrong with it."""
    return validate(PrepareConfig, load_dict("data", name_or_path, overrides), name_or_path)


def load_compare(name_or_path: str, overrides: Sequence[str] = ()) -> CompareConfig:
    """The comparison of that name, with the train config of each arm checked too. Raises ConfigError."""
    raw = load_dict("compare", name_or_path, overrides)
    config = validate(CompareConfig, raw, name_or_path)
    base = _base_of(config, raw, name_or_path)
    for index, arm in enumerate(config.arms):
        trial = {"name": arm.name, "loop.tokens": min(arm.budgets_tokens or config.budgets_tokens)}
        changes: list[tuple[dict[str, Any], Keys]] = [(config.set, ("set",)), (arm.set, ("arms", index, "set"))]
        merged = apply_overrides(base, trial, place=raw.place(("budgets_tokens",)))
        for changed, keys in changes:
            upper = _nested(changed, lambda below, keys=keys: raw.place(keys + below))  # type: ignore[misc]
            merged = merge(TrainConfig, merged, upper)
        for key, rates in (("optim.lr", "lr"), ("optim.aux.lr", "aux_lr")):
            place = raw.place(("arms", index, rates))
            merged = apply_overrides(merged, {key: min(getattr(arm, rates))}, place=place)
        validate(TrainConfig, merged, f"{name_or_path}, arm {arm.name!r}")
    return config


def _base_of(config: CompareConfig, raw: Raw, origin: str) -> Raw:
    try:
        return load_train_dict(config.base)
    except ConfigError as error:
        place = raw.place(("base",)) or origin
        raise ConfigError(f"{place}: base = {fields.toml_value(config.base)}\n{error}") from error


def load_train_dict(name_or_path: str, overrides: Sequence[str] = ()) -> Raw:
    """The merged tables of a train config before validation."""
    return load_dict("train", name_or_path, overrides)


def load_dict(kind: str, name_or_path: str, overrides: Sequence[str] = ()) -> Raw:
    """The merged tables of a config of that kind ("train", "compare" or "data") before validation."""
    raw = _read(kind, find(kind, name_or_path), ())
    return merge(KINDS[kind], raw, parse_overrides(KINDS[kind], overrides))


def validate(model: type[AnyConfig], raw: dict[str, Any], origin: str) -> AnyConfig:
    """The typed config. Raises ConfigError with place, key, value and advice for everything that is wrong.

    `origin` names the whole in the message, and stands for the place of values that have no other.
    """
    raw = raw if isinstance(raw, Raw) else Raw(raw)
    try:
        return model.model_validate(_with_default_kinds(model, raw))
    except ValidationError as error:
        raise ConfigError(messages.describe(model, error, raw, origin)) from None


def apply_overrides(
    raw: dict[str, Any],
    dotted: dict[str, Any],
    *,
    model: type[Section] = TrainConfig,
    place: Place | None = None,
) -> Raw:
    """A copy with the values of `dotted` set ({"optim.lr": 0.01}, nested tables too); None unsets a key.

    A new `kind` or alternative drops what does not go with it (see `layers.merge`).
    """
    return merge(model, raw if isinstance(raw, Raw) else Raw(raw), _nested(dotted, lambda _: place))


def dump_toml(config: Section) -> str:
    """The config as TOML that loads to an equal config; unset keys are left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def available(kind: str) -> dict[str, Path]:
    """Name -> file of the configs that come with muonlm; a checkout's hide those of the wheel."""
    package = Path(muonlm.__file__).resolve().parent
    folders = (package / "_configs" / kind, package.parent / "configs" / kind)
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def find(kind: str, name_or_path: str, folder: Path | None = None) -> Path:
    """The file that a name or a path (relative to `folder`) stands for. Raises ConfigError with the near names."""
    path = (folder or Path()) / name_or_path
    known = available(kind)
    is_path = path.suffix == ".toml" or "/" in name_or_path
    if is_path and path.is_file():
        return path
    if name_or_path in known:
        return known[name_or_path]
    if path.name and (with_suffix := path.with_name(f"{path.name}.toml")).is_file():
        return with_suffix
    shown = fields.toml_value(name_or_path)
    lead = f"{display(path)}: no such file" if is_path else f"no {kind} config is called {shown}"
    near = difflib.get_close_matches(Path(name_or_path).stem, known, n=1, cutoff=0.5)
    names = f"{kind} configs that come with muonlm: {', '.join(sorted(known)) or 'none'}"
    guess = f"\n  did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{lead}{guess}\n  {names}\n  or give the path of a TOML file")


def _read(kind: str, path: Path, trail: tuple[Path, ...]) -> Raw:
    """One file over the files that it extends; in `extends`, the later file wins over the earlier."""
    path = path.resolve()
    if path in trail:
        circle = " -> ".join(display(step) for step in (*trail[trail.index(path) :], path))
        raise ConfigError(f"{display(path)}: extends itself: {circle}")
    top = read_toml(path)
    place = top.place(("extends",))
    names = top.pop("extends", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'{place}: extends = {fields.toml_value(names)}\n      must be a list: extends = ["base"]')
    merged = Raw({})
    for name in names:
        try:
            below = find(kind, name, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{place}: extends = {fields.toml_value(names)}\n{error}") from error
        merged = merge(KINDS[kind], merged, _read(kind, below, (*trail, path)))
    return merge(KINDS[kind], merged, top)


def parse_overrides(model: type[Section], overrides: Sequence[str]) -> Raw:
    """`a.b=VALUE` arguments as one layer: a TOML value, a bare word as text, nothing after `=` to unset the key."""
    values: dict[str, Any] = {}
    wrong = []
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.strip() or not all(key.strip().split(".")):
            wrong.append(f"  command line: {text}\n      an override is key=value, as in loop.steps=100")
            continue
        try:
            values[key.strip()] = _value(value.strip(), _field(model, key.strip().split(".")))
        except tomllib.TOMLDecodeError as error:
            wrong.append(f"  command line: {text}\n      not a TOML value: {error}")
    if wrong:
        raise ConfigError("\n".join(wrong).strip())
    return _nested(values, lambda _: COMMAND_LINE)


def _value(text: str, info: FieldInfo | None) -> Any:
    if not text:
        return None if info is not None else ""  # unsets the key; one that is not known stays, and is refused
    is_text = info is not None and not fields.classes(info) and fields.base_text(info.annotation) == "text"
    if is_text and text[0] not in "\"'":
        return text  # a name such as 2026-01-31 or 124 is a date or a number only where one is wanted
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        if text[0] in "\"'[{":
            raise
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _field(model: type[Section], names: list[str]) -> FieldInfo | None:
    """The field at a dotted key, in whichever variant has it; None for an unknown key."""
    candidates = [model]
    found: list[FieldInfo] = []
    for name in names:
        found = [cls.model_fields[name] for cls in candidates if name in cls.model_fields]
        candidates = [cls for info in found for cls in fields.classes(info)]
    return found[0] if found else None


def _nested(dotted: dict[str, Any], place_of: Callable[[Keys], Place | None]) -> Raw:
    """Dotted keys as nested tables. Raises ConfigError where one key is both a value and a table."""
    top = Raw({})
    for key, value in dotted.items():
        parts = tuple(key.split("."))
        inner = _nested(value, lambda keys, key=key: place_of((key, *keys))) if isinstance(value, dict) else value  # type: ignore[misc]
        table: dict[str, Any] = top
        for part in parts[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{key}: {part} is given both a value and keys below it")
        old = table.get(parts[-1])
        if isinstance(old, dict) and isinstance(inner, dict):
            old.update(inner)
        else:
            table[parts[-1]] = dict(inner) if isinstance(inner, dict) else inner
        place = place_of((key,))
        below = [] if isinstance(value, dict) else list(positions(value))
        if isinstance(inner, Raw):
            top.places.update({parts + keys: found for keys, found in inner.places.items()})
        for keys in [(), *below]:
            if place is not None:
                top.places[parts + keys] = place
    return top


def _with_default_kinds(model: type[Section], raw: dict[str, Any]) -> dict[str, Any]:
    """A table without `kind` is of the kind that the default has."""
    result = dict(raw)
    for name, info in model.model_fields.items():
        kind = fields.default_kind(info)
        if kind and isinstance(result.get(name), dict):
            result[name] = {"kind": kind, **result[name]}
    return result
