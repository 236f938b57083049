"""Inputs and weights of made-up linear layers, shaped like real ones: correlated columns, a few of them outliers."""

from __future__ import annotations

import torch


def correlated_inputs(rows, width, seed=0, outliers=0, size=30.0):
    """(rows, width) with a spectrum that falls like 1/sqrt(k); the first of `outliers` columns, spread out, are large."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.arange(1, width + 1) ** -0.5
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    x = torch.randn(rows, width, generator=generator) * fall * width**0.5 @ turn.t()
    if outliers:
        x[:, torch.arange(outliers) * (width // outliers) + 3] *= size
    return x


def heavy_weight(rows, width, seed=0):
    """(rows, width), Student's t with five degrees of freedom: like trained weights, with some far from the rest."""
    generator = torch.Generator().manual_seed(1000 + seed)
    normal = torch.randn(rows, width, generator=generator)
    others = torch.randn(5, rows, width, generator=generator).square().mean(0)
    return 0.02 * normal / others.sqrt()
