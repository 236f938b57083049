"""Which part of each weight a rank of a tensor-parallel group holds: one table, for training and for serving.

Read it aloud: the projections into the heads and into the feed-forward are cut by column (output features), those back
into the residual stream by row (input features), embedding and head by vocabulary; norms between blocks are whole and
work on a share of the sequence. Sources: Shoeybi et al. 2019, arXiv:1909.08053, section 3; sequence parallelism:
Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor

from puna.base.console import PunaError
from puna.model.spec import Spec

Role = Literal["column", "kv_column", "row", "vocabulary", "sequence", "replicate"]

# Module (or parameter) name -> role. The first pattern that fits counts; a name that fits none is an error.
TABLE: tuple[tuple[str, Role], ...] = (
    ("embed", "vocabulary"),
    ("lm_head", "vocabulary"),
    ("layers.*.attn.q_proj", "column"),
    ("layers.*.attn.[kv]_proj", "kv_column"),  # column, or replicate where there are fewer kv heads than ranks
    ("layers.*.attn.o_proj", "row"),
    ("layers.*.attn.[qk]_norm", "replicate"),  # one weight for all heads; each rank has some heads
    ("layers.*.mlp.gate_proj", "column"),
    ("layers.*.mlp.up_proj", "column"),
    ("layers.*.mlp.down_proj", "row"),
    ("layers.*_norm", "sequence"),
    ("norm", "sequence"),
)


def role_of(name: str) -> Role:
    """The role of a module, or of one of its parameters ('layers.3.attn.q_proj.weight')."""
    module = name.removesuffix(".weight").removesuffix(".bias")
    for pattern, role in TABLE:
        if fnmatchcase(module, pattern):
            return role
    raise PunaError(f"no placement for {name!r}", "add a line to the table in puna/parallel/plan.py")


def cut_dim(name: str, spec: Spec, tp: int) -> int | None:
    """Dimension along which a parameter is cut over `tp` ranks; None: every rank holds all of it."""
    role = role_of(name)
    if role == "kv_column":
        role = "replicate" if spec.num_key_value_heads < tp else "column"
    if role in ("column", "vocabulary"):
        return 0
    return 1 if role == "row" and not name.endswith("bias") else None


def bounds(length: int, rank: int, ranks: int) -> tuple[int, int]:
    """[first, end) of a rank's part of `length` rows, as torch.chunk and DTensor's Shard cut it."""
    step = -(-length // ranks)
    return min(rank * step, length), min((rank + 1) * step, length)


def take(tensor: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """A rank's part of a whole tensor along `dim`: a view."""
    first, end = bounds(tensor.shape[dim], rank, ranks)
    return tensor.narrow(dim, first, end - first)


def local_part(name: str, tensor: Tensor, spec: Spec, rank: int, tp: int) -> Tensor:
    """The part of the whole parameter `name` that `rank` of `tp` keeps: a view, or the tensor itself."""
    dim = cut_dim(name, spec, tp)
    return tensor if dim is None else take(tensor, dim, rank, tp)


def kv_heads(spec: Spec, rank: int, tp: int) -> tuple[int, int]:
    """[first, end) of the key/value heads that a rank's query heads look at.

    With fewer kv heads than ranks, neighbouring ranks share one: 2 heads on 4 ranks are heads 0, 0, 1, 1.
    """
    heads = spec.num_key_value_heads
    if heads < tp:
        return rank * heads // tp, rank * heads // tp + 1
    return bounds(heads, rank, tp)


def check_tensor_parallel(spec: Spec, tp: int) -> None:
    """Refuse what cannot be cut over `tp` ranks, with the numbers."""
    heads, kv = spec.num_attention_heads, spec.num_key_value_heads
    fits = [n for n in range(1, heads + 1) if heads % n == 0 and (kv % n == 0 or n % kv == 0)]
    hint = f"use --parallel.tp {', '.join(map(str, fits))}"
    if heads % tp:
        raise PunaError(f"num_attention_heads {heads} is not divisible by tp {tp}", hint)
    if kv % tp and tp % kv:
        raise PunaError(f"num_key_value_heads {kv} and tp {tp}: neither divides the other", hint)
    for name, length in (("vocab_size", spec.vocab_size), ("intermediate_size", spec.intermediate_size)):
        if bounds(length, tp - 1, tp)[0] >= length:
            raise PunaError(f"{name} {length} leaves nothing for the last of tp {tp} ranks", hint)
