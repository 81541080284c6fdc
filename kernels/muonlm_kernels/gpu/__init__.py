"""Triton kernels of the Newton-Schulz iteration and of Muon's momentum; its modules but `padding` need triton.

`backend` is what callers use. `symmetric`, `update` and `elementwise` hold the kernels with their launches, `tma` the
forms that load by tensor descriptors, `configs` the launch configurations that are shipped, one table for launching and
for compiling ahead of time.
"""
