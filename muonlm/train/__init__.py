"""The training loop: set-up, steps, evaluation, stopping and going on. `loop.train` is the entry."""
