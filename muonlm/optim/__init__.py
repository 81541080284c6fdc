"""Which parameter gets which rule, Muon's maths on whole matrices, who computes what, and the exchange between ranks.

A one-way street: `rules` -> `assign` -> `exchange` -> `muon`; `build` joins them for a training run.
"""
