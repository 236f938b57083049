"""Two models that should be one: every number and every token id of a converted model against its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.base.console import PunaError, progress
from puna.ops.formats.layer import QuantizedWeight
from puna.text.tokenizer import Tokenizer
from puna.weights.model_files import find_tokenizer
from puna.weights.reader import WeightReader

SAMPLE = "def f(x):\n\treturn x**2  # größer, 大きい, 🦙\r\n\n  The quick brown fox: 12345.678 <s> it's 10% off!"
_LARGEST_ERROR = 0.25  # of a tensor's root mean square: more than any format here costs, less than any mix-up
_REPORT = "this is an error of puna: please report it; nothing was written"


def plain(weight: Tensor | QuantizedWeight) -> Tensor:
    """The numbers that a weight stands for; packed ones in fp32."""
    return weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight


@dataclass
class _Found:
    """Differences so far; squares are summed over all numbers."""

    largest: float = 0.0
    worst: str = ""
    squares: float = 0.0
    wrong: float = 0.0

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        """A tensor that was `before` and reads `after`."""
        self.squares += _squares(before)
        if torch.equal(before, after):
            return
        gap = (after.float() - before.float()).abs_()
        self.wrong += _squares(gap)
        if (most := float(gap.max())) > self.largest:
            self.largest, self.worst = most, name


def compare_weights(source: WeightReader, written: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """The largest difference, the tensor it is in, and the relative error (root of squares) of all numbers.

    dtype: what plain numbers were written in and must be equal in; packed ones must be equal as they are. None: all
    were rounded anew. Raises PunaError for other numbers. Memory: a few copies of one tensor.
    """
    again, found = WeightReader(written), _Found()
    added = [name for name in again.names() if name not in source.names()]  # a head that was tied
    with progress(source.spec.num_params(), "reading back") as advance:
        for name in [*source.names(), *added]:
            stored, read = source.weight("embed" if name in added else name), again.weight(name)
            before = plain(stored)
            after = before if _is_same(stored, read) else plain(read)
            _check(name, before, after, None if dtype is None else _written_as(read, before, dtype), written)
            found.add(name, before, after)
            advance(before.numel(), name)
    relative = (found.wrong / max(found.squares, 1e-30)) ** 0.5
    return {"tensors": len(source.names()), "max_difference": found.largest, "worst": found.worst,
            "relative_error": relative}  # fmt: skip


def _is_same(stored: Tensor | QuantizedWeight, read: Tensor | QuantizedWeight) -> bool:
    """Whether two packed weights are the same ones, without unpacking them."""
    if not (isinstance(stored, QuantizedWeight) and isinstance(read, QuantizedWeight)):
        return False
    pairs = [
        (getattr(stored.packed, name), getattr(read.packed, name)) for name in ("data", "scales", "zeros", "group_of_D")
    ]
    pairs += [(getattr(stored, name), getattr(read, name)) for name in ("up_NR", "down_RD")]
    return stored.packed.scheme == read.packed.scheme and all(_equal(a, b) for a, b in pairs)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _written_as(read: Tensor | QuantizedWeight, before: Tensor, dtype: torch.dtype) -> Tensor:
    return before if isinstance(read, QuantizedWeight) else before.to(dtype)


def _check(name: str, before: Tensor, after: Tensor, expected: Tensor | None, written: Path) -> None:
    """Exactly what is expected; without that: within what rounding costs. A NaN is never what was meant."""
    if expected is not None:
        is_right = torch.equal(after, expected.to(after.dtype))
    else:
        is_right = _squares(after.float() - before.float()) <= _LARGEST_ERROR**2 * _squares(before)
    if not is_right:
        gap = (after.float() - before.float()).abs().max()
        raise PunaError(f"{written} does not say what its source says: {name} differs by {float(gap):.3g}", _REPORT)


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) ** 2


def compare_words(source: Tokenizer | None, written: Path) -> str:
    """What can be said of a converted tokenizer. Raises PunaError for other ids or another chat template."""
    if source is None:
        return "none"
    again = find_tokenizer(written)
    for specials in (False, True):
        if again is None or again.encode(SAMPLE, specials) != source.encode(SAMPLE, specials):
            raise PunaError(f"{written} does not split text as its source does", f"--no-tokenizer; {_REPORT}")
    assert again is not None
    if again.chat_template != source.chat_template:
        raise PunaError(f"{written} has another chat template", f"--no-tokenizer; {_REPORT}")
    return "same ids" + (", same chat template" if again.chat_template else "")
