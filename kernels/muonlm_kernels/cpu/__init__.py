"""The CPU backend: the iteration as few, large, well-aligned matrix products over buffers that are kept.

Four things make it faster than the same products written plainly, and none changes what is computed:

- Rows of every buffer are an odd number of cache lines apart. Rows a power of two apart fall into the same cache sets,
  which costs 10 to 20 % of a product.
- The norm comes from the trace of the first X X^T, and 1 / norm goes into the coefficients of the first step. The only
  pass over the gradient is its cast.
- a X + (b A + c A^2) X is computed as (a I + b A + c A^2) X: no copy of X for the addition.
- Two steps share one X X^T where the matrix is long ("paired"): with A = X X^T and Q = a I + b A + c A^2, the next step
  needs (Q X)(Q X)^T = Q A Q. That is the Gram form of Dao-AILab's gram-newton-schulz, started anew after every second
  step, which keeps bfloat16 as accurate as the plain iteration.

Small matrices of one shape go through batched products instead. Shape suffixes: K matrices, M <= N sides of one.
"""
