"""Before rounding: multiply a column of a weight by s, divide what feeds it by s. The model stays the same, rounding's
damage does not.

    awq      s = mean|x|^a / mean|w|^(1-a)      columns that matter get more of the range: weights in few bits
    smooth   s = max|x|^a / max|w|^(1-a)        outliers of the inputs move into the weights: inputs in eight bits

a is searched by what counts, the error of the outputs on sampled inputs with everything rounded that will be; s = 1 is
a candidate, so nothing gets worse (on the sample). Sources: AWQ, Lin et al. 2023, arXiv:2306.00978, section 3.2;
SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, section 4.

`FOLDS` lists who can take 1/s: a norm's weight, or the rows of the linear layer before where nothing but a product lies
between: up_proj -> down_proj, and v_proj -> o_proj, where several query heads share one head of v and so must share s.

Shapes: N outputs, D inputs, T sampled inputs, P rows of the producer (D but for shared heads).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats.activations import dequantize_activation, quantize_activation
from puna.ops.formats.fake import fake_quantize
from puna.ops.formats.rounding import symmetric_scale
from puna.ops.formats.scheme import Scheme
from puna.quant.moments import Moments

AWQ_SHARES = tuple(i / 20 for i in range(21))
SMOOTH_SHARES = tuple(0.3 + i / 20 for i in range(13))
_LEAST, _MOST = 1e-3, 1e3  # scales outside, after centering on 1, would trade one outlier for another
_ROWS = 1024  # of a weight that candidates are tried on, evenly spread
_SMALL = 1e-5  # of the mean: below it a column counts as this large, dead columns included


@dataclass(frozen=True)
class Fold:
    """`producer` takes 1/s, the inputs of all `consumers` are multiplied by s; names within a block."""

    producer: str
    consumers: tuple[str, ...]


FOLDS = (
    Fold("attn_norm", ("attn.q_proj", "attn.k_proj", "attn.v_proj")),
    Fold("attn.v_proj", ("attn.o_proj",)),
    Fold("mlp_norm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
)


@dataclass(frozen=True)
class Rescale:
    """scale_D to multiply the consumers' columns with; all 1 if nothing was gained.

    share: the exponent a, None for all 1. loss: squared error of the outputs on the sample; plain_loss: with s = 1.
    curve: (a, loss) of every candidate, on the rows that candidates are tried on.
    """

    scale_D: Tensor
    share: float | None
    loss: float
    plain_loss: float
    curve: tuple[tuple[float, float], ...]

    @property
    def repaired(self) -> float:
        """The share of rounding's damage that is gone: 0 for none."""
        return 1 - self.loss / self.plain_loss if self.plain_loss > 0 else 0.0


def awq(
    weights: Sequence[Tensor],
    moments: Moments,
    schemes: Sequence[Scheme | None],
    activations: Scheme | None = None,
    *,
    shares: Sequence[float] = AWQ_SHARES,
    shared_D: Tensor | None = None,
) -> Rescale:
    """Scales for linear layers (N, D) of different N with one input; a scheme of None is a layer that stays as it is.

    shared_D: see `shared_heads`.
    """
    inputs_P = _floored(_pooled(moments.abs_mean_D, shared_D, "mean"))
    weight_P = _floored(_pooled(_relative_size(weights, schemes), shared_D, "mean"))
    scales = _candidates(inputs_P, weight_P, shares, shared_D)
    return _search(scales, weights, moments, schemes, activations, shares)


def smooth(
    weights: Sequence[Tensor],
    moments: Moments,
    schemes: Sequence[Scheme | None],
    activations: Scheme | None,
    *,
    shares: Sequence[float] = SMOOTH_SHARES,
    shared_D: Tensor | None = None,
) -> Rescale:
    """As `awq`, from the largest input and weight of every column; activations: how inputs are rounded.

    shares: one number takes that exponent, unless it is worse than s = 1.
    """
    inputs_P = _floored(_pooled(moments.absmax_D, shared_D, "amax"))
    columns = [weight.detach().abs().amax(0).float() for weight in weights]
    weight_P = _floored(_pooled(torch.stack(columns).amax(0), shared_D, "amax"))
    scales = _candidates(inputs_P, weight_P, shares, shared_D)
    return _search(scales, weights, moments, schemes, activations, shares)


