"""Two models that should be one: every number and every token id of a converted model against its source."""

from __future__ import annotations

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


def compare_weights(source: WeightReader, written: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """The largest difference, the tensor it is in, and the relative error (root of squares) of all numbers.

    dtype: what plain numbers were written in and must be equal in; packed ones must be equal as they are. None: all
    were rounded anew. Raises PunaError for other numbers. Memory: a few copies of one tensor.
    """
    again = WeightReader(written)
    worst, largest, total, wrong = "", 0.0, 0.0, 0.0
    added = [name for name in again.names() if name not in source.names()]  # a head that was tied
    with progress(source.spec.num_params(), "reading back") as advance:
        for name in [*source.names(), *added]:
            before, after = plain(source.weight("embed" if name in added else name)), again.weight(name)
            exact = isinstance(after, QuantizedWeight)
            expected = before if dtype is None or exact else before.to(dtype)
            gap = (plain(after).float() - expected.float()).abs()
            _check(name, gap, 0.0 if dtype is not None else _LARGEST_ERROR * _root_mean_square(before), written)
            gap = (plain(after).float() - before.float()).abs()
            total, wrong = total + _square(before), wrong + _square(gap)
            if gap.numel() and (most := float(gap.max())) > largest:
                worst, largest = name, most
            advance(before.numel(), name)
    relative = (wrong / max(total, 1e-30)) ** 0.5
    return {"tensors": len(source.names()), "max_difference": largest, "worst": worst, "relative_error": relative}


def _check(name: str, gap: Tensor, limit: float, written: Path) -> None:
    if not _root_mean_square(gap) <= limit:  # a NaN is no number that was meant
        raise PunaError(
            f"{written} does not say what its source says: {name} differs by {float(gap.max()):.3g}", _REPORT
        )


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _root_mean_square(tensor: Tensor) -> float:
    return (_square(tensor) / max(1, tensor.numel())) ** 0.5


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
