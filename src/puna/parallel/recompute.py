"""Activation checkpointing and compilation of blocks, in place: names of modules and parameters stay as they are.

Memory of a block per token, against time: `none` keeps every intermediate; `selective` keeps the results of attention
and of every second matrix product and recomputes the rest; `full` keeps the block's input and recomputes all of it (a
third more arithmetic). Sources: Chen et al. 2016, arXiv:1604.06174; selective by operation as in torchtitan,
arXiv:2410.06511.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from puna.base.console import PunaError

MODES = ("none", "selective", "full")
_aten = torch.ops.aten
PRODUCTS = {_aten.mm.default, _aten.addmm.default}
# One name per backend; those that a build of torch lacks are skipped.
ATTENTION = {
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(_aten, name)
}


def checkpoint_activations(blocks: list[nn.Module], mode: str) -> None:
    """Make each block's forward forget its intermediates and recompute them in the backward pass.

    Under `selective` torch watches every operation, so attention and products are torch's own, not the native kernels.
    """
    if mode not in MODES:
        raise PunaError(f"activation_checkpointing {mode!r} is not known", f"use {', '.join(MODES)}")
    if mode == "none":
        return
    # No dropout in this model: no random state to remember.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        settings["context_fn"] = _selective_contexts
    for block in blocks:
        _replace_forward(block, partial(checkpoint, block.forward, **settings))


def compile_blocks(blocks: list[nn.Module], compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Compile each block's forward with `compiler`, e.g. `torch.compile`. Hooks, such as FSDP2's, stay outside."""
    for block in blocks:
        _replace_forward(block, compiler(block.forward))


def _replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    # Through object: a wrapping module would rename every parameter, which checkpoints and the placement table read.
    object.__setattr__(block, "forward", forward)


def _selective_contexts() -> tuple[Any, Any]:
    counts = {False: 0, True: 0}  # of products seen in the forward pass and in its recomputation

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in PRODUCTS:
            counts[ctx.is_recompute] += 1
            keep = counts[ctx.is_recompute] % 2 == 1
        else:
            keep = op in ATTENTION
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(policy)
    return contexts