def shared_heads(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor | None:
    """For each input of o_proj (D,) the row of v_proj that feeds it; None where every row feeds one input."""
    if num_heads == num_kv_heads:
        return None
    heads = torch.arange(num_heads, device=device) // (num_heads // num_kv_heads)
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=device)).flatten()


def apply_scale(
    tensors: MutableMapping[str, Tensor], fold: Fold, scale_D: Tensor, shared_D: Tensor | None = None
) -> None:
    """Put new tensors in the place of a block's: the producer's weight and bias / s, the consumers' weights * s.

    Errors: `PunaError` if s differs among inputs that one row of the producer feeds, is not positive, or not of the
    consumers' width.
    """
    rows = tensors[f"{fold.producer}.weight"].shape[0]
    scale_P = _producer_scale(scale_D, shared_D, rows, fold)
    for part in ("weight", "bias"):
        name = f"{fold.producer}.{part}"
        if name in tensors:
            tensor = tensors[name]
            tensors[name] = (tensor.float() / (scale_P if tensor.dim() == 1 else scale_P[:, None])).to(tensor.dtype)
    for consumer in fold.consumers:
        name = f"{consumer}.weight"
        tensors[name] = (tensors[name].float() * scale_D).to(tensors[name].dtype)


def _producer_scale(scale_D: Tensor, shared_D: Tensor | None, rows: int, fold: Fold) -> Tensor:
    if not bool(((scale_D > 0) & scale_D.isfinite()).all()):
        raise PunaError(f"scales for {fold.producer} are not all positive numbers", "search them again")
    scale_P = scale_D
    if shared_D is not None:
        scale_P = torch.ones(rows, device=scale_D.device).index_copy(0, shared_D, scale_D)
    if len(scale_P) != rows or (shared_D is not None and not torch.equal(scale_P[shared_D], scale_D)):
        raise PunaError(
            f"{len(scale_D)} scales cannot move into the {rows} rows of {fold.producer}",
            "inputs fed by one row must share their scale: hand in shared_heads(...) to the search and here",
        )
    return scale_P


def _candidates(inputs_P: Tensor, weight_P: Tensor, shares: Sequence[float], shared_D: Tensor | None) -> list[Tensor]:
    """s (D,) for every share: largest times smallest is 1, so that neither side's numbers grow, nothing too far out.

    Powers are taken before inputs that share a row of the producer get its s: all of them get the same, to the bit.
    """
    scales = []
    for share in shares:
        scale_P = inputs_P**share / weight_P ** (1 - share)
        scale_P = (scale_P / (scale_P.amax() * scale_P.amin()).sqrt()).clamp_(_LEAST, _MOST)
        scales.append(scale_P if shared_D is None else scale_P[shared_D])
    return scales


def _search(
    candidates: Sequence[Tensor],
    weights: Sequence[Tensor],
    moments: Moments,
    schemes: Sequence[Scheme | None],
    activations: Scheme | None,
    shares: Sequence[float],
) -> Rescale:
    moments.check()
    pairs = list(zip(weights, schemes, strict=True))
    tried = [_some_rows(weight_ND, scheme) for weight_ND, scheme in pairs]
    curve = _losses(tried, moments, activations, candidates)
    best = min(range(len(curve)), key=curve.__getitem__)
    ones_D = torch.ones_like(moments.absmax_D)
    plain_loss, loss = _losses(pairs, moments, activations, [ones_D, candidates[best]])
    told = tuple(zip(shares, curve, strict=True))
    if loss < plain_loss:
        return Rescale(candidates[best], shares[best], loss, plain_loss, told)
    return Rescale(ones_D, None, plain_loss, plain_loss, told)


