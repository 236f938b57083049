"""Everything a quantized linear layer is made of, and what it computes: the twin of every kernel.

    y = round(x) Q^T + (x V^T) U^T + b        Q: the packed weight; U, V: the low-rank error, if kept

`round(x)` is x where activations stay as they are, else int8 or float8 codes times their scales. With a threshold,
numbers of x that reach it keep full precision (LLM.int8(): Dettmers et al. 2022, arXiv:2208.07339, section 3; there a
column keeps it for all tokens that happen to be computed together, here each token for itself, so that an answer does
not depend on its neighbours). Low rank: ZeroQuant-V2's LoRC, Yao et al. 2023, arXiv:2303.08302, section 5.

Shapes: x (..., D), Q (N, D), U (N, R), V (R, D), y (..., N).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.formats.activations import dequantize_activation, quantize_activation
from puna.ops.formats.packed import Packed
from puna.ops.formats.scheme import Scheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A packed weight, how its inputs are rounded, and what else is added.

    activations: None keeps x; a token scheme is dynamic; a tensor scheme needs `input_scale` (1,) from calibration.
    threshold: 0, or the size from which a number of x counts as an outlier; needs a token scheme.
    up_NR, down_RD: the low-rank error (both or none).
    """

    packed: Packed
    activations: Scheme | None = None
    input_scale: Tensor | None = None
    threshold: float = 0.0
    up_NR: Tensor | None = None
    down_RD: Tensor | None = None

    def __post_init__(self) -> None:
        static = self.activations is not None and self.activations.granularity == "tensor"
        assert static == (self.input_scale is not None)
        assert not self.threshold or (self.activations is not None and not static)
        assert (self.up_NR is None) == (self.down_RD is None)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.packed.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        more = (self.input_scale, self.up_NR, self.down_RD)
        return self.packed.nbytes + sum(part.nbytes for part in more if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Everything that is stored, divided by the number of weights."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain weight (N, D) that stands for this one, low-rank part included; rounding of x is not in it."""
        weight = self.packed.dequantize()
        if self.up_NR is not None and self.down_RD is not None:
            weight = weight + self.up_NR.to(weight.dtype) @ self.down_RD.to(weight.dtype)
        return weight if dtype is None else weight.to(dtype)

    def round_inputs(self, x: Tensor) -> Tensor:
        """x as the packed weight sees it, in x's dtype."""
        if self.activations is None:
            return x
        if not self.threshold:
            return _rounded(x, self.activations, self.input_scale)
        outliers = x.abs() >= self.threshold
        plain = _rounded(x.masked_fill(outliers, 0), self.activations, None)
        return torch.where(outliers, x, plain)

    def product(self, x: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """y by the definition above, in x's dtype with fp32 weights: exact and slow."""
        working = torch.float64 if x.dtype is torch.float64 else torch.float32
        y = F.linear(self.round_inputs(x).to(working), self.packed.dequantize(working))
        if self.up_NR is not None and self.down_RD is not None:
            y = y + F.linear(F.linear(x.to(working), self.down_RD.to(working)), self.up_NR.to(working))
        return (y if bias_N is None else y + bias_N).to(x.dtype)


def _rounded(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Tensor:
    codes, scales = quantize_activation(x, scheme, scale)
    return dequantize_activation(codes, scales, x.dtype)
