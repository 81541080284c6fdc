"""Data sheets of devices, and what share of them a run is assumed to attain."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from muonlm.config.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device and its connections.

    Fields:
        kind: "cuda" (as torch calls GPUs) or "cpu".
        peak_flops: dense bfloat16 products with fp32 sums, FLOP/s.
        memory_bytes: what torch finds on it; 0 where the machine decides.
        memory_bandwidth, node_bandwidth: to its memory, and to the other devices of its node in one direction, byte/s.
        network_gbit: to other nodes, of one device in one direction, Gbit/s.
    """

    kind: str
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    node_bandwidth: float
    network_gbit: float


# Vendors' data sheets. Peaks are those of muonlm.train.peak_flops. Node: NVLink or Infinity Fabric, half of the figure
# that counts both directions; the L40S has PCIe 4.0 x16. Networks: those of the vendors' own eight-GPU machines (DGX
# A100: 200 Gbit/s a GPU; DGX H100, H200, B200 and MI300X platforms: 400). The CPU is one core: float32 as in
# docs/distributed-muon.md, the rest rounded.
DEVICES: dict[str, Device] = {
    "a100-40gb": Device("cuda", 312e12, int(39.4 * GIB), 1.555e12, 300e9, 200),
    "a100-80gb": Device("cuda", 312e12, int(79.1 * GIB), 2.039e12, 300e9, 200),
    "h100-80gb": Device("cuda", 989e12, int(79.1 * GIB), 3.35e12, 450e9, 400),
    "h200-141gb": Device("cuda", 989e12, int(139.8 * GIB), 4.8e12, 450e9, 400),
    "b200-180gb": Device("cuda", 2250e12, int(178.4 * GIB), 8e12, 900e9, 400),
    "mi300x-192gb": Device("cuda", 1307e12, int(191.9 * GIB), 5.3e12, 448e9, 400),
    "l40s-48gb": Device("cuda", 362e12, int(44.4 * GIB), 0.864e12, 32e9, 100),
    "cpu": Device("cpu", 75e9, 0, 10e9, 2e9, 10),
}


# Whole steps on one H100, torch 2.11, bfloat16 (tests/unit/plan/test_gpu_memory.py prints tokens a second): of the peak
# 0.19 with width 768 and 0.34 with width 2048, compiled 0.34 and 0.43. Published tokens a second of Llama 3.1 8B on
# H100, compiled, come to about 0.4 (torchtitan, arXiv:2410.06511).
EAGER_SHARE, COMPILED_SHARE = 0.3, 0.4


@dataclass(frozen=True)
class Machines:
    """Devices in nodes, and the shares of their data sheets that are assumed to be attained.

    Fields:
        name, device: of `DEVICES`, with what the command line overrode.
        per_node: ranks of a node; ranks fill node after node.
        matmul_share: of the peak, by forward and backward pass of the model when they wait for no other rank; what
            is no product is in it. 0 takes `EAGER_SHARE` or `COMPILED_SHARE`.
        newton_schulz_share: of the peak, by Newton-Schulz.
        link_share: of bandwidths, memory's too.
        overlap_share: of the model's computation, behind which FSDP2, DDP and ZeRO can hide what they send.
        usable_share: of the memory, after the device's context and the allocator's fragments.
        is_here: the device is this machine, its memory a rank's part of what is left here.
    """

    name: str
    device: Device
    per_node: int
    matmul_share: float = 0.0
    newton_schulz_share: float = 0.5
    link_share: float = 0.7
    overlap_share: float = 0.8
    usable_share: float = 0.95
    is_here: bool = False

    def with_shares(self, *, compiled: bool) -> Machines:
        """With a share of products for a run that torch.compile compiles or not, unless one is given."""
        return replace(self, matmul_share=self.matmul_share or (COMPILED_SHARE if compiled else EAGER_SHARE))

    @property
    def network_bandwidth(self) -> float:
        """Bytes a second of one rank to other nodes, by the data sheet."""
        return self.device.network_gbit * 1e9 / 8

    @property
    def usable_bytes(self) -> int:
        """Memory that a run can fill; 0 where it is not known."""
        return int(self.device.memory_bytes * self.usable_share)


def find_device(name: str) -> Device:
    """The device of that name. Raises UserError that lists the names, near ones first."""
    if name not in DEVICES:
        begun = [known for known in DEVICES if known.startswith(name.lower())]
        near = begun or difflib.get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.5)
        guess = f"; did you mean {' or '.join(near)}?" if near else ";"
        raise UserError(f"no data sheet of {name!r}{guess} there are {', '.join(DEVICES)}")
    return DEVICES[name]
