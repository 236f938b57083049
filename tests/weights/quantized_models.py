"""Small quantized models for tests: random weights, rounded to nearest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.formats.kv import KVScales
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import round_to_nearest
from puna.ops.formats.scheme import Scheme
from puna.text.tokenizer import Tokenizer
from puna.weights.export import QuantizedWriter
from puna.weights.folder import empty_model
from puna.weights.quantized import linear_layers

IDS = torch.arange(40)


def random_model(family: str = "llama", tied: bool = True) -> Transformer:
    """Two layers of width 128 whose logits are spread out; qwen2 has biases that are not zero."""
    spec = Spec.preset("debug").replace(
        hidden_size=128, intermediate_size=256, head_dim=32, tie_word_embeddings=tied, bos_token_id=1,
    )  # fmt: skip
    if family in ("qwen2", "qwen3"):
        spec = spec.replace(model_type=family, qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
    model = empty_model(spec, torch.float32, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    model.init_weights(draw)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
        elif name.endswith("bias"):
            parameter.data.normal_(generator=draw)
    return model.requires_grad_(False).eval()


def parameters_of(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model.logits(model(IDS, IDS, PackedCausal.of([40])))


def quantize(
    model: Transformer,
    scheme: Scheme,
    inputs: Scheme | None = None,
    overrides: Mapping[str, Scheme | None] | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> dict[str, QuantizedWeight]:
    """Every linear layer but the head, rounded to nearest; overrides by the end of a layer's name."""
    found = {}
    parameters = parameters_of(model)
    for layer in linear_layers(parameters):
        chosen = None if layer == "lm_head" else scheme
        for end, other in (overrides or {}).items():
            chosen = other if layer.endswith(end) else chosen
        if chosen is not None:
            packed = round_to_nearest(parameters[f"{layer}.weight"], chosen, scale_dtype)
            rounded = inputs if chosen == scheme else None
            static = rounded is not None and rounded.granularity == "tensor"
            scale = torch.tensor([4.0 / rounded.half_range]) if static and rounded is not None else None
            found[layer] = QuantizedWeight(packed, rounded, scale)
    return found


def parts_of(parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{part: {name: tensor}} as the walk hands them over: the embedding, block by block, the rest."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parameters.items():
        part = f"layer-{int(name.split('.')[1]):04d}" if name.startswith("layers.") else name.split(".")[0]
        parts.setdefault(part, {})[name] = tensor
    return parts


def write(
    out: Path,
    model: Transformer,
    quantized: Mapping[str, QuantizedWeight],
    format: str = "compressed-tensors",
    kv: KVScales | None = None,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The model's folder with these layers quantized."""
    with QuantizedWriter(out, model.spec, tokenizer, format, dtype=dtype) as writer:
        for part, tensors in parts_of(parameters_of(model)).items():
            writer.add(part, {name: quantized.get(name.removesuffix(".weight"), t) for name, t in tensors.items()})
        return writer.finish(kv)
