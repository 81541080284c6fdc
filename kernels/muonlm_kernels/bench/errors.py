"""`errors`: how far each coefficient set ends from the polar factor, in which precision, for how many FLOPs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from statistics import fmean
from typing import Literal

import torch

from muonlm_kernels import oracle
from muonlm_kernels.bench.emulated import iterate_gram, iterate_standard, normalize
from muonlm_kernels.bench.options import writable_file
from muonlm_kernels.bench.table import table
from muonlm_kernels.coefficients import COEFFICIENTS, Triple, coefficients
from muonlm_kernels.generator import polar_express
from muonlm_kernels.rounding import compensated_steps

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPECTRA = ("gaussian", "1/i", "i^-1.5")
LEAK_RANK = 8
SIDES = (256, 1024, 4096)


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    restarts: before which steps the Gram form starts anew ("paired": every second); None is the standard form.
    """

    label: str
    triples: tuple[Triple, ...]
    preconditioner: Literal["frobenius", "aol"] = "frobenius"
    scale: float = 1.0  # the input is divided by this after its normalization
    restarts: tuple[int, ...] | None = None

    def iterate(self, grad_MN: torch.Tensor, dtype: torch.dtype, *, separate: bool, compensated: bool) -> torch.Tensor:
        """Normalize in float32 and run all steps in the precision `dtype`; returns float32."""
        x_MN = normalize(grad_MN, self.preconditioner) / self.scale
        if self.restarts is not None:
            return iterate_gram(x_MN, self.triples, dtype, self.restarts, separate=separate)
        carried = compensated_steps(self.triples, dtype) if compensated else 0
        return iterate_standard(x_MN, self.triples, dtype, separate=separate, compensated=carried)

    def gigaflops(self, rows: int, cols: int, *, symmetric: bool) -> float:
        """Of one matrix; `symmetric` counts products with a symmetric result half.

        One step is X X^T, A A and P X: 2 m^2 n, 2 m^3 and 2 m^2 n. A cubic step has no A A. The Gram form pays
        X X^T and Q X once for each restart, and in m x m products R R, Q Z, R Z and Z (R Z).
        """
        m, n = sorted((rows, cols))
        half = 0.5 if symmetric else 1.0
        if self.restarts is None:
            squares = sum(c != 0 for _, _, c in self.triples)
            return (len(self.triples) * (2 * half + 2) * m * m * n + squares * 2 * half * m**3) / 1e9
        bounds = [0, *self.restarts, len(self.triples)]
        segments = [stop - start for start, stop in pairwise(bounds)]
        products = sum(steps + (steps - 1) + 2 * (steps - 1) for steps in segments)
        return (len(segments) * (2 * half + 2) * m * m * n + products * 2 * half * m**3) / 1e9


def variants() -> list[Variant]:
    """All sets with their own number of steps, polar_express with other settings, and the Gram forms."""
    named = {
        name: Variant(f"{name} {each.steps}", coefficients(name), each.preconditioner)
        for name, each in COEFFICIENTS.items()
    }
    within = polar_express(1e-3, 5, safety=1.02, cushion=0.02, guard="within")
    loose = coefficients("polar_express", 5, safety=1.05)
    return [
        *named.values(),
        *(Variant(f"polar_express {steps}", coefficients("polar_express", steps)) for steps in (4, 6, 8)),
        Variant("polar_express 5, safety 1.05", loose),
        Variant("polar_express 5, guarded within, 1.02", within, scale=1.02),
        Variant("polar_express 5, lower 3e-3", polar_express(3e-3, 5)),
        Variant("gram polar_express 5 (1.05), restart 2", loose, restarts=(2,)),
        Variant("gram polar_express 5 (1.05), no restart", loose, restarts=()),
        Variant("gram jordan 5, restart 2", named["jordan"].triples, restarts=(2,)),
        Variant("paired polar_express 5", coefficients("polar_express"), restarts=(2, 4)),
        Variant("paired jordan 5", named["jordan"].triples, restarts=(2, 4)),
        Variant("paired cans 5", named["cans"].triples, restarts=(2, 4)),
    ]


