"""What a model's weight files hold, for its card: number formats, bits per weight, bytes. Only headers are read.

No torch here: the card of a 405B model is instant.
"""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from puna.base.console import PunaError
from puna.base.storage import read_json
from puna.model.spec import Spec
from puna.quant.config import format_text, hf_name
from puna.weights.quantization import LayerFormat, parse_quantization

_LINEARS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_PLAIN_TYPES = {"F32", "F16", "BF16"}
_ENDINGS = (".safetensors", ".bin", ".pth", ".gguf")


def weight_bytes(place: Path) -> int:
    """Bytes of the weight files of a folder or file; 0 if there are none."""
    files = [place] if place.is_file() else place.iterdir() if place.is_dir() else []
    return sum(file.stat().st_size for file in files if file.suffix in _ENDINGS)


def stored_quantization(place: Path, spec: Spec) -> dict[str, Any] | None:
    """How the linear layers of a folder or GGUF file are stored; None for a plain one.

    {"method", "formats": {name: layers}, "inputs", "kv", "bits_per_weight": of quantized layers, scales included}.
    Raises PunaError for a quantization that puna does not read.
    """
    if place.is_file() and place.suffix == ".gguf":
        return _of_gguf(place)
    config = read_json(place / "config.json") if (place / "config.json").exists() else {}
    if config.get("quantization_config") is None:
        return None
    found = parse_quantization(config["quantization_config"])
    sizes = _tensor_bytes(place)
    layers: dict[str, LayerFormat | None] = {}
    for name in _layers(spec):
        form = found.format_of(name)
        layers[name] = form if not found.by_presence or f"{name}.qweight" in sizes else None
    forms = Counter(_text(form) for form in layers.values())
    inputs = {form.activations for form in layers.values() if form is not None and form.activations is not None}
    packed = [name for name, form in layers.items() if form is not None]
    stored = sum(
        size for name, size in sizes.items() if name.rpartition(".")[0] in packed and not name.endswith("bias")
    )
    weights = sum(prod(_shape(name, spec)) for name in packed)
    return {
        "method": found.method,
        "formats": dict(forms.most_common()),
        "inputs": ", ".join(sorted(f"{_kind(i.kind)} per {i.granularity}" for i in inputs)) or None,
        "kv": None if found.kv is None else f"{_kind(found.kv.kind)} per {found.kv.granularity}",
        "bits_per_weight": round(8 * stored / weights, 3) if weights else None,
    }


def _of_gguf(place: Path) -> dict[str, Any] | None:
    from puna.weights.gguf.model import GgufSource

    source = GgufSource(place)
    matrices = {name: shape for name, shape in source.shapes.items() if len(shape) == 2}
    types = Counter(source.type_of(name) for name in matrices)
    if set(types) <= _PLAIN_TYPES:
        return None
    stored = sum(source.file.tensors[name].bytes for name in matrices)
    bits = 8 * stored / sum(map(prod, matrices.values()))
    return {
        "method": "gguf", "formats": dict(types.most_common()), "inputs": None, "kv": None,
        "bits_per_weight": round(bits, 3),
    }  # fmt: skip


def _layers(spec: Spec) -> list[str]:
    """Names on disk of all linear layers."""
    blocks = [hf_name(f"layers.{i}.{linear}") for i in range(spec.num_hidden_layers) for linear in _LINEARS]
    return [*blocks, *([] if spec.tie_word_embeddings else ["lm_head"])]


def _shape(name: str, spec: Spec) -> tuple[int, int]:
    d, f = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    shapes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q), "gate_proj": (f, d),
              "up_proj": (f, d), "down_proj": (d, f), "lm_head": (spec.vocab_size, d)}  # fmt: skip
    return shapes[name.rpartition(".")[2]]


def _text(form: LayerFormat | None) -> str:
    return "plain" if form is None else format_text(form.scheme)


def _kind(kind: str) -> str:
    return "fp8" if kind == "float" else "int8"


def _tensor_bytes(folder: Path) -> dict[str, int]:
    """{tensor: bytes} of a folder's safetensors files, from their headers."""
    found: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            try:
                header = json.loads(opened.read(length) if length < file.stat().st_size else b"")
            except ValueError as error:
                raise PunaError(f"{file} is not a whole safetensors file", "copy it again from its source") from error
        found |= {
            name: entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        }
    return found
