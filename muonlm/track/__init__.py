"""Metric records: metrics.jsonl always; console, TensorBoard and wandb when asked; the token ratio to another run."""
