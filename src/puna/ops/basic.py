"""Small functions every Llama is made of: normalisation, activation, and a cross-entropy that never holds all logits.

Shapes: T tokens, D model width, F feed-forward width, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.linear import linear
from puna.ops.native import norm as native

IGNORE = -100  # a target that is not scored (padding, prompt, document boundary)

# (logits_CV, which it may write over; targets_C; z_loss; is the gradient wanted?)
# -> (logsumexp_C, the target's logit_C, d loss / d logits_CV or None)
Score = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor, Tensor | None]]


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Scale each token to unit root-mean-square, then by `weight_D`.

    Shapes: x_TD (..., D), weight_D (D,); returns x's shape and dtype. The mean is taken in fp32 for every dtype: in
    bf16 it would lose about three digits at width 4096. Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    if not torch.compiler.is_compiling() and native.serves_norm(x_TD, weight_D):
        return native.norm(x_TD, weight_D, eps)
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up. Source: Shazeer 2020, arXiv:2002.05202, section 2."""
    return F.silu(gate_TF) * up_TF


def cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss: float = 0.0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """Sum over scored tokens of -log p(target), and the same without the z term; logits exist `chunk` tokens at a time.

    Shapes: hidden_TD (T, D), weight_VD the output head (V, D), targets_T int64 with IGNORE where nothing is scored.
    Returns (loss, nll), two fp32 scalars: `loss = nll + z_loss * sum logsumexp^2`, and only `loss` carries gradients.
    They are sums: divide by the number of valid tokens of the whole step, so that accumulation weights tokens equally.
    `chunk` 0 picks a size whose logits are about 64 MiB on a CPU and 512 MiB on a GPU.
    Source of z-loss: PaLM, arXiv:2204.02311, section 5.
    """
    chunk = chunk or chunk_tokens(weight_VD.shape[0], hidden_TD.device.type)
    return chunked_cross_entropy(hidden_TD, weight_VD, targets_T, z_loss, chunk, _score)


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss: float, chunk: int, score: Score
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` with another `score` of a chunk's logits: for a head that holds some of the words."""
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, targets_T, z_loss, chunk, score)


def cross_entropy_twin(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` in plain torch, all logits at once: what the chunked one must equal."""
    logits_TV = (hidden_TD @ weight_VD.T).to(torch.promote_types(hidden_TD.dtype, torch.float32))
    nll = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")
    square = logits_TV.logsumexp(-1).square() * (targets_T != IGNORE)
    return nll + z_loss * square.sum(), nll.detach()


def chunk_tokens(vocab: int, device_type: str) -> int:
    """Tokens per chunk so that a chunk of fp32 logits stays within the budget named in `cross_entropy`."""
    budget = (512 if device_type == "cuda" else 64) * 2**20
    return max(64, budget // (4 * vocab))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, while a chunk's logits are at hand: three matmuls in all, none twice.

    For logits l = h W^T, lse = logsumexp(l), p = softmax(l):  d(nll)/dl = p - onehot,  d(z lse^2)/dl = 2 z lse p.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss: float, chunk: int, score: Score
    ) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled(hidden_TD.device.type):
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(hidden_TD.device.type))
        weight = weight_VD.to(hidden_TD.dtype)
        exact = torch.promote_types(hidden_TD.dtype, torch.float32)
        need_h, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_h = torch.empty_like(hidden_TD) if need_h else None
        grad_w = torch.zeros_like(weight_VD, dtype=exact) if need_w else None
        loss = torch.zeros((), dtype=exact, device=hidden_TD.device)
        nll = torch.zeros_like(loss)
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            rows_h = None if grad_h is None else grad_h[rows]
            chunk_nll, chunk_z = _chunk(hidden_TD[rows], weight, targets_T[rows], z_loss, score, rows_h, grad_w)
            nll += chunk_nll
            loss += chunk_nll + z_loss * chunk_z
        ctx.save_for_backward(grad_h, grad_w)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        grad_h, grad_w = ctx.saved_tensors
        if grad_h is not None:
            grad_h = grad_h * grad_loss.to(grad_h.dtype)
        if grad_w is not None:
            # Cast on the way: for 8B's head another fp32 copy is 2 GiB, at the fullest moment of the step.
            grad_w = torch.mul(grad_w, grad_loss, out=torch.empty_like(grad_w, dtype=ctx.weight_dtype))
        return grad_h, grad_w, None, None, None, None


def _chunk(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    z_loss: float,
    score: Score,
    grad_CD: Tensor | None,
    grad_VD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and squared logsumexp of a chunk's scored tokens; writes grad_CD, adds to grad_VD.

    A function of its own: its logits are gone before the next chunk's are made.
    """
    exact = torch.promote_types(hidden_CD.dtype, torch.float32)  # fp64 stays fp64, for tests of the maths
    wanted = grad_CD is not None or grad_VD is not None
    lse_C, target_C, grad_CV = score(linear(hidden_CD, weight_VD).to(exact), targets_C, z_loss, wanted)
    if grad_CV is not None:
        grad_CV = grad_CV.to(hidden_CD.dtype)
        if grad_CD is not None:
            torch.mm(grad_CV, weight_VD, out=grad_CD)
        if grad_VD is not None:
            _accumulate(grad_VD, grad_CV, hidden_CD)
    scored = targets_C != IGNORE
    return ((lse_C - target_C) * scored).sum(), (lse_C.square() * scored).sum()


def _score(logits_CV: Tensor, targets_C: Tensor, z_loss: float, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Score` of all words; the gradient is written over the probabilities."""
    scored = targets_C != IGNORE
    index = targets_C.where(scored, 0)[:, None]
    probabilities_CV, lse_C = _softmax(logits_CV)
    target_C = logits_CV.gather(1, index)[:, 0]
    if not wanted:
        return lse_C, target_C, None
    grad_CV = probabilities_CV.mul_((scored * (1 + 2 * z_loss * lse_C))[:, None])
    return lse_C, target_C, grad_CV.scatter_add_(1, index, -scored[:, None].to(grad_CV.dtype))


def _softmax(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and logsumexp. torch's softmax is one pass where its logsumexp is four, so the latter is read off
    the likeliest token: log p_max = l_max - lse, and p_max is at least 1 / V."""
    probabilities_CV = logits_CV.softmax(-1)
    return probabilities_CV, logits_CV.amax(-1) - probabilities_CV.amax(-1).log()


def _accumulate(grad_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """grad_VD += grad_CV^T hidden_CD, in fp32 also when the factors are bf16."""
    if grad_CV.dtype == grad_VD.dtype:
        grad_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        grad_VD += grad_CV.T @ hidden_CD
