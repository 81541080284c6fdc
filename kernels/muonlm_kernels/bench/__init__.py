"""Commands that measure and compare: `python -m muonlm_kernels.bench`, or `muonlm bench newton-schulz`."""
