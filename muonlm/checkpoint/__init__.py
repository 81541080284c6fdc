"""Checkpoints: saved in parts by all ranks, restored on any number of ranks, complete or ignored."""
