"""Cross-entropy over a vocabulary that is cut over the ranks of a tensor-parallel group; logits are never gathered.

A chunk of tokens costs three numbers per token on the wire: the largest logit, the sum of exponentials and the target's
logit. Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3. Shapes: T tokens, D model width, V vocabulary, W this
rank's words, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from puna.ops import basic
from puna.ops.basic import IGNORE, chunk_tokens, chunked_cross_entropy
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
    chunk = chunk or chunk_tokens(-(-vocab // mesh.size()), hidden_TD.device.type)
    words = Words(*bounds(vocab, mesh.get_local_rank(), mesh.size()), mesh.get_group())
    return chunked_cross_entropy(hidden_TD, weight_VD.to_local(), targets_T, z_loss, chunk, words.score)


@dataclass(frozen=True)
class Words:
    """The words `first` to `end` of the vocabulary; `group` holds the others."""

    first: int
    end: int
    group: ProcessGroup

    def score(
        self, logits_CW: Tensor, targets_C: Tensor, z_loss: float, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `ops.basic.Score` says: (logsumexp over all words, the target's logit, d loss / d logits over the logits).

        With m the largest logit of all words:  lse = m + log sum exp(l - m),  d loss / d l = (1 + 2 z lse) p - onehot.
        """
        largest_C = logits_CW.amax(-1)
        dist.all_reduce(largest_C, dist.ReduceOp.MAX, self.group)
        here = (targets_C >= self.first) & (targets_C < self.end)
        index = (targets_C - self.first).masked_fill(~here, 0)[:, None]
        target_C = logits_CW.gather(1, index)[:, 0].masked_fill(~here, 0)
        exp_CW = logits_CW.sub_(largest_C[:, None]).exp_()
        sum_C, target_C = _summed(torch.stack((exp_CW.sum(-1), target_C)), self.group)
        lse_C = largest_C + sum_C.log()
        if not wanted:
            return lse_C, target_C, None
        scored = targets_C != IGNORE
        grad_CW = exp_CW.mul_((scored * (1 + 2 * z_loss * lse_C) / sum_C)[:, None])
        return lse_C, target_C, grad_CW.scatter_add_(1, index, -here[:, None].to(grad_CW.dtype))


def _summed(values_2C: Tensor, group: ProcessGroup) -> Tensor:
    dist.all_reduce(values_2C, group=group)
    return values_2C
