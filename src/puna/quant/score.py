"""How far a model's answers moved: perplexity, KL and top-1 agreement of a variant against the original, with errors.

Logits come in pieces and are never kept; what stays is six sums per chunk (a chunk is one evaluation sequence). Tokens
of one sequence depend on each other, sequences hardly do: so every standard error is taken over chunks (cluster-robust;
Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, section 2.2), and two variants are compared chunk by chunk
(paired, section 4.2), which takes out what makes all of them find a text hard.

    mean     R = sum_c x_c / sum_c n_c                      x_c: sum over a chunk's scored tokens, n_c: their number
    error    se(R)^2 = C / (C - 1) * sum_c (x_c - R n_c)^2 / (sum_c n_c)^2

Shapes: T tokens, V vocabulary, C chunks. Everything is added up in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # a target that is not scored, as in torch's cross_entropy
RESAMPLES = 2000  # of the bootstrap: its error of the error is then below 2%
CERTAIN = 2.0  # standard errors by which rounding's damage must differ from zero before shares of it are named
_ELEMENTS_AT_ONCE = 1 << 22  # logits that are widened to fp64 together: 32 MiB each
_NAMES = ("tokens", "reference", "variant", "kl", "agree", "bytes")


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error; the error is None where a single chunk cannot tell."""

    value: float
    error: float | None = None

    def __str__(self) -> str:
        """`5.712 ± 0.031`: as many digits as the error has meaning."""
        if self.error is None or not self.error > 0:
            return f"{self.value:.4g}"
        if abs(self.value) < 1e-3:
            return f"{self.value:.2e} ± {self.error:.1e}"
        digits = min(9, max(0, 1 - math.floor(math.log10(self.error)))) if math.isfinite(self.error) else 2
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"

    def percent(self, signed: bool = False) -> str:
        """`1.23 ± 0.04%`, or `+1.23 ± 0.04%`."""
        sign = "+" if signed and self.value >= 0 else ""
        return f"{sign}{Estimate(100 * self.value, None if self.error is None else 100 * self.error)}%"

    @property
    def deviations(self) -> float:
        """The value in standard errors: above 3, chance is no likely cause. Infinite where the error is zero."""
        if self.value == 0 or self.error is None:
            return 0.0
        return self.value / self.error if self.error else math.copysign(math.inf, self.value)


class Score:
    """What is known so far of one variant against the original, on one set of chunks."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(_NAMES), 0, dtype=torch.float64)
        self._counts_bytes = True

    def compare(
        self,
        reference_TV: Tensor,
        variant_TV: Tensor,
        targets_T: Tensor,
        chunk_T: Tensor | int,
        bytes_T: Tensor | None = None,
    ) -> None:
        """Add the tokens of some chunks, or of a part of one.

        targets_T: the token that follows each, or IGNORED. chunk_T: the number of each token's chunk, from 0.
        bytes_T: UTF-8 bytes each target stands for (`Tokenizer.byte_lengths`); without it there are no bits/byte.
        Any floating dtype, any device. Cost: two log-softmax in fp64, of 32 MiB pieces.
        """
        assert reference_TV.shape == variant_TV.shape
        assert targets_T.shape == reference_TV.shape[:1]
        if not targets_T.numel():
            return
        chunks = torch.as_tensor(chunk_T).to("cpu", torch.int64).expand(targets_T.shape)
        self._counts_bytes &= bytes_T is not None
        found = _token_statistics(reference_TV, variant_TV, targets_T)
        scored = found[0].bool()
        sizes = torch.zeros_like(found[0]) if bytes_T is None else bytes_T.to("cpu", torch.float64) * scored
        missing = int(chunks.max()) + 1 - self.chunks
        if missing > 0:
            self._sums = torch.cat([self._sums, torch.zeros(len(_NAMES), missing, dtype=torch.float64)], 1)
        # Not in place: what was made under inference_mode could not be added to outside of it.
        self._sums = self._sums.index_add(1, chunks, torch.cat([found, sizes[None]]))

    def merge(self, other: Score) -> None:
        """Add another score's chunks behind one's own: those of another rank."""
        self._sums = torch.cat([self._sums, other._sums], 1)
        self._counts_bytes &= other._counts_bytes

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return self._sums.shape[1]

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return int(self._sums[0].sum())

    def nll(self, reference: bool = False) -> Estimate:
        """Mean negative log-likelihood in nats per scored token, of the variant or of the original."""
        return self._mean("reference" if reference else "variant")

    def perplexity(self, reference: bool = False) -> Estimate:
        """exp(nll) per token."""
        return _exp(self.nll(reference))

    def increase(self) -> Estimate:
        """Perplexity over the original's, less one; paired, so far surer than either perplexity."""
        difference = _exp(_ratio(self._of("variant") - self._of("reference"), self._of("tokens")))
        return Estimate(difference.value - 1, difference.error)

    def bits_per_byte(self, reference: bool = False) -> Estimate | None:
        """Bits per UTF-8 byte of the text: comparable between tokenizers. None where bytes are unknown."""
        if not self._counts_bytes or not float(self._of("bytes").sum()):
            return None
        return _ratio(self._of("reference" if reference else "variant") / math.log(2), self._of("bytes"))

    def kl(self) -> Estimate:
        """Mean KL(original || variant) in nats per token."""
        return self._mean("kl")

    def top1(self) -> Estimate:
        """Share of tokens whose most likely successor is the original's."""
        return self._mean("agree")

    def kl_per_chunk(self) -> list[float]:
        """Mean KL of each chunk that has scored tokens."""
        tokens_C = self._of("tokens")
        return (self._of("kl")[tokens_C > 0] / tokens_C[tokens_C > 0]).tolist()

    def state(self) -> dict[str, Any]:
        """Plain values for JSON; `Score.of(state)` is the same score, to the bit."""
        sums = {name: self._of(name).tolist() for name in _NAMES}
        return {"counts_bytes": self._counts_bytes, **sums}

    @staticmethod
    def of(state: Mapping[str, Any]) -> Score:
        """The score that `state` came from."""
        score = Score()
        score._counts_bytes = bool(state["counts_bytes"])
        score._sums = torch.tensor([state[name] for name in _NAMES], dtype=torch.float64)
        return score

    def _of(self, name: str) -> Tensor:
        return self._sums[_NAMES.index(name)]

    def _mean(self, name: str) -> Estimate:
        return _ratio(self._of(name), self._of("tokens"))


