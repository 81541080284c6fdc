"""Distributed LLM pretraining with a ZeRO-aware Muon, measured against AdamW."""

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"

# In a checkout that was never installed, `muonlm_kernels` lies under kernels/, which is a source root and not
# a package (a root package called `kernels` would shadow the Hugging Face hub client of that name).
if importlib.util.find_spec("muonlm_kernels") is None:
    _kernels = Path(__file__).resolve().parent.parent / "kernels"
    if (_kernels / "muonlm_kernels").is_dir():
        sys.path.insert(0, str(_kernels))
