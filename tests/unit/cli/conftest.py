"""What the tests of the command line share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def put_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module with the given members in the place of the named one."""

    def put(name: str, **members: Callable[..., Any]) -> None:
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return put
