"""Every option in words, from the schema: `--help` of the commands, and docs/config.md.

`python -m muonlm.config.help > docs/config.md` renews the page.
"""

from __future__ import annotations

import textwrap

from pydantic.fields import FieldInfo

from muonlm.config import fields
from muonlm.config.compare import CompareConfig
from muonlm.config.data import PrepareConfig
from muonlm.config.fields import Table
from muonlm.config.schema import Section, TrainConfig

WIDTH = 100


def reference(model: type[Section]) -> str:
    """All keys of a config as plain text of at most 100 columns: default, type, unit, description by table."""
    return "\n".join(_table_text(table) for table in fields.tables(model) if list(table.entries()))


def _table_text(table: Table) -> str:
    lines = [_title(table)]
    lines += [_wrap(paragraph, 2) for paragraph in table.description.split("\n\n")]
    for name, info in table.entries():
        left = f"  {name} {_default(table, name, info)}"
        right = fields.type_text(info) + (f" [{fields.unit(info)}]" if fields.unit(info) else "")
        if len(left) < 46 and len(right) < WIDTH - 48:
            lines.append(f"{left:<46}  {right}")
        else:
            lines += [left, _wrap(right, 48)]
        lines.append(_wrap(info.description or "", 6))
    return "\n".join(lines) + "\n"


def _title(table: Table) -> str:
    if not table.path:
        return "Top level"
    name = f"[[{table.path}]]" if table.is_list else f"[{table.path}]"
    if not table.kinds:
        return name
    kinds = fields.either(table.kinds)
    return f"{name} with kind = {kinds}{', the default' if table.default_kind in table.kinds else ''}"


def _default(table: Table, name: str, info: FieldInfo) -> str:
    # Where kinds compete and none is the default, `kind` has to be given although a variant alone knows its own.
    chooses = name.endswith(".kind") and table.kinds and table.default_kind is None
    default = None if chooses else fields.default_text(info)
    if default is None:
        return "(required)"
    return "(unset)" if default == "unset" else f"= {default}"


def _wrap(text: str, indent: int) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


_INTRODUCTION = """\
# Configuration

This page is generated from the schema (`python -m muonlm.config.help > docs/config.md`). The same text is in
`muonlm train --help`, `muonlm compare --help` and `muonlm data prepare --help`.

A config is a TOML file. A command takes the path of one, or the name of one in `configs/train/`,
`configs/compare/` or `configs/data/`, which come with the package.

- **Extending.** `extends = ["smoke"]` at the top of a file takes over the values of other configs, given by name or
  by path relative to the file. Tables are merged key by key; of two files, the later one wins, and the file itself
  wins over all that it extends.
- **Overrides.** `key=value` arguments win over files: `muonlm train smoke optim.lr=0.01 loop.steps=100`. A value is
  written as in TOML; a bare word is text (`optim.kind=adamw`); nothing after the `=` unsets a key (`loop.steps=`).
- **Kinds.** Some tables have a `kind` that decides which other keys they have. When a file or an override changes
  the kind, keys that the new kind does not have are no longer taken over from below. Without `kind`, the default one
  counts.
- **Alternatives.** `loop.tokens` and `loop.steps` exclude each other; setting one drops the other from below.
- **Errors.** Everything that is wrong is reported at once, with file and line, and exit code 2.
- `--dry-run` prints the whole config after all of this, as TOML that loads to the same config.
"""

_PAGES: list[tuple[str, str, type[Section]]] = [
    ("Train config", "`muonlm train CONFIG`, `muonlm plan CONFIG`", TrainConfig),
    ("Compare config", "`muonlm compare CONFIG`", CompareConfig),
    ("Data config", "`muonlm data prepare CONFIG`, and `data.prepare` of a train config", PrepareConfig),
]


def markdown() -> str:
    """docs/config.md."""
    parts = [_INTRODUCTION]
    for title, use, model in _PAGES:
        parts.append(f"## {title}\n\nFor {use}.\n")
        parts += [_table_markdown(table) for table in fields.tables(model) if list(table.entries())]
    return "\n".join(parts)


def _table_markdown(table: Table) -> str:
    title = _title(table) if not table.path else f"`{_title(table)}`"
    lines = [f"### {title}\n", table.description, ""]
    lines += ["| key | default | type | unit | meaning |", "|---|---|---|---|---|"]
    for name, info in table.entries():
        cells = [
            f"`{name}`",
            _default(table, name, info).removeprefix("= "),
            fields.type_text(info),
            fields.unit(info),
            info.description or "",
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
