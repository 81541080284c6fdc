"""Newton-Schulz orthogonalization, usable alone: `from muonlm_kernels import newton_schulz`.

Knows torch and nothing of muonlm. `api` is the entry; behind it are `cpu`, `gpu` (Triton) and, for any other device,
`reference`, which the other two are held against. `coefficients` holds the named sets with their sources, `generator`
makes further ones, `oracle` the exact polar factor and the measures of error, `bench` the commands that print them.
"""

from muonlm_kernels.api import matmul_flops, newton_schulz
from muonlm_kernels.coefficients import COEFFICIENTS, Triple, coefficients
from muonlm_kernels.oracle import polar_factor

__all__ = ["COEFFICIENTS", "Triple", "coefficients", "matmul_flops", "newton_schulz", "polar_factor"]
