"""What some of the keys contribute to attention, and how contributions merge into the whole.

Softmax over all keys is a weighted mean of softmaxes over parts of them. With lse = log of a part's summed exp(score):

    lse = log(exp lse_1 + exp lse_2),    out = out_1 exp(lse_1 - lse) + out_2 exp(lse_2 - lse)

and, given the whole's out and lse, each part's gradients stand alone: p = exp(score - lse) needs no other part.
Sources: Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135, section 3.1 and appendix B.

Shapes: N documents side by side, T queries, S keys, H query heads, G key/value heads (H = G R), K head width.
Two geometries occur. `offset` is the distance from the first key to the first query: 0 for causal attention of a
document within itself (T = S), or at least S where all keys lie before all queries, so that only a window can hide any.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 2**26  # scores of one tile in `attend_part_twin`: 256 MiB in fp32

aten = torch.ops.aten


def attend_part(
    q_NTHK: Tensor, k_NSGK: Tensor, v_NSGK: Tensor, offset: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention over these keys alone: (out (N, T, H, K) in q's dtype, lse (N, T, H) fp32 in nats).

    Every query must see at least one of the keys. A window of w lets a token see itself and the w - 1 before it.
    """
    if not _fused(q_NTHK, offset, window):
        return attend_part_twin(q_NTHK, k_NSGK, v_NSGK, offset, window)
    groups = _groups(q_NTHK, k_NSGK, offset)
    q, k, v = _fold(q_NTHK, groups), _spread(k_NSGK, groups), _spread(v_NSGK, groups)
    if q.is_cpu:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, offset == 0)
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, offset == 0)[:2]
    tokens = q_NTHK.shape[1]
    return _unfold(out, tokens), _unfold(lse[..., None], tokens).squeeze(-1)


