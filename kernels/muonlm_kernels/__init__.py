"""Newton-Schulz orthogonalization, usable alone: `from muonlm_kernels import newton_schulz`.

Knows torch and nothing of muonlm. `coefficients` holds the named sets with their sources, `iteration` the batched
computation, `oracle` the exact polar factor it is held against.
"""

from muonlm_kernels.coefficients import COEFFICIENTS, coefficients
from muonlm_kernels.iteration import matmul_flops, newton_schulz
from muonlm_kernels.oracle import polar_factor

__all__ = ["COEFFICIENTS", "coefficients", "matmul_flops", "newton_schulz", "polar_factor"]