def _some_rows(weight_ND: Tensor, scheme: Scheme | None) -> tuple[Tensor, Scheme | None]:
    """Every k-th row, where rows do not share scales: enough to tell candidates apart."""
    step = -(-weight_ND.shape[0] // _ROWS) if _is_by_row(scheme) else 1
    return weight_ND[:: max(1, step)], scheme


def _losses(
    pairs: Sequence[tuple[Tensor, Scheme | None]],
    moments: Moments,
    activations: Scheme | None,
    scales: Sequence[Tensor],
) -> list[float]:
    """For every s the squared error of all outputs on the sample, weights times s and inputs over s rounded."""
    parts = [(part_ND, scheme) for weight_ND, scheme in pairs for part_ND in _parts(weight_ND, scheme)]
    wanted = [moments.sample_TD @ part_ND.float().t() for part_ND, _ in parts]
    totals = moments.absmax_D.new_zeros(len(scales), dtype=torch.float64)
    for total, scale_D in zip(totals, scales, strict=True):
        x_TD = _rounded_inputs(moments.sample_TD / scale_D, moments.absmax_D / scale_D, activations)
        for (part_ND, scheme), wanted_TN in zip(parts, wanted, strict=True):
            scaled_ND = part_ND * scale_D
            rounded_ND = scaled_ND if scheme is None else fake_quantize(scaled_ND, scheme)
            total += (x_TD @ rounded_ND.t()).sub_(wanted_TN).square_().sum(dtype=torch.float64)
    return [float(total) for total in totals.tolist()]


def _parts(weight_ND: Tensor, scheme: Scheme | None) -> tuple[Tensor, ...]:
    """The weight in ranges of rows, so that what is held beside it is bounded; whole where rows share scales."""
    return weight_ND.detach().split(_ROWS if _is_by_row(scheme) else max(1, weight_ND.shape[0]))


def _is_by_row(scheme: Scheme | None) -> bool:
    return scheme is None or scheme.granularity in ("channel", "group")


def _rounded_inputs(x_TD: Tensor, absmax_D: Tensor, activations: Scheme | None) -> Tensor:
    if activations is None:
        return x_TD
    static = activations.granularity == "tensor"
    scale = symmetric_scale(absmax_D.amax().reshape(1), activations) if static else None
    return dequantize_activation(*quantize_activation(x_TD, activations, scale))


def _relative_size(weights: Sequence[Tensor], schemes: Sequence[Scheme | None]) -> Tensor:
    """Mean over all rows of |w| / the largest of its tile's row: how much of the range a column uses."""
    total_D, rows = weights[0].new_zeros(weights[0].shape[1], dtype=torch.float32), 0
    for weight_ND, scheme in zip(weights, schemes, strict=True):
        width = weight_ND.shape[1] if scheme is None else scheme.tile((weight_ND.shape[0], weight_ND.shape[1]))[1]
        size = weight_ND.detach().float().abs().unflatten(1, (-1, width))
        total_D += (size / size.amax(2, keepdim=True).clamp(min=1e-30)).sum(0).flatten()
        rows += weight_ND.shape[0]
    return total_D / rows


def _pooled(values_D: Tensor, shared_D: Tensor | None, how: str) -> Tensor:
    """One value per row of the producer (P,), from all inputs it feeds."""
    if shared_D is None:
        return values_D
    rows = values_D.new_zeros(int(shared_D.max()) + 1)
    return rows.scatter_reduce(0, shared_D, values_D, how, include_self=False)


def _floored(values_D: Tensor) -> Tensor:
    floor = _SMALL * values_D.mean()
    return values_D.clamp(min=floor) if floor > 0 else torch.ones_like(values_D)
