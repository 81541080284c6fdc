"""Who may import whom: a room only from rooms in strictly lower rows, and from itself."""

from __future__ import annotations

import ast

import pytest

ROWS = [
    {"muonlm_kernels", "config"},
    {"dist", "track"},
    {"optim", "model", "data"},
    {"checkpoint", "plan", "bridge"},
    {"launch", "train"},
    {"compare", "study", "bench"},
    {"report"},
    {"cli"},
]
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
# `python -m muonlm` is the command line; `muonlm/__init__.py` is imported by all and so may import nothing.
ROW |= {"__main__": len(ROWS), "__init__": -1}


def room_of(module: str) -> str:
    """`muonlm.optim.rules` -> `optim`; the package `muonlm` itself -> `__init__`."""
    package, *rest = module.split(".")
    return package if package == "muonlm_kernels" else (rest or ["__init__"])[0]


def imported(module: str, tree: ast.Module) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of our own packages, wherever in the file it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*module.split(".")[: -node.level]] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from muonlm import optim` imports a room; `from muonlm import __version__` only the root.
            rooms = [alias.name for alias in node.names if alias.name in ROW] if source == "muonlm" else []
            names = [f"{source}.{room}" for room in rooms] or [source]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            names = [
                argument.value
                for argument in node.args[:1]
                if called in {"import_module", "__import__"} and isinstance(argument, ast.Constant)
            ]
        else:
            continue
        found += [(node.lineno, name) for name in names if name.split(".")[0] in {"muonlm", "muonlm_kernels"}]
    return found


def wrong_arrows(module: str, tree: ast.Module) -> list[str]:
    """Imports of `module` that go sideways or up."""
    here = room_of(module)
    return [
        f"{module}:{line} (row {ROW[here]}) imports {name} (row {ROW[room_of(name)]})"
        for line, name in imported(module, tree)
        if room_of(name) != here and ROW[room_of(name)] >= ROW[here]
    ]


def test_every_room_has_a_row(sources: dict[str, ast.Module]) -> None:
    unknown = sorted({room_of(module) for module in sources} - set(ROW))
    assert not unknown, f"rooms without a row in {__file__}: {unknown}"


def test_imports_point_down(sources: dict[str, ast.Module]) -> None:
    wrong = [
        arrow for module, tree in sources.items() if room_of(module) in ROW for arrow in wrong_arrows(module, tree)
    ]
    assert not wrong, "a module imports only from lower rows:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("muonlm.model.gpt", "import muonlm.optim.rules"),
        ("muonlm.model.gpt", "from muonlm import data"),
        ("muonlm.optim.muon", "def later():\n    from muonlm.train.loop import train"),
        ("muonlm.optim.muon", "from ..train import loop"),
        ("muonlm.optim.muon", "import importlib\nimportlib.import_module('muonlm.report.build')"),
        ("muonlm_kernels.iteration", "from muonlm.config.schema import MuonConfig"),
        ("muonlm.config.load", "import muonlm_kernels"),
        ("muonlm.__init__", "from muonlm.config import schema"),
    ],
)
def test_planted_arrows_are_found(module: str, source: str) -> None:
    assert wrong_arrows(module, ast.parse(source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "muonlm.optim.muon",
            "from muonlm_kernels import newton_schulz\nfrom muonlm.optim.rules import Rule\nimport torch",
        ),
        ("muonlm.cli.main", "from muonlm import __version__\ndef run():\n    from muonlm.compare.run import compare"),
        ("muonlm.__main__", "from muonlm.cli.main import main"),
        ("muonlm.optim.__init__", "from . import rules"),
    ],
)
def test_right_arrows_are_left_alone(module: str, source: str) -> None:
    assert not wrong_arrows(module, ast.parse(source))
