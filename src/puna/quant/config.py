"""What a quantization is: one frozen object for calibration, training, export and serving, saved with the model.

A number format is written as text: `int4_g128` (four bits, groups of 128), `int4_g32_asym` (with zero points), `int3`
(per channel), `int8`, `fp8` (per channel), `fp8_tensor`, `fp8_b128` (blocks of 128 x 128), `none` (left as it is).
No torch here: `puna quantize --help` reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from puna.base.config import build, knob
from puna.base.console import PunaError
from puna.ops.formats.scheme import Scheme

_TEXT = re.compile(
    r"int(?P<bits>[2-8])(_g(?P<group>[1-9]\d*))?(?P<asym>_asym)?|fp8(_b(?P<block>[1-9]\d*)|(?P<tensor>_tensor))?"
)
_EXAMPLES = "int8, int4_g128, int4_g32_asym, int3_g128, int4, fp8, fp8_tensor, fp8_b128 or none"
CONFIG_FILE = "puna_quant.json"  # beside config.json: {"config": QuantConfig.to_dict(), ...}
ROUNDINGS = ("nearest", "gptq", "hqq")
RESCALES = ("none", "awq", "smooth")
ACTIVATIONS = ("none", "int8", "fp8", "int8_static", "fp8_static")
KV = ("none", "int8", "fp8", "int8_head", "fp8_head")


@dataclass(frozen=True)
class QuantConfig:
    """How every linear layer of a model is quantized, step by step: rescale, round, compensate."""

    weights: str = knob("int8", f"number format of the weights: {_EXAMPLES}")
    activations: str = knob("none", "of the inputs: none, int8, fp8 (per token, dynamic), int8_static, fp8_static")
    rescale: str = knob("none", "before rounding: none, awq (protect weights that matter) or smooth (move outliers)")
    alpha: float = knob(0.0, "share of the inputs' range that moves into the weights; 0: searched")
    clip: bool = knob(False, "search the share of each group's range that is kept")
    rounding: str = knob("nearest", "nearest, gptq (errors passed on to later columns) or hqq (no data)")
    act_order: bool = knob(True, "gptq: columns with large inputs first; groups stay neighbours in the file")
    damping: float = knob(0.01, "gptq: share of the mean diagonal that is added to it; raised where it must be")
    low_rank: int = knob(0, "rank of the error that is kept beside the weight (LoRC)")
    outlier_threshold: float = knob(0.0, "inputs this large keep full precision (LLM.int8(): 6); 0: none")
    kv: str = knob("none", "KV cache: none, int8, fp8, or int8_head, fp8_head for a scale per head")
    overrides: tuple[str, ...] = knob((), 'formats for some layers, later ones win: "*.down_proj=int8"')
    target_bits: float = knob(0.0, "average bits per weight, scales included; 0: every layer as `weights` says")
    samples: int = knob(0, "calibration sequences; 0: six tokens for every input of the widest layer")
    seq_len: int = knob(0, "tokens of each; 0: 512, or the model's context where that is shorter")
    seed: int = knob(0, "of the choice of calibration sequences")

    def __post_init__(self) -> None:
        if isinstance(self.overrides, Mapping):  # {"*.down_proj": "int8"}, as one writes it in Python
            object.__setattr__(self, "overrides", tuple(f"{name}={text}" for name, text in self.overrides.items()))
        for name, known in (("rounding", ROUNDINGS), ("rescale", RESCALES), ("activations", ACTIVATIONS), ("kv", KV)):
            _check_one_of(name, getattr(self, name), known)
        parse_format(self.weights)
        for pattern, text in self.pairs():
            if not pattern:
                raise PunaError(f"override {text!r} names no layers", 'write "*.down_proj=int8"')
            parse_format(text)
        self._check_numbers()
        self._check_together()

    @staticmethod
    def preset(name: str, **changes: Any) -> QuantConfig:
        """A known recipe by its name, with some fields changed."""
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, 1)
            raise PunaError(
                f"no quantization preset is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                f"presets: {', '.join(PRESETS)}",
            )
        return dataclasses.replace(QuantConfig(**PRESETS[name]), **changes)

    @staticmethod
    def of(table: Mapping[str, Any]) -> QuantConfig:
        """From plain values (a TOML section, or the JSON beside a model); an unknown key is a `PunaError`."""
        return build(QuantConfig, table)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def format_of(self, layer: str) -> str:
        """The format text for a linear layer, by our name (`layers.3.mlp.down_proj`) or Hugging Face's."""
        found = "none" if layer == "lm_head" else self.weights
        for pattern, text in self.pairs():
            if any(fnmatchcase(name, pattern) for name in (layer, hf_name(layer))):
                found = text
        return found

    def scheme_of(self, layer: str) -> Scheme | None:
        """The number format of a linear layer; None leaves it as it is."""
        return parse_format(self.format_of(layer))

    def pairs(self) -> list[tuple[str, str]]:
        """(pattern, format) of the overrides."""
        return [(pattern.strip(), text.strip()) for pattern, _, text in (o.rpartition("=") for o in self.overrides)]

    @property
    def activation_scheme(self) -> Scheme | None:
        """How inputs are rounded: per token (dynamic) or per tensor (static)."""
        if self.activations == "none":
            return None
        kind = "float" if self.activations.startswith("fp8") else "int"
        return Scheme(kind=kind, granularity="tensor" if self.activations.endswith("static") else "token")  # type: ignore[arg-type]

    @property
    def kv_scheme(self) -> Scheme | None:
        """The number format of the KV cache."""
        if self.kv == "none":
            return None
        kind = "float" if self.kv.startswith("fp8") else "int"
        return Scheme(kind=kind, granularity="head" if self.kv.endswith("head") else "tensor")  # type: ignore[arg-type]

    @property
    def needs_calibration(self) -> bool:
        """Whether text must run through the model before it can be quantized."""
        return (
            self.rounding == "gptq"
            or self.rescale != "none"
            or self.clip
            or self.low_rank > 0
            or self.kv != "none"
            or self.activations.endswith("static")
            or self.target_bits > 0
        )

    @property
    def is_plain(self) -> bool:
        """Whether the result is what plain rounding gives."""
        helped = self.rescale != "none" or self.clip or self.low_rank or self.outlier_threshold
        return self.rounding == "nearest" and not helped

    def _check_numbers(self) -> None:
        wrong = [
            (name, getattr(self, name), rule)
            for name, low, high, rule in _RANGES
            if not low <= getattr(self, name) <= high
        ]
        if wrong:
            name, value, rule = wrong[0]
            raise PunaError(f"{name} is {value}", f"{name} must be {rule}")

    def _check_together(self) -> None:
        scheme = parse_format(self.weights)
        if self.outlier_threshold and self.activations != "int8":
            raise PunaError(
                f"outlier_threshold {self.outlier_threshold:g} with activations {self.activations!r}: nothing to split",
                "use activations int8 (preset llm_int8)",
            )
        if self.rounding != "nearest" and scheme is not None and scheme.kind == "float":
            raise PunaError(
                f"rounding {self.rounding!r} works on integers, the weights are {self.weights!r}",
                "use rounding nearest for fp8, or an integer format such as int4_g128",
            )
        if self.target_bits and (scheme is None or scheme.kind == "float"):
            raise PunaError(f"target_bits cannot choose among bits of {self.weights!r}", "use weights int4_g128")