def attend_part_backward(
    d_out_NTHK: Tensor, q_NTHK: Tensor, k_NSGK: Tensor, v_NSGK: Tensor, out_NTHK: Tensor, lse_NTH: Tensor,
    offset: int, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v through these keys alone. `out` and `lse` are the whole's, after all merging."""
    if not _fused(q_NTHK, offset, window):
        return attend_part_twin_backward(d_out_NTHK, q_NTHK, k_NSGK, v_NSGK, out_NTHK, lse_NTH, offset, window)
    groups, tokens = _groups(q_NTHK, k_NSGK, offset), q_NTHK.shape[1]
    q, k, v = _fold(q_NTHK, groups), _spread(k_NSGK, groups), _spread(v_NSGK, groups)
    d_out, out = _fold(d_out_NTHK, groups), _fold(out_NTHK, groups)
    lse = _fold(lse_NTH[..., None], groups).squeeze(-1).contiguous()
    if q.is_cpu:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        d_q, d_k, d_v = backward(d_out, q, k, v, out, lse, 0.0, offset == 0)
    else:
        d_q, d_k, d_v = _flash_backward(d_out, q, k, v, out, lse, offset == 0)
    kv_heads = k_NSGK.shape[2]
    return _unfold(d_q, tokens), _gather(d_k, kv_heads), _gather(d_v, kv_heads)


def attend_part_twin(
    q_NTHK: Tensor, k_NSGK: Tensor, v_NSGK: Tensor, offset: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """`attend_part` in plain torch, for any device, dtype and window; tiles of queries bound the memory."""
    groups = k_NSGK.shape[2]
    outputs, sums = [], []
    for rows, keys in _tiles(q_NTHK, k_NSGK.shape[1], offset, window):
        scores = _scores(q_NTHK[:, rows], k_NSGK[:, keys], offset + rows.start - keys.start, window)
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp() @ _spread(v_NSGK[:, keys], groups).float()
        tokens = rows.stop - rows.start
        outputs.append(_unfold(out, tokens).to(q_NTHK.dtype))
        sums.append(_unfold(lse, tokens).squeeze(-1))
    return torch.cat(outputs, 1), torch.cat(sums, 1)


def attend_part_twin_backward(
    d_out_NTHK: Tensor, q_NTHK: Tensor, k_NSGK: Tensor, v_NSGK: Tensor, out_NTHK: Tensor, lse_NTH: Tensor,
    offset: int, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`attend_part_backward` in plain torch: with P = exp(score - lse) and dS = P (dP - rowsum(dO O)) / sqrt(K)."""
    groups, scale = k_NSGK.shape[2], q_NTHK.shape[-1] ** -0.5
    d_queries, d_k, d_v = [], *(torch.zeros_like(x, dtype=torch.float32) for x in (k_NSGK, v_NSGK))
    for rows, keys in _tiles(q_NTHK, k_NSGK.shape[1], offset, window):
        scores = _scores(q_NTHK[:, rows], k_NSGK[:, keys], offset + rows.start - keys.start, window)
        q, d_out, out = (_fold(x[:, rows], groups).float() for x in (q_NTHK, d_out_NTHK, out_NTHK))
        weights = (scores - _fold(lse_NTH[:, rows, :, None], groups)).exp()
        d_weights = d_out @ _spread(v_NSGK[:, keys], groups).float().mT
        d_scores = weights * (d_weights - (d_out * out).sum(-1, keepdim=True)) * scale
        d_q = d_scores @ _spread(k_NSGK[:, keys], groups).float()
        d_queries.append(_unfold(d_q, rows.stop - rows.start).to(q_NTHK.dtype))
        d_k[:, keys] += _gather(d_scores.mT @ q, groups)
        d_v[:, keys] += _gather(weights.mT @ d_out, groups)
    return torch.cat(d_queries, 1), d_k, d_v


def merge(out_THK: Tensor, lse_TH: Tensor, part_THK: Tensor, part_lse_TH: Tensor) -> None:
    """Add a part's contribution to the whole, in place and in fp32. Begin with out 0 and lse -inf."""
    total_TH = torch.logaddexp(lse_TH, part_lse_TH)
    out_THK.mul_((lse_TH - total_TH).exp()[..., None])
    out_THK.add_(part_THK * (part_lse_TH - total_TH).exp()[..., None])
    lse_TH.copy_(total_TH)


def _fused(q: Tensor, offset: int, window: int | None) -> bool:
    """True where torch's flash attention, which returns lse, can take the part: no window hides anything."""
    if window is not None and window < offset + q.shape[1]:
        return False
    half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return half if q.is_cuda else q.is_cpu


def _groups(q_NTHK: Tensor, k_NSGK: Tensor, offset: int) -> int:
    """Heads of a fused call. Without a causal edge all queries of a kv head go in as rows, and k needs no copies."""
    return q_NTHK.shape[2] if offset == 0 else k_NSGK.shape[2]


def _fold(x_NTHK: Tensor, groups: int) -> Tensor:
    """(N, groups, R T, K): the R query heads that share a kv head, one under the other."""
    return x_NTHK.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(x_NGXK: Tensor, tokens: int) -> Tensor:
    """Back from `_fold`: (N, T, H, K)."""
    return x_NGXK.unflatten(2, (-1, tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _spread(x_NSGK: Tensor, groups: int) -> Tensor:
    """(N, groups, S, K): each kv head as often as `groups` asks."""
    x_NGSK, repeat = x_NSGK.transpose(1, 2), groups // x_NSGK.shape[2]
    return x_NGSK if repeat == 1 else x_NGSK.repeat_interleave(repeat, 1)


def _gather(d_x: Tensor, kv_heads: int) -> Tensor:
    """Back from `_spread`, copies summed: (N, S, G, K)."""
    return d_x.unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2)


def _tiles(q_NTHK: Tensor, keys: int, offset: int, window: int | None) -> list[tuple[slice, slice]]:
    """Rows of queries and the keys they can see at most; many queries where the keys are few."""
    documents, tokens, heads, _ = q_NTHK.shape
    size = max(64, _TILE // (documents * heads * min(keys, 2 * (window or keys))))
    found = []
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        first = 0 if window is None else max(0, offset + start - window + 1)
        found.append((slice(start, stop), slice(first, min(keys, offset + stop))))
    return found


def _scores(q_NTHK: Tensor, k_NSGK: Tensor, offset: int, window: int | None) -> Tensor:
    """Scaled and masked scores (N, G, R T, S) in fp32; -inf where a query may not look."""
    groups, tokens, keys = k_NSGK.shape[2], q_NTHK.shape[1], k_NSGK.shape[1]
    scores = _fold(q_NTHK, groups).float() @ _spread(k_NSGK, groups).float().mT * q_NTHK.shape[-1] ** -0.5
    query = torch.arange(offset, offset + tokens, device=scores.device)[:, None]
    distance = query - torch.arange(keys, device=scores.device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return scores.unflatten(2, (-1, tokens)).masked_fill(hidden, -torch.inf).flatten(2, 3)


def _flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA flash attention's backward; the random state it asks for is that of dropout, which there is none of."""
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    nothing = torch.empty((), dtype=torch.uint64, device=q.device)
    bounds, sizes = (None, None), (q.shape[2], k.shape[2])
    backward = aten._scaled_dot_product_flash_attention_backward
    return backward(d_out, q, k, v, out, lse, *bounds, *sizes, 0.0, causal, state, nothing)
