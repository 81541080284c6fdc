"""What every table of a configuration is made of. Imports no torch."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

# Names become directories, so that `..` and hidden ones are refused.
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"


class Section(BaseModel):
    """A frozen table that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    alternatives: ClassVar[tuple[str, ...]] = ()
    """Keys of which one at most is given: a layer that sets one of them drops the others of the layers below."""


def field(default: Any, description: str, *, unit: str = "", **bounds: Any) -> Any:
    """A documented field. Pass `...` for a required one."""
    extra: Any = {"unit": unit} if unit else None
    return Field(default, description=description, json_schema_extra=extra, **bounds)
