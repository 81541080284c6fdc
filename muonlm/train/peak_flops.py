"""Peak rates of common GPUs, for model FLOP utilisation."""

from __future__ import annotations

import re

# Dense bfloat16 matrix products with fp32 accumulation, in TFLOP/s, from the vendors' data sheets; figures that are
# given with 2:4 sparsity are halved. The first pattern that matches the device name counts, so that variants with
# other clocks stand before their family.
_PEAK_TFLOPS = (
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.0),
    (r"\b(H100|H200|H800|GH200)\b", 989.0),
    (r"\bH20\b", 148.0),
    (r"\bGB(200|300)\b", 2500.0),
    (r"\bB(200|300)\b", 2250.0),
    (r"\b(A100|A800)\b", 312.0),
    (r"\bA40\b", 149.7),
    (r"\bA30\b", 165.0),
    (r"\bA10G\b", 70.0),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.0),
    (r"\bL40\b", 181.0),
    (r"\bL4\b", 121.0),
    (r"RTX 6000 Ada", 364.0),
    (r"RTX A6000", 154.8),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
    (r"\bMI355X\b", 2500.0),
    (r"\bMI350X\b", 2300.0),
    (r"\b(MI300X|MI325X)\b", 1307.0),
    (r"\bMI250X\b", 191.5),  # one of the two dies, which is what torch calls a device
    (r"\bMI210\b", 181.0),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s by its name (`torch.cuda.get_device_name`); None when unknown."""
    for pattern, tflops in _PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return tflops * 1e12
    return None
