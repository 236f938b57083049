"""Which number format each tensor of a GGUF file gets: llama.cpp's mixes, tensor by tensor.

Some tensors repay bits more than others: the output head, the values of attention, the MLP's way down; and among the
layers the first and last eighth and every third between. Where 256 does not divide a row, a format of 32 stands in.

Source: llama.cpp, src/llama-quant.cpp, llama_tensor_get_type_impl (late 2026).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.ops.formats.gguf import TYPES

# name -> (general.file_type, the format of most tensors)
MIXES = {
    "F32": (0, "F32"), "F16": (1, "F16"), "BF16": (32, "BF16"), "Q8_0": (7, "Q8_0"), "Q6_K": (18, "Q6_K"),
    "Q5_K_M": (17, "Q5_K"), "Q5_K_S": (16, "Q5_K"), "Q4_K_M": (15, "Q4_K"), "Q4_K_S": (14, "Q4_K"),
    "Q5_1": (9, "Q5_1"), "Q5_0": (8, "Q5_0"), "Q4_1": (3, "Q4_1"), "Q4_0": (2, "Q4_0"),
}  # fmt: skip
ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as in llama.cpp
_PLAIN = ("F32", "F16", "BF16", "Q8_0")  # used for all matrices alike
_STAND_IN = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"blk\.(\d+)\.")


def mix_named(name: str) -> str:
    """The mix of that name, aliases resolved. Errors: PunaError that lists the names."""
    name = ALIASES.get(name.upper(), name.upper())
    if name not in MIXES:
        raise PunaError(f"'{name}' is no GGUF type that puna writes", f"use one of {', '.join(MIXES)}")
    return name


def types_of(
    spec: Spec, mix: str, shapes: Mapping[str, tuple[int, ...]], has_importance: bool = False
) -> dict[str, str]:
    """{tensor's GGUF name: its format}; norms, biases and other vectors stay F32."""
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    return {
        name: "F32" if len(shape) < 2 else _fitting(_wanted(spec, mix, name, head, has_importance), shape[-1])
        for name, shape in shapes.items()
    }


def _wanted(spec: Spec, mix: str, name: str, head: str, has_importance: bool) -> str:
    base = MIXES[mix][1]
    if base in _PLAIN:
        return base
    if name == head:
        return "Q6_K"
    match = _LAYER.match(name)
    if match is None:
        return base
    layer, layers = int(match[1]), spec.num_hidden_layers
    if ".attn_v." in name:
        return _values(spec, mix, base, layer)
    if ".ffn_down." in name:
        if mix.endswith("_M"):
            return "Q6_K" if _takes_more(layer, layers) else base
        if layer < layers // 8:
            with_importance = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"} if has_importance else {}
            return {"Q4_K_S": "Q5_K", **with_importance}.get(mix, base)
    return base


def _values(spec: Spec, mix: str, base: str, layer: int) -> str:
    if mix.endswith("_M") and _takes_more(layer, spec.num_hidden_layers):
        return "Q6_K"
    if mix == "Q4_K_S" and layer < 4:
        return "Q5_K"
    # Eight query heads share a value head in the 70B models: more bits there cost little.
    is_70b = spec.num_hidden_layers == 80 and spec.num_attention_heads != spec.num_key_value_heads
    return "Q5_K" if base == "Q4_K" and is_70b else base


def _takes_more(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fitting(name: str, width: int) -> str:
    """The format itself, or the one that stands in where its blocks do not divide the rows."""
    for candidate in (name, _STAND_IN.get(name, name)):
        if width % TYPES[candidate].weights == 0:
            return candidate
    return "F16"
