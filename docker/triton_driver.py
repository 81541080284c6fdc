"""Compile the C module through which Triton talks to the NVIDIA driver into $TRITON_CACHE_DIR, without a driver.

Triton finds its modules by a hash of their source, so that it takes this one on a machine that has no C compiler. An
empty library of the driver's name is enough to link and load it: its symbols are looked up when they are called.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Compile and load the module."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "empty.c", Path(folder) / "libcuda.so.1"
        source.touch()
        subprocess.run(["gcc", "-shared", source, "-o", library, "-Wl,-soname,libcuda.so.1"], check=True)
        ctypes.CDLL(str(library))
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        sys.setdlopenflags(os.RTLD_LAZY)

        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()


if __name__ == "__main__":
    main()