@cache
def make_matrix(kind: str, rows: int, cols: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix (rows <= cols) and its polar factor in float64.

    "gaussian": independent normal entries. "1/i" and "i^-1.5": these singular values between random orthogonal
    matrices. "rank": `LEAK_RANK` equal singular values.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "gaussian":
        grad_MN = torch.randn(rows, cols, generator=generator)
        return grad_MN, oracle.polar_factor(grad_MN)
    rank = LEAK_RANK if kind == "rank" else rows
    u_MR, v_NR = (
        torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64))[0] for side in (rows, cols)
    )
    power = {"1/i": 1.0, "i^-1.5": 1.5, "rank": 0.0}[kind]
    s_R = torch.arange(1, rank + 1, dtype=torch.float64) ** -power
    return ((u_MR * s_R) @ v_NR.mT).float(), u_MR @ v_NR.mT


@dataclass(frozen=True)
class Row:
    """Figures of one variant.

    errors: by "spectrum dtype". leak: share of the energy outside the true space for rank 8, by dtype.
    compensated: bf16 errors by spectrum, and "leak", with the first roundings carried; empty where that is not defined.
    singular_values: smallest and largest of the bf16 result for a Gaussian.
    balance: geometric mean of the bf16 errors times symmetric GFLOPs; the smaller, the more exactness for the work.
    """

    label: str
    steps: int
    gigaflops: float
    gigaflops_symmetric: float
    errors: dict[str, float]
    singular_values: tuple[float, float]
    leak: dict[str, float]
    compensated: dict[str, float]
    balance: float


def measure(variant: Variant, rows: int, cols: int, seeds: Sequence[int], *, separate: bool = False) -> Row:
    """All figures of one variant: means over the seeds; extremes over the seeds for singular values."""

    def error(spectrum: str, dtype: torch.dtype, compensated: bool = False) -> float:
        found = []
        for seed in seeds:
            grad_MN, exact_MN = make_matrix(spectrum, rows, cols, seed)
            estimate = variant.iterate(grad_MN, dtype, separate=separate, compensated=compensated)
            found.append(oracle.relative_error(estimate, exact_MN))
        return fmean(found)

    def leak(dtype: torch.dtype, compensated: bool = False) -> float:
        found = []
        for seed in seeds:
            grad_MN, _ = make_matrix("rank", rows, cols, seed)
            estimate = variant.iterate(grad_MN, dtype, separate=separate, compensated=compensated)
            found.append(oracle.noise_leak(estimate, grad_MN, rank=LEAK_RANK))
        return fmean(found)

    ranges = []
    for seed in seeds:
        grad_MN, _ = make_matrix("gaussian", rows, cols, seed)
        estimate = variant.iterate(grad_MN, torch.bfloat16, separate=separate, compensated=False)
        ranges.append(oracle.singular_value_range(estimate, grad_MN))
    by_spectrum = {f"{s} {name}": error(s, dtype) for s in SPECTRA for name, dtype in DTYPES.items()}
    carried = {}
    if not separate and variant.restarts is None:
        carried = {s: error(s, torch.bfloat16, True) for s in SPECTRA} | {"leak": leak(torch.bfloat16, True)}
    symmetric = variant.gigaflops(rows, cols, symmetric=True)
    return Row(
        label=variant.label,
        steps=len(variant.triples),
        gigaflops=variant.gigaflops(rows, cols, symmetric=False),
        gigaflops_symmetric=symmetric,
        errors=by_spectrum,
        singular_values=(min(r[0] for r in ranges), max(r[2] for r in ranges)),
        leak={name: leak(DTYPES[name]) for name in ("bf16", "fp16")},
        compensated=carried,
        balance=math.prod(by_spectrum[f"{s} bf16"] for s in SPECTRA) ** (1 / len(SPECTRA)) * symmetric,
    )


