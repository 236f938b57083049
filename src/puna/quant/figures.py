"""What a report card is made of: measured figures, each with its words; and their way to JSON and back.

What was not measured is None (or -1 in a `Layer`), never a zero that looks like a result.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from puna.base.console import PunaError
from puna.quant.config import format_text, parse_format
from puna.quant.score import Estimate, Score

_BETTER_BITS = {2: 3, 3: 4, 4: 8, 5: 8, 6: 8, 7: 8}  # the next format that tools read
_SCALE_BITS = _PLAIN_BITS = 16


@dataclass(frozen=True)
class Quality:
    """One variant on the evaluation text; what compares it with the original is None for the original itself."""

    perplexity: Estimate
    bits_per_byte: Estimate | None = None
    increase: Estimate | None = None  # of perplexity, relative: 0.01 is 1%
    kl: Estimate | None = None  # nats per token
    top1: Estimate | None = None  # share
    kl_per_chunk: tuple[float, ...] = ()

    @staticmethod
    def of(score: Score) -> Quality:
        """Of the variant."""
        return Quality(
            score.perplexity(), score.bits_per_byte(), score.increase(), score.kl(), score.top1(),
            tuple(score.kl_per_chunk()),
        )  # fmt: skip

    @staticmethod
    def of_original(score: Score) -> Quality:
        """Of what the variant was compared with."""
        return Quality(score.perplexity(reference=True), score.bits_per_byte(reference=True))


@dataclass(frozen=True)
class Layer:
    """A linear layer. Errors are |y' - y| / |y| of its outputs on calibration inputs; -1 where not measured."""

    name: str
    format: str
    weights: int
    bits_per_weight: float
    error_rounded: float = -1.0
    error: float = -1.0
    note: str = ""
    kernel: str = ""


@dataclass(frozen=True)
class Speed:
    """Decoding one token at a time. `bandwidth`: bytes/s this machine was measured to read; 0: not measured."""

    tokens_per_second: float
    bytes_per_token: float = 0.0
    bandwidth: float = 0.0

    @property
    def rate(self) -> str:
        """tokens/s with three digits, in full."""
        return f"{self.tokens_per_second:.0f}" if self.tokens_per_second >= 100 else f"{self.tokens_per_second:.3g}"

    @property
    def share(self) -> float | None:
        """Of what memory bandwidth allows: the roofline."""
        return self.tokens_per_second * self.bytes_per_token / self.bandwidth if self.bandwidth else None

    def __str__(self) -> str:
        share = "" if self.share is None else f" ({self.share:.0%} of bandwidth)"
        return f"{self.rate}{share}"


@dataclass(frozen=True)
class Reload:
    """The written files read back: largest difference of a logit from what the walk computed."""

    max_difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.max_difference <= self.tolerance

    def __str__(self) -> str:
        sign, word = ("<=", "passed") if self.passed else (">", "FAILED")
        return f"{word}, max |dlogit| {self.max_difference:.1e} {sign} {self.tolerance:.0e}"


@dataclass(frozen=True)
class Suggestion:
    """A layer among the worst, and what would make it better."""

    layer: Layer
    format: str  # "": there is no better one
    more_bytes: float = 0.0

    @property
    def override(self) -> str:
        """The words of the command line."""
        return f'--override "{self.layer.name}={self.format}"' if self.format else ""


@dataclass(frozen=True)
class Verdict:
    """Whether the result may be used, and why, in numbers."""

    passed: bool
    message: str


def parse_increase(text: str) -> float:
    """`1%` -> 0.01, `0.005` -> 0.005. Errors: `PunaError` for what is no share, and for 1, which may mean 1%."""
    words = re.fullmatch(r"\s*\+?(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    if words is None:
        raise PunaError(f"{text!r} is not an increase of perplexity", 'write "1%" or "0.01"')
    value = float(words[1]) / (100 if words[2] else 1)
    if not words[2] and value >= 1:
        raise PunaError(f"an increase of {text.strip()} would be {value:.0%}", f'write "{words[1]}%" if that is meant')
    return value


def better_format(text: str) -> str:
    """The next better number format than `text` (`int4_g128` -> `int8`); "" where there is none or it is unknown."""
    try:
        scheme = parse_format(text)
    except PunaError:
        return ""
    if scheme is None:
        return ""
    if scheme.kind == "float":
        return "fp8" if scheme.granularity == "tensor" else "none"
    bits = _BETTER_BITS.get(scheme.bits)
    if bits is None:
        return "none"
    return "int8" if bits == 8 else format_text(dataclasses.replace(scheme, bits=bits))


def suggestion(layer: Layer, files: str = "") -> Suggestion:
    """The next better format for a layer that `files` (their format) can hold, and what it costs."""
    better = better_format(layer.format)
    if better and files == "awq":
        better = "none"  # one number format must do for all of its layers
    if not better:
        return Suggestion(layer, "")
    scheme = parse_format(better)
    bits = (
        _PLAIN_BITS if scheme is None else scheme.bits + (_SCALE_BITS / scheme.group_size if scheme.group_size else 0)
    )
    return Suggestion(layer, better, max(0.0, (bits - layer.bits_per_weight) * layer.weights / 8))


def to_plain(value: Any) -> Any:
    """A figure (a dataclass) or anything made of them as JSON has it; numbers that are none become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_plain(kind: Any, value: Any) -> Any:
    """A value of the annotated type `kind` from plain JSON; null for a number is NaN."""
    options = [option for option in get_args(kind) if option is not type(None)]
    if isinstance(kind, UnionType):
        return None if value is None else from_plain(options[0], value)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(
            **{f.name: from_plain(hints[f.name], value[f.name]) for f in dataclasses.fields(kind) if f.name in value}
        )  # type: ignore[operator]
    if get_origin(kind) in (list, tuple):
        return get_origin(kind)(from_plain(options[0], item) for item in value)
    return math.nan if kind is float and value is None else value
