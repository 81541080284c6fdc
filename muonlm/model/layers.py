"""RMSNorm and SwiGLU with hand-written gradients for the CPU, rotary tables, and layers of weights that may be cut.

On a CPU, autocast's casts and the many small elementwise kernels of the composed forms cost more than the
matrix products of a small model. Each function here makes few passes, keeps its statistics in fp32 and emits
the compute dtype directly. On other devices PyTorch's own fused kernels are used. Both give way to compositions of
plain operations where torch.compile fuses them, and in a model that is to be differentiated twice (`plain`).

Shape suffixes: B batch, T positions, D hidden, C head width, N rows (B*T).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from muonlm.model.regions import local


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of `x` runs: autocast's when it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def upcast(x: Tensor) -> Tensor:
    """`x` in at least fp32 (float64 stays, so that gradients can be checked numerically)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dim, kept with size 1."""
    square_sum = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square_sum.div_(x.size(-1)).add_(eps).rsqrt_()


def use_fused(x: Tensor, plain: bool) -> bool:
    """Whether the functions with hand-written gradients take `x`."""
    return x.device.type == "cpu" and not plain and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, emitted in `out_dtype`. Saves x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_D: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        x = upcast(x_BTD)
        rstd = inverse_rms(x, eps)
        ctx.save_for_backward(x_BTD, weight_D, rstd)
        return (x * rstd).mul_(weight_D).to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, weight_D, rstd = ctx.saved_tensors
        x, size = upcast(x_BTD), x_BTD.size(-1)
        grad = grads[0].to(x.dtype)
        product_ND = (grad * x).reshape(-1, size)
        grad_weight = product_ND.t().mv(rstd.reshape(-1))
        # dx = r*w*g - x * r^3/D * sum(w*g*x); the sum over D is a matrix-vector product.
        along_x = product_ND.mv(weight_D.to(x.dtype)).view_as(rstd).mul_(rstd.pow(3)).div_(-size)
        grad_x = (grad * weight_D).mul_(rstd).addcmul_(x, along_x)
        return grad_x.to(x_BTD.dtype), grad_weight.to(weight_D.dtype), None, None


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dim (arXiv:1910.07467), fp32 inside.

    The output has the compute dtype, so that the following matrix products need no cast.
    """

    def __init__(self, size: int, eps: float, *, plain: bool = False) -> None:
        super().__init__(size, eps=eps)
        self.epsilon, self.plain = eps, plain

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., size) -> (..., size)."""
        weight = local(self.weight)
        if use_fused(x, self.plain):
            out: Tensor = _RMSNorm.apply(x.contiguous(), weight, self.epsilon, compute_dtype(x))
            return out
        if self.plain:
            return rms_norm(x, weight, self.epsilon).to(compute_dtype(x))
        return F.rms_norm(x, self.normalized_shape, weight.to(x.dtype), self.epsilon).to(compute_dtype(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim, in at least fp32, of operations that can be differentiated twice."""
    wide = upcast(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight


class Linear(nn.Linear):
    """A projection without bias that computes with the part of its weight that is on this rank."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(input, local(self.weight))


class Embedding(nn.Embedding):
    """A table of vectors that computes with the part of it that is on this rank."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids (...) -> (..., D)."""
        return F.embedding(input, local(self.weight))


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Saves silu(gate) too: its exponential is the dearest pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        activated = F.silu(gate)
        ctx.save_for_backward(gate, up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, activated = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return grad_gate, grads[0] * activated


def activate(gate: Tensor | None, up: Tensor, kind: str, *, plain: bool = False) -> Tensor:
    """act(gate) * up (arXiv:2002.05202), or act(up) without a gate; elementwise, of one shape and dtype.

    `kind` is "silu" or "relu2", the square of the positive part (arXiv:2109.08668).
    """
    if gate is not None and kind == "silu" and use_fused(up, plain):
        out: Tensor = _SwiGLU.apply(gate, up)
        return out
    x = up if gate is None else gate
    activated = F.silu(x) if kind == "silu" else _square(F.relu(x))
    return activated if gate is None else activated * up


def _square(x: Tensor) -> Tensor:
    return x * x  # autocast computes powers in fp32


@lru_cache(maxsize=8)
def rope_tables(num_positions: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary tables cos and sin, (num_positions, head_dim / 2) fp32 each (arXiv:2104.09864).

    Cached rather than module buffers: DistributedDataParallel broadcasts buffers at every step, and these grow
    with the longest sequence seen.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] / theta**exponents
        return angles.cos().to(device), angles.sin().to(device)
