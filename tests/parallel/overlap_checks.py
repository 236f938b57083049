"""Checks that run on ranks (see ranks.py): products in ring steps equal a collective and one product."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from puna.base.console import PunaError
from puna.parallel import overlap
from puna.parallel.overlap import gather_matmul, matmul_scatter
from puna.parallel.tensor import TensorParallel, gather

WIDTH, TOKENS = 24, 5  # tokens of one rank: odd, so that nothing is aligned by luck


def tensors(*shapes: tuple[int, ...], same: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0 if same else 1 + dist.get_rank())
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def gradients_of(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of a sum with other weights for every element and rank."""
    generator = torch.Generator().manual_seed(9 + dist.get_rank())
    total = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float32)).sum() for y in outputs)
    return list(torch.autograd.grad(total, inputs))


def close(found: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def gather_matmul_is_gather_then_matmul() -> None:
    for widths in ((16,), (16, 8, 12)):
        x_tD, *weights = tensors((TOKENS, WIDTH), *((n, WIDTH) for n in widths))
        whole_TD = gather(x_tD, dist.group.WORLD)
        right = [whole_TD @ weight.T for weight in weights]
        found = gather_matmul(x_tD, weights, dist.group.WORLD)
        close(found, right)
        close(gradients_of(found, [x_tD, *weights]), gradients_of(right, [x_tD, *weights]))


def matmul_scatter_is_matmul_then_scatter() -> None:
    tokens = TOKENS * dist.get_world_size()
    x_TK, weight_NK = tensors((tokens, 16), (WIDTH, 16))
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    right = TensorParallel(mesh).leave(x_TK @ weight_NK.T)
    found = matmul_scatter(x_TK, weight_NK, dist.group.WORLD)
    close([found], [right])
    close(gradients_of([found], [x_TK, weight_NK]), gradients_of([right], [x_TK, weight_NK]))


def frozen_weights_get_no_gradient() -> None:
    """And nothing travels for them: one ring of sums backward for x, none for w."""
    x_tD, weight = tensors((TOKENS, WIDTH), (16, WIDTH))
    x_TK, back = tensors((TOKENS * dist.get_world_size(), 16), (WIDTH, 16))
    steps = dist.get_world_size() - 1
    with MovingCount() as moves:
        y = gather_matmul(x_tD, [weight.detach()], dist.group.WORLD)[0]
        assert moves.seen["moved"] == steps
        y.sum().backward()
        assert moves.seen["moved"] == 2 * steps
        matmul_scatter(x_TK, back.detach(), dist.group.WORLD).sum().backward()
        assert moves.seen["moved"] == 4 * steps
        gather_matmul(x_tD.detach(), [weight], dist.group.WORLD)[0].sum().backward()
        assert moves.seen["moved"] == 6 * steps
    assert x_tD.grad is not None
    assert x_TK.grad is not None
    assert weight.grad is not None
    assert back.grad is None


class MovingCount:
    """Counts transfers, whichever loop starts them."""

    def __enter__(self) -> MovingCount:
        self.seen: Counter[str] = Counter()
        plain = overlap._Moving

        def counted(*inputs: Any) -> Any:
            self.seen["moved"] += 1
            return plain(*inputs)

        self.patch = patch.object(overlap, "_Moving", counted)
        self.patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.stop()


def bfloat16_and_autocast() -> None:
    x_tD, weight = tensors((TOKENS, WIDTH), (16, WIDTH))
    right = gather(x_tD, dist.group.WORLD) @ weight.T
    with torch.autocast("cpu", torch.bfloat16):
        found = gather_matmul(x_tD, [weight], dist.group.WORLD)[0]
        sums = matmul_scatter(found, weight.T, dist.group.WORLD)
    assert found.dtype == sums.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), right, rtol=3e-2, atol=0.1)
    sums.sum().backward()
    assert x_tD.grad.dtype == weight.grad.dtype == torch.float32


def tokens_that_do_not_divide_are_refused() -> None:
    x_TK, weight_NK = tensors((2 * dist.get_world_size() + 1, 16), (WIDTH, 16))
    with pytest.raises(PunaError, match="tokens in a micro-batch are not divisible by tp"):
        matmul_scatter(x_TK, weight_NK, dist.group.WORLD)


CHECKS = [
    gather_matmul_is_gather_then_matmul,
    matmul_scatter_is_matmul_then_scatter,
    frozen_weights_get_no_gradient,
    bfloat16_and_autocast,
    tokens_that_do_not_divide_are_refused,
]
WORLDS = {4: CHECKS, 2: CHECKS, 1: CHECKS[:2]}