_RANGES = (
    ("alpha", 0, 1, "between 0 (searched) and 1"),
    ("damping", 1e-8, 1, "above 0 and at most 1"),
    ("low_rank", 0, 4096, "between 0 and 4096"),
    ("outlier_threshold", 0, 1e9, "0 or a positive number"),
    ("target_bits", 0, 8.5, "0 (off) or between 2 and 8.5"),
    ("samples", 0, 10**6, "0 (chosen) or a number of sequences"),
    ("seq_len", 0, 10**7, "0 (chosen) or a number of tokens"),
)

PRESETS: dict[str, dict[str, Any]] = {
    "int8_wo": {"weights": "int8"},
    "int4_wo": {"weights": "int4_g128"},
    "int4_hqq": {"weights": "int4_g64_asym", "rounding": "hqq"},
    "int4_awq": {"weights": "int4_g128", "rescale": "awq", "clip": True},
    "int4_gptq": {"weights": "int4_g128", "rounding": "gptq"},
    "int3_gptq": {"weights": "int3_g128", "rounding": "gptq", "clip": True},
    "int4_lorc": {"weights": "int4_g128", "low_rank": 32},
    "w8a8_sq": {"weights": "int8", "activations": "int8", "rescale": "smooth"},
    "llm_int8": {"weights": "int8", "activations": "int8", "outlier_threshold": 6.0},
    "fp8": {"weights": "fp8", "activations": "fp8"},
    "fp8_static": {"weights": "fp8_tensor", "activations": "fp8_static"},
}


def parse_format(text: str) -> Scheme | None:
    """`int4_g128` -> its Scheme; `none` -> None. Errors: `PunaError` with examples."""
    if text == "none":
        return None
    match = _TEXT.fullmatch(text)
    if match is None:
        raise PunaError(f"{text!r} is not a number format", f"formats: {_EXAMPLES}")
    if text.startswith("fp8"):
        block = int(match["block"] or 0)
        granularity = "block" if block else "tensor" if match["tensor"] else "channel"
        return Scheme(kind="float", granularity=granularity, group_size=block)  # type: ignore[arg-type]
    group = int(match["group"] or 0)
    return Scheme(int(match["bits"]), "int", not match["asym"], "group" if group else "channel", group)


def format_text(scheme: Scheme | None) -> str:
    """The inverse of `parse_format`."""
    if scheme is None:
        return "none"
    if scheme.kind == "float":
        return {"block": f"fp8_b{scheme.group_size}", "tensor": "fp8_tensor"}.get(scheme.granularity, "fp8")
    group = f"_g{scheme.group_size}" if scheme.group_size else ""
    return f"int{scheme.bits}{group}{'' if scheme.symmetric else '_asym'}"


def hf_name(layer: str) -> str:
    """Our name of a linear layer as Hugging Face's files spell it: model.layers.3.self_attn.q_proj."""
    return f"model.{layer.replace('.attn.', '.self_attn.')}" if layer.startswith("layers.") else layer


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, 1)
        raise PunaError(
            f"{name} is {value!r}", f"{f'did you mean {near[0]!r}? ' if near else ''}one of {', '.join(known)}"
        )
