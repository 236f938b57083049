"""Context parallel attention by passing keys and values: gathered from all ranks at once, or round a ring.

Both hold a share of the queries and see all keys, so heads need not divide. What a rank computes for keys it was given
is the same code in both; they differ in who brings the keys when, and in who carries their gradients home.

Shapes: T tokens of this rank, w ranks, H query heads, G key/value heads, K head width; kv_2TGK are keys and values
stacked, so that one message carries both. Gradients of keys and values are summed and sent in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna.ops.attention import PackedCausal
from puna.parallel.partial import attend_part, attend_part_backward, merge
from puna.parallel.sharding import Piece, Span, held_spans, pieces, shard, token_count, unshard

Plan = tuple[Piece, ...]
_Bring = Callable[[Tensor, "Share", Callable[[Tensor, Plan], None]], None]
_BringHome = Callable[[Tensor, "Share", Callable[[Tensor, Plan], Tensor]], Tensor]

# torch 2.13 renamed both and warns of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_sum = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Share:
    """One rank's part of a sequence: what all exchanges of keys need to know."""

    documents: PackedCausal
    group: dist.ProcessGroup
    rank: int
    world: int
    window: int | None

    def held(self, rank: int) -> tuple[Span, ...]:
        """The head and tail chunk of `rank`."""
        return held_spans(token_count(self.documents), rank, self.world, "ring")

    def plan(self, keys: tuple[Span, ...]) -> Plan:
        """What this rank's queries need of `keys`."""
        return pieces(self.documents, self.held(self.rank), keys, self.window)


def gather_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, share: Share) -> Tensor:
    """All-gather keys and values, attend, reduce-scatter their gradients; returns (T, H, K)."""
    out: Tensor = _SharedAttention.apply(q_THK, k_TGK, v_TGK, share, _gather_once, _gather_home)
    return out


def ring_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, share: Share) -> Tensor:
    """Pass keys and values to the next rank w - 1 times, attending to what is there meanwhile; returns (T, H, K)."""
    out: Tensor = _SharedAttention.apply(q_THK, k_TGK, v_TGK, share, _round, _round_home)
    return out


class _SharedAttention(torch.autograd.Function):
    """`bring(kv, share, attend)` calls `attend(keys and values, plan)` until all that a rank sees has been there;
    `bring_home` does so for `attend`s that answer with gradients, and returns the sum of those of this rank's kv."""

    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, share: Share, bring: _Bring, bring_home: _BringHome
    ) -> Tensor:
        kv_2TGK = torch.stack((k_TGK, v_TGK))
        total = _Total(q_THK)

        def attend(kv: Tensor, plan: Plan) -> None:
            total.add(q_THK, kv, plan, share.window)

        bring(kv_2TGK, share, attend)
        out_THK = total.out_THK.to(q_THK.dtype)
        # The shares are kept, not what was gathered: w times the memory in every layer would undo what cp is for.
        ctx.save_for_backward(q_THK, kv_2TGK, out_THK, total.lse_TH)
        ctx.share, ctx.bring_home = share, bring_home
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, kv_2TGK, out_THK, lse_TH = ctx.saved_tensors
        d_q = torch.zeros_like(q_THK, dtype=torch.float32)
        gradient = _Gradient(gradients[0], q_THK, out_THK, lse_TH, d_q)

        def attend(kv: Tensor, plan: Plan) -> Tensor:
            d_kv = torch.zeros_like(kv, dtype=torch.float32)
            gradient.add(kv, d_kv, plan, ctx.share.window)
            return d_kv

        d_k, d_v = ctx.bring_home(kv_2TGK, ctx.share, attend).to(q_THK.dtype)
        return d_q.to(q_THK.dtype), d_k, d_v, None, None, None


class _Total:
    """Output and log-sum-exp so far, in fp32."""

    def __init__(self, q_THK: Tensor):
        self.out_THK = torch.zeros_like(q_THK, dtype=torch.float32)
        self.lse_TH = torch.full_like(self.out_THK[..., 0], -torch.inf)

    def add(self, q_THK: Tensor, kv_2SGK: Tensor, plan: Plan, window: int | None) -> None:
        for piece in plan:
            q, k, v = _split(q_THK, piece.queries, piece), *(_split(x, piece.keys, piece) for x in kv_2SGK)
            part, part_lse = (x.flatten(0, 1) for x in attend_part(q, k, v, piece.offset, window))
            merge(self.out_THK[piece.queries], self.lse_TH[piece.queries], part, part_lse)


