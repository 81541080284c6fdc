"""Which parameters the selectors of an override match. Imports no torch, so that a forecast can ask too."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from muonlm.config.optim import OverrideConfig, SplitConfig
from muonlm.optim.pieces import Split


def is_selected(
    override: OverrideConfig, *, names: Collection[str], role: str | None, classes: Collection[str]
) -> bool:
    """Whether all selectors given match a parameter.

    `names` are the whole dotted names that it has (a tied weight has several), `classes` the names of the classes that
    the modules holding it are instances of.
    """
    if override.roles is not None and role not in override.roles:
        return False
    if override.modules is not None and not set(override.modules) & set(classes):
        return False
    globs = override.names
    return globs is None or any(fnmatchcase(name, glob) for glob in globs for name in names)


def split_of(config: SplitConfig | None) -> Split | None:
    """A split as Muon takes it."""
    if config is None:
        return None
    return Split(tuple(config.sizes), config.groups, config.separate_groups, config.dim)
