"""Cross-entropy over a vocabulary that is cut over the ranks of a tensor-parallel group; logits are never gathered.

A chunk of tokens costs three numbers per token on the wire: the largest logit, the sum of exponentials and the target's
logit. Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3. Shapes: T tokens, D model width, V vocabulary, W this
rank's words, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from puna.ops import basic
from puna.ops.basic import IGNORE, chunk_tokens
from puna.ops.linear import linear
from puna.parallel.plan import bounds


def cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss: float = 0.0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """`ops.basic.cross_entropy`, also for a head that is a DTensor cut by words: (loss, nll), the same on every rank.

    hidden_TD holds all tokens, as the Transformer returns them; its gradient is this rank's words' part, which the
    Transformer's last norm sums on the way back.
    """
    if not isinstance(weight_VD, DTensor):
        return basic.cross_entropy(hidden_TD, weight_VD, targets_T, z_loss, chunk)
    mesh, vocab = weight_VD.device_mesh, weight_VD.shape[0]
    assert mesh.ndim == 1, "the head is still sharded by FSDP: run the model's forward first"
    words = bounds(vocab, mesh.get_local_rank(), mesh.size())
    chunk = chunk or chunk_tokens(-(-vocab // mesh.size()), hidden_TD.device.type)
    weight_WD = weight_VD.to_local()
    return _VocabularyParallel.apply(hidden_TD, weight_WD, targets_T, z_loss, chunk, words, mesh.get_group())


class _VocabularyParallel(Function):
    """As in `ops.basic`, gradients are made in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_WD: Tensor,
        targets_T: Tensor,
        z_loss: float,
        chunk: int,
        words: tuple[int, int],
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled(hidden_TD.device.type):
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(hidden_TD.device.type))
        weight = weight_WD.to(hidden_TD.dtype)
        exact = torch.promote_types(hidden_TD.dtype, torch.float32)
        need_h, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_h = torch.empty_like(hidden_TD) if need_h else None
        grad_w = torch.zeros_like(weight_WD, dtype=exact) if need_w else None
        loss = torch.zeros((), dtype=exact, device=hidden_TD.device)
        nll = torch.zeros_like(loss)
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_CD, targets_C = hidden_TD[rows], targets_T[rows]
            grad_CW, lse_C, target_C = _chunk(linear(hidden_CD, weight).to(exact), targets_C, z_loss, words, group)
            scored = targets_C != IGNORE
            chunk_nll = ((lse_C - target_C) * scored).sum()
            nll += chunk_nll
            loss += chunk_nll + z_loss * (lse_C.square() * scored).sum()
            grad_CW = grad_CW.to(hidden_TD.dtype)
            if grad_h is not None:
                torch.mm(grad_CW, weight, out=grad_h[rows])
            if grad_w is not None:
                grad_w += grad_CW.T @ hidden_CD
        ctx.save_for_backward(grad_h, grad_w)
        ctx.weight_dtype = weight_WD.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_h, grad_w), scale = ctx.saved_tensors, gradients[0]
        if grad_h is not None:
            grad_h = grad_h * scale.to(grad_h.dtype)
        if grad_w is not None:
            grad_w = (grad_w * scale).to(ctx.weight_dtype)
        return grad_h, grad_w, None, None, None, None, None


def _chunk(
    logits_CW: Tensor, targets_C: Tensor, z_loss: float, words: tuple[int, int], group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """(d loss / d logits, logsumexp over all words, the target's logit) of one chunk. The gradient overwrites logits.

    With m the largest logit of all words:  lse = m + log sum exp(l - m),  d loss / d l = (1 + 2 z lse) p - onehot.
    """
    first, end = words
    largest_C = logits_CW.amax(-1)
    dist.all_reduce(largest_C, dist.ReduceOp.MAX, group)
    here = (targets_C >= first) & (targets_C < end)
    index = (targets_C - first).masked_fill(~here, 0)[:, None]
    target_C = logits_CW.gather(1, index)[:, 0].masked_fill(~here, 0)
    exp_CW = logits_CW.sub_(largest_C[:, None]).exp_()
    sums_2C = torch.stack((exp_CW.sum(-1), target_C))
    dist.all_reduce(sums_2C, group=group)
    sum_C, target_C = sums_2C
    lse_C = largest_C + sum_C.log()
    scored = targets_C != IGNORE
    grad_CW = exp_CW.mul_((scored * (1 + 2 * z_loss * lse_C) / sum_C)[:, None])
    return grad_CW.scatter_add_(1, index, -here[:, None].to(grad_CW.dtype)), lse_C, target_C
