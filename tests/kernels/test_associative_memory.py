"""The one-layer associative memory: the figures of the exact polar factor and what approximations cost."""

import argparse
import json

import pytest
import torch

from muonlm_kernels import oracle
from muonlm_kernels.bench import associative_memory
from muonlm_kernels.bench.errors import variants

VARIANTS = {variant.label: variant for variant in variants()}


def outcome(label, name=torch.float32, embedding="random"):
    variant = VARIANTS[label]
    return associative_memory.associate(
        lambda gradient: variant.iterate(gradient, name, separate=False, compensated=False), 99, embedding
    )


@pytest.mark.parametrize("embedding", associative_memory.EMBEDDINGS)
def test_polar_factor_treats_rare_pairs_as_frequent_ones(embedding):
    found = associative_memory.associate(oracle.polar_factor, 99, embedding)
    assert found.worst == pytest.approx(0.8956, abs=1e-4)
    assert found.gap == pytest.approx(0.0085, abs=1e-4)


def test_gradient_leaves_rare_pairs_out():
    found = associative_memory.associate(lambda gradient: gradient, 99, "random")
    assert found.worst == pytest.approx(0.0150, abs=1e-4)
    assert found.gap == pytest.approx(0.979, abs=1e-3)


def test_sign_depends_on_the_embeddings():
    plain, coupled, random = (
        associative_memory.associate(torch.sign, 99, embedding) for embedding in associative_memory.EMBEDDINGS
    )
    assert plain.worst == pytest.approx(0.9, abs=1e-6)
    assert plain.gap < 1e-9
    assert coupled.worst == pytest.approx(0.0034, abs=1e-4)
    assert random.worst < 0.02
    assert coupled.gap == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("label", "worst", "gap"),
    [("jordan 5", 0.691, 0.268), ("polar_express 5", 0.741, 0.218), ("polar_express 6", 0.896, 0.008)],
)
def test_approximations(label, worst, gap):
    for embedding in ("identity", "random"):
        found = outcome(label, embedding=embedding)
        assert found.worst == pytest.approx(worst, abs=2e-3)
        assert found.gap == pytest.approx(gap, abs=2e-3)


def test_bfloat16_costs_little():
    assert outcome("polar_express 5", torch.bfloat16).worst == pytest.approx(0.741, abs=0.02)


@pytest.mark.parametrize("kind", associative_memory.EMBEDDINGS)
def test_embeddings_are_orthonormal(kind):
    for each in associative_memory.embeddings(kind, 12):
        assert torch.allclose(each.mT @ each, torch.eye(12, dtype=torch.float64), atol=1e-12)


def test_coupled_embeddings_need_blocks_of_three():
    with pytest.raises(ValueError, match="10 associations"):
        associative_memory.embeddings("coupled", 10)


def test_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    associative_memory.add_arguments(parser)
    path = tmp_path / "memory.json"
    assert associative_memory.run(parser.parse_args(["--associations", "20", "--json", str(path)])) == 0
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert "exact polar factor" in printed
    assert "sign, coupled" not in printed
    assert f"{found['jordan 5']['bf16']['worst']:.4f}" in printed
    assert associative_memory.run(parser.parse_args(["--associations", "3"])) == 2
    assert "at least 6" in capsys.readouterr().err
