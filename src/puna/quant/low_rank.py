"""What rounding got wrong, kept beside the weight as a product of two thin matrices: W x = Q x + U (V x).

The best product of rank R for the weight's own error is its truncated SVD (LoRC: ZeroQuant-V2, Yao et al. 2023,
arXiv:2303.08302, section 5). Outputs are what counts, though: with H = S S^T, the sum of x x^T, the best product for
the outputs is the truncated SVD of (W - Q) S, times S^-1 (Zhang et al. 2024, arXiv:2410.06040). S is here the Cholesky
factor of H or, where only mean squares are known, the root of its diagonal.

Large matrices: a randomised SVD with subspace iterations, Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithms
4.4 and 5.1; the same numbers at every call.

Shapes: N outputs, D inputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats.packed import Packed

_EXACT = 1024  # up to this smaller side a whole SVD is cheap
_ITERATIONS = 6  # rounding errors are like noise: singular values fall slowly, fewer passes would miss some
_DAMPING = 1e-4  # of the mean of H's diagonal; directions no input takes must not be blown up


def low_rank_error(
    weight_ND: Tensor,
    rounded: Packed | Tensor,
    rank: int,
    *,
    second_DD: Tensor | None = None,
    mean_square_D: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """(up_NR, down_RD) in dtype, for `QuantizedWeight`; R is at most the smaller side of the weight.

    second_DD, mean_square_D: of the inputs (`Moments`); the first counts if both are given, plain LoRC if none.
    Errors: `PunaError` if dtype cannot hold a factor.
    """
    assert rank > 0
    rounded_ND = rounded if isinstance(rounded, Tensor) else rounded.dequantize()
    error_ND = weight_ND.detach().float() - rounded_ND.float()
    if second_DD is not None:
        root_DD = _root(second_DD)
        up_NR, down_RD = _truncated(error_ND @ root_DD, rank)
        down_RD = torch.linalg.solve_triangular(root_DD, down_RD, upper=False, left=False)
    elif mean_square_D is not None:
        root_D = (mean_square_D.float() + _DAMPING * mean_square_D.float().mean()).sqrt().clamp_(min=1e-20)
        up_NR, down_RD = _truncated(error_ND * root_D, rank)
        down_RD = down_RD / root_D
    else:
        up_NR, down_RD = _truncated(error_ND, rank)
    return _stored(*_balanced(up_NR, down_RD), dtype)


def _root(second_DD: Tensor) -> Tensor:
    """L with L L^T = H, damped as far as it must be."""
    damped_DD = second_DD.float().clone()
    added = _DAMPING * float(damped_DD.diagonal().mean()) or 1.0
    while True:
        damped_DD.diagonal().add_(added)
        root_DD, failed = torch.linalg.cholesky_ex(damped_DD)
        if not int(failed):
            return root_DD
        added *= 10
        assert added < torch.inf, "second moments must be finite"


def _truncated(matrix_ND: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The closest product (N, R) (R, D), each side with the root of the singular values."""
    rank = min(rank, *matrix_ND.shape)
    thin = rank < min(matrix_ND.shape) // 4
    if min(matrix_ND.shape) > _EXACT and thin:
        u, s, vh = _randomised_svd(matrix_ND, rank)
    else:
        u, s, vh = torch.linalg.svd(matrix_ND, full_matrices=False)
    root_R = s[:rank].sqrt()
    return u[:, :rank] * root_R, root_R[:, None] * vh[:rank]


def _randomised_svd(matrix_ND: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix_ND.shape[1], 2 * rank + 8, generator=generator).to(matrix_ND.device)
    basis = torch.linalg.qr(matrix_ND @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix_ND @ torch.linalg.qr(matrix_ND.t() @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.t() @ matrix_ND, full_matrices=False)
    return basis @ u, s, vh


def _balanced(up_NR: Tensor, down_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of a column and a row gets the same largest number: 16 bits hold both as well as they can."""
    up_R, down_R = up_NR.abs().amax(0), down_RD.abs().amax(1)
    shift_R = torch.where((up_R > 0) & (down_R > 0), (down_R / up_R).sqrt(), 1.0)
    return up_NR * shift_R, down_RD / shift_R[:, None]


def _stored(up_NR: Tensor, down_RD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    stored = up_NR.to(dtype), down_RD.to(dtype).contiguous()
    if not all(bool(part.isfinite().all()) for part in stored):
        raise PunaError(
            f"the low-rank error reaches {float(torch.maximum(up_NR.abs().amax(), down_RD.abs().amax())):.3g}, which "
            f"{str(dtype).removeprefix('torch.')} cannot hold",
            "keep it in bfloat16",
        )
    return stored
