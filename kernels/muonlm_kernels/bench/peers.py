"""The contenders of the side-by-side benchmark: this package, and other implementations where they are installed.

Every adapter takes one matrix (M, N) or a stack (K, M, N) and runs 5 steps, which is what all of them do by default. A
peer that knows only matrices is called for each matrix of a stack, as its own optimizer does. Nothing of a peer is
copied: its installed function is called.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import muonlm_kernels
from muonlm_kernels.coefficients import COEFFICIENTS, DEFAULT

STEPS = 5
Orthogonalize = Callable[[torch.Tensor], torch.Tensor | list[torch.Tensor]]


@dataclass(frozen=True)
class Contender:
    """One orthogonalization to measure. `iterates` is the dtype of its matrix products."""

    name: str
    coefficients: str
    iterates: torch.dtype
    orthogonalize: Orthogonalize
    ours: bool = False


@dataclass(frozen=True)
class Missing:
    """A peer that cannot run here, and why."""

    name: str
    reason: str


class UnavailableError(Exception):
    """A peer cannot run here; the message says why and what to do."""


def contenders(
    device: torch.device, coefficients: str = "jordan", dtype: torch.dtype | None = None
) -> tuple[list[Contender], list[Missing]]:
    """All that can run on `device`, ours first, and the peers that cannot.

    Ours is there twice: with `coefficients` in `dtype` (None: the automatic one), to be compared with peers that do the
    same work, and as it is called by default. Peers with a choice of coefficients get the same; the others keep theirs.
    """
    automatic = automatic_dtype(device)
    found = [_ours(coefficients, dtype or automatic)]
    found += [Contender("muonlm default", DEFAULT, automatic, muonlm_kernels.newton_schulz, ours=True)]
    missing = []
    for name, make in _PEERS.items():
        try:
            found.append(make(name, device, coefficients))
        except UnavailableError as error:
            missing.append(Missing(name, str(error)))
    return found, missing


def automatic_dtype(device: torch.device) -> torch.dtype:
    """The precision that newton_schulz takes by itself: the one in which the device multiplies fast."""
    return muonlm_kernels.newton_schulz(torch.zeros(1, 1, device=device)).dtype


def comparable_coefficients() -> list[str]:
    """The named sets with which an iteration of `STEPS` steps makes sense without a preconditioner of its own."""
    return [
        name
        for name, known in COEFFICIENTS.items()
        if known.preconditioner == "frobenius" and (known.steps == STEPS or known.repeats) and known.fewest <= STEPS
    ]


def _ours(coefficients: str, dtype: torch.dtype) -> Contender:
    def orthogonalize(grad: torch.Tensor) -> torch.Tensor:
        return muonlm_kernels.newton_schulz(grad, coefficients=coefficients, steps=STEPS, dtype=dtype)

    return Contender(f"muonlm {coefficients}", coefficients, dtype, orthogonalize, ours=True)


def _torch(name: str, device: torch.device, coefficients: str) -> Contender:
    """The function behind torch.optim.Muon. It is private, so its parameters are checked before it is trusted."""
    (zeropower,) = _members("torch.optim._muon", ["_zeropower_via_newtonschulz"], "torch 2.9 or newer")
    parameters = list(inspect.signature(zeropower).parameters)
    if parameters != ["grad", "ns_coefficients", "ns_steps", "eps"]:
        raise UnavailableError(
            f"torch {torch.__version__} has another signature of torch.optim._muon._zeropower_via_newtonschulz: "
            f"({', '.join(parameters)}); this adapter has to follow it"
        )
    # It takes one triple for all steps, so of the named sets only those that repeat one.
    label = coefficients if len(set(muonlm_kernels.coefficients(coefficients, STEPS))) == 1 else "jordan"
    triple = muonlm_kernels.coefficients(label, STEPS)[0]
    return Contender(name, label, torch.bfloat16, _each(lambda matrix: zeropower(matrix, triple, STEPS, 1e-7)))


def _keller_jordan(name: str, device: torch.device, coefficients: str) -> Contender:
    hint = "pip install muon-optimizer; the package named muon is an unrelated one"
    (zeropower,) = _members("muon", ["zeropower_via_newtonschulz5"], hint)
    return Contender(name, "jordan", torch.bfloat16, lambda grad: zeropower(grad, STEPS))


def _gram_newton_schulz(name: str, device: torch.device, coefficients: str) -> Contender:
    """Compiled, with its own kernels where those are installed; uncompiled plain torch on a CPU."""
    hint = "pip install gram-newton-schulz, or without its GPU kernels: pip install --no-deps gram-newton-schulz"
    (make,) = _members("gram_newton_schulz", ["GramNewtonSchulz"], hint)
    triples = [list(triple) for triple in muonlm_kernels.coefficients(coefficients, STEPS)]
    if device.type != "cuda":
        orthogonalize = make(ns_coefficients=triples, ns_use_kernels=False, compile_kwargs=None)
        return Contender(f"{name} (torch path)", coefficients, torch.float16, orthogonalize)
    try:
        return Contender(name, coefficients, torch.float16, make(ns_coefficients=triples))
    except ImportError:
        orthogonalize = make(ns_coefficients=triples, ns_use_kernels=False)
        return Contender(f"{name} (torch path)", coefficients, torch.float16, orthogonalize)


def _dion_polar_express(name: str, device: torch.device, coefficients: str) -> Contender:
    compiled, triton = _members("dion.polar_express", ["polar_express", "polar_express_triton"], _DION)
    return Contender(name, "polar express", torch.bfloat16, triton if device.type == "cuda" else compiled)


def _dion_newton_schulz(name: str, device: torch.device, coefficients: str) -> Contender:
    members = ["zeropower_via_newtonschulz5", "newton_schulz_triton"]
    compiled, triton = _members("dion.newton_schulz_triton", members, _DION)
    return Contender(name, "quintic", torch.bfloat16, triton if device.type == "cuda" else compiled)


def _flash_muon(name: str, device: torch.device, coefficients: str) -> Contender:
    if device.type != "cuda":
        raise UnavailableError("runs on a GPU only")
    (orthogonalize,) = _members(
        "flash_muon", ["fast_newtonschulz"], "pip install git+https://github.com/nil0x9/flash-muon"
    )
    return Contender(name, "jordan", torch.bfloat16, _each(lambda matrix: orthogonalize(matrix, STEPS)))


_DION = "pip install git+https://github.com/microsoft/dion"
_PEERS: dict[str, Callable[[str, torch.device, str], Contender]] = {
    "torch.optim.Muon": _torch,
    "KellerJordan/Muon": _keller_jordan,
    "gram-newton-schulz": _gram_newton_schulz,
    "dion polar_express": _dion_polar_express,
    "dion newton_schulz": _dion_newton_schulz,
    "flash-muon": _flash_muon,
}


def _each(orthogonalize: Callable[[torch.Tensor], torch.Tensor]) -> Orthogonalize:
    """Call for every matrix of a stack; the results stay apart, as they do in an optimizer."""

    def loop(grad: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        return orthogonalize(grad) if grad.ndim == 2 else [orthogonalize(matrix) for matrix in grad]

    return loop


def _members(module: str, names: list[str], hint: str) -> list[Any]:
    """Members of an installed module. Raises UnavailableError with `hint` where it or one of them is not there."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise UnavailableError(f"{module} is installed but needs {error.name}, which is not") from error
        raise UnavailableError(f"not installed ({hint})") from error
    except Exception as error:  # whatever a stranger's module does when it is imported
        raise UnavailableError(f"importing {module} failed: {type(error).__name__}: {error}") from error
    absent = [name for name in names if not hasattr(found, name)]
    if absent:
        raise UnavailableError(f"the installed {module} has no {', '.join(absent)} ({hint})")
    return [getattr(found, name) for name in names]
