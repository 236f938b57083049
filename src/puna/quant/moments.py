"""What is remembered of the inputs of one linear layer while calibration text runs: a few sums, never all inputs.

    second_DD      sum of x x^T, for GPTQ: D x D, so kept only where a method asks for it
    absmax_D       largest |x| of every column, for SmoothQuant        abs_mean_D     mean |x|, for AWQ
    mean_square_D  mean x^2                                            sample_TD      a few hundred whole rows

The sample is drawn by a number that depends on a row's place in the text alone: it does not change with how the text is
cut into batches, and no period of the text (every sequence begins with the same token) can hit it.

Shapes: T tokens, D inputs of the layer. Sums in fp32 on the device of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats.rounding import check_finite

SAMPLE_ROWS = 512
_PANEL = 256  # columns of second_DD summed at a time
_NEVER = torch.iinfo(torch.int64).max  # the lot of a row that is padding

Reduce = Callable[[Tensor, Literal["sum", "max", "cat"]], Tensor]


class Moments:
    """Filled by `add`, joined over ranks by `merge`, looked at after `check`.

    name: the layer, for messages. second: keep second_DD. sample_rows: 0 keeps no sample.
    """

    def __init__(
        self,
        width: int,
        name: str = "",
        *,
        second: bool = False,
        sample_rows: int = SAMPLE_ROWS,
        device: torch.device | str = "cpu",
    ):
        self.width, self.name, self.sample_rows = width, name, sample_rows
        self.count = 0
        self.absmax_D = torch.zeros(width, device=device)
        self._abs_sum_D = torch.zeros(width, device=device)
        self._square_sum_D = torch.zeros(width, device=device)
        self._second_DD = torch.zeros(width, width, device=device) if second else None
        self._is_whole = True  # second_DD: above the diagonal, too
        self.sample_TD = torch.zeros(0, width, device=device)
        self._lots_T = torch.zeros(0, dtype=torch.int64, device=device)

    def add(self, x_TD: Tensor) -> None:
        """The next T inputs, in any dtype. Errors: `PunaError` for NaN and infinity, with the layer's name."""
        x_TD = x_TD.detach().reshape(-1, self.width).float()
        check_finite(x_TD, f"the input of {self.name or 'a layer'}")
        if not x_TD.shape[0]:
            return
        self._add_sample(x_TD)
        self.count += x_TD.shape[0]
        size_TD = x_TD.abs()
        torch.maximum(self.absmax_D, size_TD.amax(0), out=self.absmax_D)
        self._abs_sum_D += size_TD.sum(0)
        self._square_sum_D += size_TD.square_().sum(0)
        if self._second_DD is not None:
            _add_products(self._second_DD, x_TD)
            self._is_whole = False

    def merge(self, reduce: Reduce) -> None:
        """Join what several ranks saw; all end with the same.

        reduce(tensor, op) is called in the same order on every rank, with the same shapes, and returns the sum or the
        largest over the ranks, or ("cat") their rows one after another.
        """
        device = self.absmax_D.device
        self.count = int(reduce(torch.tensor([self.count], device=device), "sum"))
        self.absmax_D = reduce(self.absmax_D, "max")
        self._abs_sum_D = reduce(self._abs_sum_D, "sum")
        self._square_sum_D = reduce(self._square_sum_D, "sum")
        if self._second_DD is not None:
            self._second_DD = reduce(self._second_DD, "sum")
        if self.sample_rows:
            missing = self.sample_rows - self.sample_TD.shape[0]
            rows = reduce(torch.cat([self.sample_TD, self.sample_TD.new_zeros(missing, self.width)]), "cat")
            lots = reduce(torch.cat([self._lots_T, self._lots_T.new_full((missing,), _NEVER)]), "cat")
            self._keep_lowest(rows[lots != _NEVER], lots[lots != _NEVER])

    def check(self) -> None:
        """Errors: `PunaError` if no text, or nothing but zeros, reached the layer."""
        if not self.count or not bool(self.absmax_D.any()):
            raise PunaError(
                f"all {self.count:,} calibration inputs of {self.name or 'a layer'} are 0",
                "the calibration text does not reach this layer: give more or other text, or leave the layer "
                "unquantized",
            )

    def divide(self, scale_D: Tensor) -> None:
        """As if every input had been divided by scale_D, which now stands in the layer's weight (`rescale`)."""
        self.absmax_D = self.absmax_D / scale_D
        self._abs_sum_D = self._abs_sum_D / scale_D
        self._square_sum_D = self._square_sum_D / scale_D**2
        self.sample_TD = self.sample_TD / scale_D
        if self._second_DD is not None:
            self._second_DD.div_(scale_D[:, None]).div_(scale_D)

    @property
    def second_DD(self) -> Tensor | None:
        """The sum of x x^T over all inputs; None if it is not kept."""
        if self._second_DD is not None and not self._is_whole:
            _mirror(self._second_DD)
            self._is_whole = True
        return self._second_DD

    @property
    def abs_mean_D(self) -> Tensor:
        """Mean |x| of every column."""
        return self._abs_sum_D / max(1, self.count)

    @property
    def mean_square_D(self) -> Tensor:
        """Mean x^2 of every column."""
        return self._square_sum_D / max(1, self.count)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums at most, a full sample included."""
        return Moments.bytes(self.width, second=self._second_DD is not None, sample_rows=self.sample_rows)

    @staticmethod
    def bytes(width: int, *, second: bool = False, sample_rows: int = SAMPLE_ROWS) -> int:
        """What `Moments` of this width will hold: 4 D^2 of it are second_DD."""
        return 4 * width * (3 + sample_rows + (width if second else 0)) + 8 * sample_rows

    def _add_sample(self, x_TD: Tensor) -> None:
        lots_T = _lots(self.count, x_TD.shape[0], x_TD.device)
        chosen = lots_T.topk(min(self.sample_rows, lots_T.numel()), largest=False, sorted=False).indices
        self._keep_lowest(torch.cat([self.sample_TD, x_TD[chosen]]), torch.cat([self._lots_T, lots_T[chosen]]))

    def _keep_lowest(self, rows_TD: Tensor, lots_T: Tensor) -> None:
        order = lots_T.argsort(stable=True)[: self.sample_rows]
        self.sample_TD, self._lots_T = rows_TD[order], lots_T[order]


def _lots(first: int, count: int, device: torch.device) -> Tensor:
    """A number for each of `count` rows from row `first` on, spread like random ones: the finaliser of splitmix64.

    Source: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators, section 3; int64 wraps around.
    """
    z = torch.arange(first + 1, first + 1 + count, device=device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ _shifted(z, shift)) * factor
    return _shifted(z ^ _shifted(z, 31), 1)  # not negative, and never _NEVER's all ones but by a chance of 2^-63


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits as if z had no sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _add_products(second_DD: Tensor, x_TD: Tensor) -> None:
    """second += x^T x below the diagonal (in panels): half of the products, and no second matrix."""
    for low in range(0, x_TD.shape[1], _PANEL):
        high = low + _PANEL
        second_DD[low:high, :high].addmm_(x_TD[:, low:high].t(), x_TD[:, :high])


def _mirror(second_DD: Tensor) -> None:
    for low in range(0, second_DD.shape[0], _PANEL):
        second_DD[:low, low : low + _PANEL] = second_DD[low : low + _PANEL, :low].t()
