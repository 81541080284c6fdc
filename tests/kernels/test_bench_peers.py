"""The adapters of the side-by-side benchmark: same work for all, and clear words on peers that are not there."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

import muonlm_kernels
from muonlm_kernels import newton_schulz
from muonlm_kernels.bench import peers

CPU = torch.device("cpu")


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Only the modules that a test puts into the returned dict can be imported as peers."""
    real, there = importlib.import_module, {}

    def import_module(name: str) -> ModuleType:
        if name.startswith("torch."):
            return real(name)
        if name in there:
            return there[name]
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(peers.importlib, "import_module", import_module)
    return there


def test_missing_peers_are_named_with_their_remedy(without_peers: dict[str, ModuleType]) -> None:
    found, missing = peers.contenders(CPU)
    assert [contender.name for contender in found] == ["muonlm jordan", "muonlm default", "torch.optim.Muon"]
    reasons = {peer.name: peer.reason for peer in missing}
    assert list(reasons) == [name for name in peers._PEERS if name != "torch.optim.Muon"]
    assert "pip install muon-optimizer" in reasons["KellerJordan/Muon"]
    assert "pip install --no-deps gram-newton-schulz" in reasons["gram-newton-schulz"]
    assert "GPU" in reasons["flash-muon"]
    assert all(reason.startswith("not installed") for name, reason in reasons.items() if name != "flash-muon")


def test_a_package_of_the_same_name_is_not_taken_for_the_peer(without_peers: dict[str, ModuleType]) -> None:
    without_peers["muon"] = ModuleType("muon")
    reasons = {peer.name: peer.reason for peer in peers.contenders(CPU)[1]}
    assert reasons["KellerJordan/Muon"].startswith("the installed muon has no zeropower_via_newtonschulz5")
    assert "unrelated" in reasons["KellerJordan/Muon"]


def test_a_torch_whose_function_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(grad: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
        return grad

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", moved)
    reasons = {peer.name: peer.reason for peer in peers.contenders(CPU)[1]}
    assert "(grad, coefficients); this adapter has to follow it" in reasons["torch.optim.Muon"]


def test_peers_get_the_steps_and_coefficients_of_ours(without_peers: dict[str, ModuleType]) -> None:
    calls: list[Any] = []
    jordan, gram = ModuleType("muon"), ModuleType("gram_newton_schulz")
    jordan.zeropower_via_newtonschulz5 = lambda grad, steps: calls.append((tuple(grad.shape), steps))  # type: ignore
    gram.GramNewtonSchulz = lambda **options: calls.append(options)  # type: ignore[attr-defined]
    without_peers |= {"muon": jordan, "gram_newton_schulz": gram}
    found = {contender.name: contender for contender in peers.contenders(CPU, "quintic")[0]}
    triples = [list(triple) for triple in muonlm_kernels.coefficients("quintic", 5)]
    assert calls == [{"ns_coefficients": triples, "ns_use_kernels": False, "compile_kwargs": None}]
    found["KellerJordan/Muon"].orthogonalize(torch.ones(2, 3, 4))
    assert calls[1:] == [((2, 3, 4), 5)]
    assert found["gram-newton-schulz (torch path)"].coefficients == "quintic"
    # It takes one triple for all steps.
    assert found["torch.optim.Muon"].coefficients == "jordan"


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_ours_is_compared_in_the_precision_it_takes_by_itself(
    fast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muonlm_kernels.api.fast_dtype", lambda: fast)
    assert [contender.iterates for contender in peers.contenders(CPU)[0][:2]] == [fast, fast]
    assert peers.contenders(CPU, dtype=torch.float64)[0][0].iterates == torch.float64


def test_torchs_function_is_called_for_each_matrix() -> None:
    (contender,) = [peer for peer in peers.contenders(CPU)[0] if peer.name == "torch.optim.Muon"]
    grad = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    exact = newton_schulz(grad, coefficients="jordan", steps=5, dtype=torch.float32)
    torch.testing.assert_close(torch.stack(list(contender.orthogonalize(grad))).float(), exact, rtol=0, atol=0.05)
