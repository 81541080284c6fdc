"""Activation checkpointing: what a block computes anew in the backward pass rather than keep (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]


def recomputed(function: Callable[..., Any], kind: Recompute, *args: Any) -> Any:
    """`function(*args)`; of its activations, those that `kind` says are computed anew in the backward pass.

    full: all. selective: all but results of matrix products and of attention, which are the dear ones. The function
    must be deterministic and may not overwrite what is kept; it may communicate, which it then does again.
    """
    if kind == "none" or not torch.is_grad_enabled():
        return function(*args)
    if kind == "full":
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


_KEPT = {
    "aten.mm",
    "aten.addmm",
    "aten._grouped_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
}


def _policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    name, _, overload = str(operation).rpartition(".")
    is_kept = name in _KEPT and overload == "default"
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
