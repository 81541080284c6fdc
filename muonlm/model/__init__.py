"""The decoder: its layers, initialisation, fused loss, and parameter and FLOP counts from shapes alone.

`gpt` assembles the modules, `layers` and `attention` hold the operations that are fused on a CPU, `loss` the
linear + cross-entropy, `regions` and `parallel` the tensor parallelism, `build` the seeded initialisation, and `flops`
(which imports no torch) the counts.
"""
