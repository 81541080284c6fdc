"""Shape of the checkout and of the code: what stands where, how long it is, and that it is documented and typed."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "Makefile", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("muonlm", "configs", "launch", "kernels", "tests", "docker", "docs"),
    *(".ci", ".gitignore", ".pre-commit-config.yaml", ".git"),
}
SOURCE_ROOTS = ("kernels", "configs", "launch", "docker", "tests")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Written as patterns that do not match themselves.
FORBIDDEN = {
    "host of a package registry": r"(?:pypi|pythonhosted|npmjs|download\.pytorch|deb\.debian)\.org|crates\.io",
    "absolute path of one machine": r"(?<![\w.~/-])/(?:work|root|home/\w+|tmp/\w+)/",
    "number of an issue or pull request": r"(?i)\b(?:issue|pull request|PR) ?#\d+",
}


def public_names(tree: ast.Module) -> Iterator[tuple[str, ast.Module | ast.ClassDef | Function]]:
    """The module, its public functions and classes, and the public methods that these classes introduce.

    Left out: overloads, and methods whose base class in the same file documents them.
    """
    yield "module", tree
    documented = {node.name: documented_methods(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_") or is_overload(node):
            continue
        yield node.name, node
        if not isinstance(node, ast.ClassDef):
            continue
        inherited = {name for base in node.bases for name in documented.get(ast.unparse(base), ())}
        for child in node.body:
            if isinstance(child, FUNCTIONS) and not child.name.startswith("_") and child.name not in inherited:
                yield f"{node.name}.{child.name}", child


def documented_methods(node: ast.ClassDef) -> set[str]:
    """Names of the methods of a class that have a docstring."""
    return {child.name for child in node.body if isinstance(child, FUNCTIONS) and ast.get_docstring(child)}


def is_overload(node: ast.ClassDef | Function) -> bool:
    """Only typing's signature, no body."""
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def functions(tree: ast.Module) -> list[Function]:
    """All functions, private, nested and methods too."""
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def num_lines(node: Function) -> int:
    """Lines from `def` to the end."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def forbidden_words(text: str) -> list[str]:
    """What in `text` must not be published, with its line number."""
    return [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match.group()!r} ({what})"
        for what, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, text)
    ]


def test_only_the_agreed_entries_stand_at_the_root(files: list[Path]) -> None:
    assert {path.parts[0] for path in files} <= TOP_LEVEL


def test_source_roots_are_no_packages(files: list[Path]) -> None:
    # A package `kernels` would shadow the Hugging Face client of that name, which transformers imports.
    packages = {path.parts[0] for path in files if path.name == "__init__.py" and path.parts[0] != "muonlm"}
    inside = [str(path) for path in files if path.name == "__init__.py" and path.parts[0] in SOURCE_ROOTS]
    assert packages <= {"kernels"}
    assert [path for path in inside if not path.startswith("kernels/muonlm_kernels/")] == []


def test_every_room_is_a_package(root: Path, sources: dict[str, ast.Module]) -> None:
    rooms = {module.rpartition(".")[0] for module in sources} - {""}
    assert {f"{room}.__init__" for room in rooms} <= set(sources)


def test_architecture_page_names_exactly_the_rooms_there_are(root: Path, sources: dict[str, ast.Module]) -> None:
    page = (root / "docs" / "architecture.md").read_text()
    listed = set(re.findall(r"^\| \d \| `((?:muonlm|kernels)/[\w/]+)/`", page, flags=re.MULTILINE))
    packages = [parts[:2] for module in sources if len(parts := module.split(".")) > 2]
    roots = {"muonlm": "muonlm", "muonlm_kernels": "kernels/muonlm_kernels"}
    assert listed == {f"{roots[root]}/{room}" for root, room in packages} | {"kernels/muonlm_kernels"}


def test_files_are_short(root: Path, files: list[Path], sources: dict[str, ast.Module]) -> None:
    code = [path for path in files if path.suffix == ".py"]
    lengths = {path: (root / path).read_text().count("\n") for path in code}
    assert {str(path): lines for path, lines in lengths.items() if lines > 500} == {}
    library = [lines for path, lines in lengths.items() if path.parts[0] in {"muonlm", "kernels"}]
    assert statistics.median(library) <= 200


def test_functions_fit_a_screen(sources: dict[str, ast.Module]) -> None:
    lengths = sorted(
        (num_lines(node), f"{module}.{node.name}") for module, tree in sources.items() for node in functions(tree)
    )
    p95 = lengths[int(0.95 * (len(lengths) - 1))][0]
    assert p95 <= 60, f"95th percentile {p95}; longest: {lengths[-10:]}"


def test_public_names_have_docstrings(sources: dict[str, ast.Module]) -> None:
    missing = [
        f"{module}: {name}"
        for module, tree in sources.items()
        for name, node in public_names(tree)
        if not ast.get_docstring(node)
    ]
    assert not missing, "without a docstring:\n" + "\n".join(missing)


def test_functions_have_return_types(sources: dict[str, ast.Module]) -> None:
    untyped = [
        f"{module}:{node.lineno} {node.name}"
        for module, tree in sources.items()
        for node in functions(tree)
        if node.returns is None
    ]
    assert not untyped, "without a return type:\n" + "\n".join(untyped)


def test_no_forbidden_words(root: Path, files: list[Path]) -> None:
    found = []
    for path in files:
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # pictures
            continue
        found += [f"{path}, {words}" for words in forbidden_words(text)]
    assert not found, "not to be published:\n" + "\n".join(found)


@pytest.mark.parametrize("host", ["pypi", "files.pythonhosted"])
def test_planted_words_are_found(host: str) -> None:
    assert forbidden_words(f"see {host}.org")
    assert forbidden_words("a\ndata = '/" + "root/data'")
    assert forbidden_words("see issue" + " #12")
    assert not forbidden_words("src/work/x, ~/root/, github.com/o/r/issues, #ffcc00")
