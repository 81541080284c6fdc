"""Optimizers against each other: equal tuning for every arm, separately decayed budgets, paired seeds, the token ratio.

`run` does the whole comparison, `trials` says which runs are needed, `workers` executes them, `progress` shows them,
`ratio` turns end losses into a ratio with its interval, `verdict` puts that into words.
"""
