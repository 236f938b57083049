"""The optimizer, its parameter groups and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from puna.train.recipe import OptimSection


def build_optimizer(parameters: Iterable[Tensor], optim: OptimSection) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (norms, biases) do not."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def learning_rate(optim: OptimSection, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`: linear to the peak, then cosine to `min_lr_ratio` of it.

    Source of the cosine: Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