def kl_difference(one: Score, other: Score) -> Estimate:
    """Mean KL of `one` less that of `other`, in nats per token, paired per chunk; negative: `one` is closer."""
    _check_same_text(one, other)
    return _ratio(one._of("kl") - other._of("kl"), one._of("tokens"))


def nll_difference(one: Score, other: Score) -> Estimate:
    """Mean nll of `one` less that of `other`, in nats per token, paired per chunk."""
    _check_same_text(one, other)
    return _ratio(one._of("variant") - other._of("variant"), one._of("tokens"))


@dataclass(frozen=True)
class Repaired:
    """Share of plain rounding's damage that a method takes back: 1 is all, 0 nothing, below 0 it does harm.

    None: plain rounding did no damage that could be told from chance.
    """

    nll: Estimate | None
    kl: Estimate | None


def repaired(rounded: Score, after: Score, seed: int = 0) -> Repaired:
    """1 - (after - before) / (rounded - before), in nll and in KL (where before is 0).

    Both scores are against the same original on the same chunks. Errors: paired bootstrap over chunks.
    """
    _check_same_text(rounded, after)
    tokens_C, before_C = rounded._of("tokens"), rounded._of("reference")
    nll = _repaired(rounded._of("variant") - before_C, after._of("variant") - before_C, tokens_C, seed)
    return Repaired(nll, _repaired(rounded._of("kl"), after._of("kl"), tokens_C, seed))


def _repaired(rounded_C: Tensor, after_C: Tensor, tokens_C: Tensor, seed: int) -> Estimate | None:
    damage = _ratio(rounded_C, tokens_C)
    if not damage.value > CERTAIN * (damage.error or 0):
        return None
    value = 1 - float(after_C.sum() / rounded_C.sum())
    kept = tokens_C > 0
    chunks = int(kept.sum())
    if chunks < 2:
        return Estimate(value)
    draws = np.random.default_rng(seed).multinomial(chunks, np.full(chunks, 1 / chunks), RESAMPLES)
    shares = 1 - (draws @ after_C[kept].numpy()) / (draws @ rounded_C[kept].numpy())
    # Half of the middle 68%, not a standard deviation: draws in which the damage nearly vanishes have no variance.
    low, high = np.nanquantile(shares, (0.158655, 0.841345))
    return Estimate(value, float(high - low) / 2)


def _check_same_text(one: Score, other: Score) -> None:
    for name in ("tokens", "reference"):
        mine, others = one._of(name), other._of(name)
        same = mine.shape == others.shape and torch.allclose(mine, others, rtol=1e-6, equal_nan=True)
        assert same, "two scores of different text or originals cannot be paired"


def _token_statistics(reference_TV: Tensor, variant_TV: Tensor, targets_T: Tensor) -> Tensor:
    """fp64 (5, T) on the CPU: scored?, nll of the original, of the variant, KL, same top-1? Zero where not scored."""
    rows = max(1, _ELEMENTS_AT_ONCE // reference_TV.shape[1])
    targets_T = targets_T.to(reference_TV.device)
    pieces = zip(reference_TV.split(rows), variant_TV.split(rows), targets_T.split(rows), strict=True)
    return torch.cat([_statistics(*piece) for piece in pieces], 1).cpu()


def _statistics(reference_TV: Tensor, variant_TV: Tensor, targets_T: Tensor) -> Tensor:
    # fp64: at int8 the KL is about 1e-6, which is the rounding error of a log-softmax in fp32.
    original_TV = reference_TV.double().log_softmax(-1)
    changed_TV = variant_TV.double().log_softmax(-1)
    scored_T = targets_T != IGNORED
    targets_T1 = targets_T.masked_fill(~scored_T, 0)[:, None]
    kl_TV = torch.where(original_TV == -torch.inf, 0.0, original_TV.exp() * (original_TV - changed_TV))
    agree_T = reference_TV.argmax(-1) == variant_TV.argmax(-1)
    found = [-original_TV.gather(1, targets_T1)[:, 0], -changed_TV.gather(1, targets_T1)[:, 0], kl_TV.sum(-1)]
    return torch.stack([scored_T.double(), *found, agree_T.double()]).masked_fill(~scored_T, 0)


def _ratio(top_C: Tensor, bottom_C: Tensor) -> Estimate:
    """Sum over sum with its cluster-robust error: the formula at the top of this file."""
    used = bottom_C > 0
    top_C, bottom_C = top_C[used], bottom_C[used]
    chunks, total = len(bottom_C), float(bottom_C.sum())
    if not chunks:
        return Estimate(math.nan)
    value = float(top_C.sum()) / total
    if chunks < 2:
        return Estimate(value)
    spread = float(((top_C - value * bottom_C) ** 2).sum())
    return Estimate(value, math.sqrt(chunks / (chunks - 1) * spread) / total if math.isfinite(spread) else math.nan)


def _exp(found: Estimate) -> Estimate:
    value = math.exp(min(found.value, 700.0))  # above lies fp64's end
    return Estimate(value, None if found.error is None else value * found.error)