def exact_errors(triples: Sequence[Triple], scale: float = 1.0) -> dict[str, float]:
    """Relative error without rounding, by "spectrum side", for M x 4 M matrices: what the steps make of their spectra.

    Division by the Frobenius norm leaves the smaller singular values, the larger the matrix is.
    """
    found = {}
    for side in SIDES:
        index = torch.arange(1, side + 1, dtype=torch.float64)
        for spectrum, s in zip(SPECTRA, (_gaussian_spectrum(side), 1 / index, index**-1.5), strict=True):
            x = s / s.norm() / scale
            for a, b, c in triples:
                x = a * x + b * x**3 + c * x**5
            found[f"{spectrum} {side}"] = float((x - 1).square().mean().sqrt())
    return found


def _gaussian_spectrum(side: int, aspect: int = 4) -> torch.Tensor:
    """Singular values of a Gaussian matrix: quantiles of the Marchenko-Pastur law."""
    low, high = aspect**0.5 - 1, aspect**0.5 + 1
    grid = torch.linspace(low, high, 100_001, dtype=torch.float64)
    density = ((high**2 - grid**2) * (grid**2 - low**2)).clamp_min(0).sqrt() / grid
    ranks = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return grid[torch.searchsorted(density.cumsum(0) / density.sum(), ranks)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `errors`."""
    parser.add_argument("--rows", type=int, default=256, metavar="M", help="shorter side of the matrices [256]")
    parser.add_argument("--cols", type=int, default=1024, metavar="N", help="longer side [1024]")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="means over this many matrices [1]")
    parser.add_argument(
        "--separate", action="store_true", help="round products and terms before adding them, as eager code does"
    )
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write all figures as JSON too")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; returns the exit code."""
    if not LEAK_RANK < args.rows <= args.cols or args.seeds < 1:
        print(f"errors: give {LEAK_RANK} < rows <= cols and at least one seed", file=sys.stderr)
        return 2
    found = [measure(v, args.rows, args.cols, range(args.seeds), separate=args.separate) for v in variants()]
    print(f"relative error to the polar factor, {args.rows} x {args.cols}, {args.seeds} seed(s) a figure, iterates in")
    print("fp32/bf16/fp16; singular values of the bf16 result; energy outside the true space for rank 8;")
    print("compensated: the same figures of bf16 iterates that carry their first roundings\n")
    print(render(found))
    print("\nrelative error without rounding, M x 4M, by M\n")
    print(_render_sides([v for v in variants() if v.restarts is None and v.preconditioner == "frobenius"]))
    order = sorted(found, key=lambda row: row.balance)
    print(f"\nbest first by error x FLOPs: {', '.join(f'{row.label} ({row.balance:.3f})' for row in order)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    return 0


def render(rows: Sequence[Row]) -> str:
    """The table as text."""
    header = [
        "set, steps",
        "GFLOPs",
        "symmetric",
        *SPECTRA,
        "singular values",
        "rank 8 bf16",
        "fp16",
        "compensated bf16",
        "rank 8",
    ]
    cells = []
    for row in rows:
        errors = ["/".join(_figure(row.errors[f"{s} {name}"]) for name in DTYPES) for s in SPECTRA]
        low, high = row.singular_values
        leak = [f"{row.leak[name]:.1%}" for name in ("bf16", "fp16")]
        carried = ["-", "-"]
        if row.compensated:
            carried = ["/".join(_figure(row.compensated[s]) for s in SPECTRA), f"{row.compensated['leak']:.1%}"]
        flops = [f"{row.gigaflops:.2f}", f"{row.gigaflops_symmetric:.2f}"]
        cells.append([row.label, *flops, *errors, f"{low:.2f}-{high:.2f}", *leak, *carried])
    return table(header, cells)


def _render_sides(chosen: Sequence[Variant]) -> str:
    rows = []
    for variant in chosen:
        errors = exact_errors(variant.triples, variant.scale)
        rows.append([variant.label, *("/".join(_figure(errors[f"{s} {side}"]) for side in SIDES) for s in SPECTRA)])
    return table(["set, steps", *(f"{s}, M={'/'.join(map(str, SIDES))}" for s in SPECTRA)], rows)


def _figure(error: float) -> str:
    return f"{error:.3f}" if error < 100 else f"{error:.0e}"