@dataclass(frozen=True)
class _Gradient:
    """What the gradients of a piece are made of; those of the queries are summed in `d_q_THK`."""

    d_out_THK: Tensor
    q_THK: Tensor
    out_THK: Tensor
    lse_TH: Tensor
    d_q_THK: Tensor

    def add(self, kv_2SGK: Tensor, d_kv_2SGK: Tensor, plan: Plan, window: int | None) -> None:
        for piece in plan:
            d_out, q, out, lse = (
                _split(x, piece.queries, piece) for x in (self.d_out_THK, self.q_THK, self.out_THK, self.lse_TH)
            )
            k, v = (_split(x, piece.keys, piece) for x in kv_2SGK)
            d_q, d_k, d_v = attend_part_backward(d_out, q, k, v, out, lse, piece.offset, window)
            self.d_q_THK[piece.queries] += d_q.flatten(0, 1)
            d_kv_2SGK[0, piece.keys] += d_k.flatten(0, 1)
            d_kv_2SGK[1, piece.keys] += d_v.flatten(0, 1)


class _Hop:
    """A tensor on its way to the next rank, and the previous rank's on its way here."""

    def __init__(self, x: Tensor, share: Share):
        after, before = (
            dist.get_global_rank(share.group, (share.rank + step) % share.world) for step in (1, -1)
        )  # fmt: skip
        self._sent = x.contiguous()  # kept until it has left
        self._received = torch.empty_like(self._sent)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, after, share.group),
                dist.P2POp(dist.irecv, self._received, before, share.group),
            ]
        )

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


def _round(kv_2TGK: Tensor, share: Share, attend: Callable[[Tensor, Plan], None]) -> None:
    """Call `attend` with every rank's keys and values, this rank's first; the next ones travel meanwhile."""
    for step in range(share.world):
        hop = _Hop(kv_2TGK, share) if step + 1 < share.world else None
        attend(kv_2TGK, share.plan(share.held((share.rank - step) % share.world)))
        if hop is not None:
            kv_2TGK = hop.wait()


def _round_home(kv_2TGK: Tensor, share: Share, attend: Callable[[Tensor, Plan], Tensor]) -> Tensor:
    """As `_round`; the gradients follow their keys and values one step behind, and after w hops are home again."""
    carried: list[_Hop] = []

    def pass_on(kv: Tensor, plan: Plan) -> None:
        d_kv = attend(kv, plan)
        if carried:
            d_kv += carried.pop().wait()
        carried.append(_Hop(d_kv, share))

    _round(kv_2TGK, share, pass_on)
    return carried.pop().wait()


def _gather_once(kv_2TGK: Tensor, share: Share, attend: Callable[[Tensor, Plan], None]) -> None:
    """Call `attend` with all keys and values at once."""
    attend(_gather(kv_2TGK, share), _whole_plan(share))


def _gather_home(kv_2TGK: Tensor, share: Share, attend: Callable[[Tensor, Plan], Tensor]) -> Tensor:
    """As `_gather_once`, gradients summed over the ranks."""
    return _reduce_scatter(attend(_gather(kv_2TGK, share), _whole_plan(share)), share)


def _split(x: Tensor, rows: slice, piece: Piece) -> Tensor:
    """(documents, length, ...) of a piece's rows."""
    return x[rows].unflatten(0, (piece.documents, -1))


def _whole_plan(share: Share) -> Plan:
    return share.plan((Span(0, token_count(share.documents), 0),))


def _gather(kv_2TGK: Tensor, share: Share) -> Tensor:
    """Every rank's keys and values in the order of the sequence: (2, w T, G, K)."""
    parts = kv_2TGK.new_empty(share.world, *kv_2TGK.shape)
    _all_gather(parts.flatten(0, 1), kv_2TGK, group=share.group)
    return unshard([part.transpose(0, 1) for part in parts], "allgather").transpose(0, 1)


def _reduce_scatter(d_kv_2SGK: Tensor, share: Share) -> Tensor:
    """This rank's tokens of the sum over all ranks: (2, T, G, K)."""
    d_kv_S2GK = d_kv_2SGK.transpose(0, 1)
    parts = [shard([d_kv_S2GK], rank, share.world, "allgather")[0] for rank in range(share.world)]
    sums = parts[0].new_empty(parts[0].shape)
    _reduce_scatter_sum(sums, torch.cat(parts), group=share.group)
    return sums.transpose(0, 1)
