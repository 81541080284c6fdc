"""Help and docs/config.md say what the schema says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

import muonlm
from muonlm.config import help as config_help
from muonlm.config.load import KINDS
from muonlm.config.schema import AdamWConfig

ROOT = Path(muonlm.__file__).resolve().parent.parent


def leaf_keys(model: type[BaseModel]) -> set[str]:
    """Dotted keys by way of the JSON schema: another road than the one help takes."""
    schema = model.model_json_schema()

    def walk(node: dict, prefix: str) -> set[str]:
        if "$ref" in node:
            return walk(schema["$defs"][node["$ref"].rsplit("/", 1)[1]], prefix)
        for several in ("oneOf", "anyOf", "allOf"):
            if several in node:
                return set().union(*(walk(part, prefix) for part in node[several]))
        if "properties" in node:
            return set().union(*(walk(part, f"{prefix}.{name}") for name, part in node["properties"].items()))
        if node.get("items", {}).get("$ref"):
            return walk(node["items"], prefix)
        if node.get("type") == "null":  # what may be left out is listed under its other type
            return set()
        return {prefix.lstrip(".")}

    return walk(schema, "")


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_listed_with_its_description(kind: str) -> None:
    text = config_help.reference(KINDS[kind])
    keys = leaf_keys(KINDS[kind])
    listed = {line.split()[0] for line in text.splitlines() if line[:2] == "  " and line[2:3] not in ("", " ")}
    assert keys <= listed
    assert len(keys) > 8
    flat = " ".join(text.split())
    described = [node for node in _nodes(KINDS[kind].model_json_schema()) if "description" in node]
    assert all(" ".join(node["description"].split()) in flat for node in described if "properties" in node)


def _nodes(node: object) -> list[dict]:
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return [*([node] if isinstance(node, dict) else []), *(found for part in below for found in _nodes(part))]


@pytest.mark.parametrize("kind", KINDS)
def test_help_fits_100_columns(kind: str) -> None:
    assert max(len(line) for line in config_help.reference(KINDS[kind]).splitlines()) <= 100


def test_text_of_one_table() -> None:
    text = config_help.reference(KINDS["train"])
    assert (
        '[optim] with kind = "adamw"\n'
        "  AdamW everywhere, with a learning rate of its own for hidden matrices and one for the rest.\n"
        '  optim.kind = "adamw"                          "adamw"\n'
        "      Optimizer of the hidden matrices.\n"
        f"  optim.lr = {AdamWConfig().lr:<35}number, above 0\n"
        "      Peak learning rate of the hidden matrices.\n"
        "  optim.beta1 = 0.9                             number, at least 0 and below 1\n"
        "      Decay of the first moment.\n"
    ) in text
    assert '[optim] with kind = "muon", the default\n' in text
    assert text.count("[optim.aux]\n") == 1
    assert "  loop.tokens (unset)                           whole number, at least 1 [tokens]\n" in text
    assert "  data.path (required)                          text\n" in text
    assert '  source.kind (required)                        "dataset"\n' in config_help.reference(KINDS["data"])
    assert "[[arms]]\n" in config_help.reference(KINDS["compare"])


def test_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == config_help.markdown(), (
        "docs/config.md is stale: python -m muonlm.config.help > docs/config.md"
    )


def test_config_package_imports_nothing_heavy() -> None:
    code = "import json, sys, muonlm.config.help, muonlm.config.load; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"torch", "numpy", "datasets", "transformers", "rich", "matplotlib", "muonlm.dist", "muonlm.train"}
    assert not heavy & set(json.loads(done.stdout))
