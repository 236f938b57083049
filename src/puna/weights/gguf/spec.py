"""A model's shape as GGUF metadata, and back.

llama.cpp's `llama` covers Llama and Mistral, `qwen2` and `qwen3` themselves. What the keys do not say the tensors do:
tied embeddings (no output.weight), biases, and Llama 3's rotary scaling, whose channel-by-channel divisors are a tensor
(rope_freqs.weight), so that its parameters must be worked out again from them.

Source of the keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.base.console import PunaError, say
from puna.model.rope import attention_scale, inverse_frequencies
from puna.model.spec import Rope, Spec

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> theirs
_DTYPES = {0: "float32", 32: "bfloat16"}  # general.file_type -> what the model is when nothing is rounded

# Keys behind "<architecture>." that stand for one field of Spec each.
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}


def write_spec(spec: Spec) -> dict[str, Any]:
    """The metadata of a model's shape. Errors: PunaError for what llama.cpp cannot compute."""
    _refuse(spec)
    arch = ARCHITECTURES[spec.model_type]
    keys: dict[str, Any] = {key: getattr(spec, field) for key, field in _KEYS.items()}
    keys["context_length"] = spec.max_len
    keys["attention.value_length"] = keys["rope.dimension_count"] = spec.head_dim
    keys["attention.layer_norm_rms_epsilon"] = spec.rms_norm_eps
    keys |= _write_rope(spec.rope) | _write_windows(spec)
    named = {} if spec.model_type == arch else {"puna.model_type": spec.model_type}
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in keys.items()}, **named}


def rope_divisors(spec: Spec) -> Tensor | None:
    """rope_freqs.weight (head_dim / 2,): plain frequency / scaled frequency, for Llama 3's scaling only."""
    if spec.rope.rope_type != "llama3":
        return None
    plain = inverse_frequencies(Rope(rope_theta=spec.rope.rope_theta), spec.head_dim)
    return plain / inverse_frequencies(spec.rope, spec.head_dim)


def read_spec(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], divisors: Tensor | None) -> Spec:
    """The shape of a file's model. `shapes` of its tensors by GGUF name; `divisors`: rope_freqs.weight, if it is there.

    Errors: PunaError for another architecture, a missing key, experts, partial rotary or unknown scaling.
    """
    arch = metadata.get("general.architecture", "none")
    if arch not in ARCHITECTURES.values():
        known = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise PunaError(f"the file's architecture is {arch!r}", f"puna reads GGUF files of {known}")
    keys = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    windows = _read_windows(keys)
    fields = _fields(keys, arch, shapes)
    spec = Spec(
        model_type=_family(metadata, arch, windows),
        **fields,
        rms_norm_eps=_shortest(_need(keys, "attention.layer_norm_rms_epsilon", arch)),
        rope=_read_rope(keys, arch, divisors, fields["head_dim"]),
        tie_word_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        qk_norm="blk.0.attn_q_norm.weight" in shapes,
        sliding_windows=windows,
        dtype=_DTYPES.get(metadata.get("general.file_type", -1), "float16"),
        **_read_ids(metadata),
    )
    _refuse_parts(keys, spec)
    return spec


def _fields(keys: dict[str, Any], arch: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    found = {field: keys[key] for key, field in _KEYS.items() if key in keys}
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        _need(keys, key, arch)
    for field, value in found.items():
        if isinstance(value, np.ndarray):  # one number per layer
            if len(set(value.tolist())) != 1:
                raise PunaError(
                    f"the layers of this model differ in {field}: {value.tolist()[:8]}", "use another model"
                )
            found[field] = int(value[0])
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
    if "token_embd.weight" in shapes:
        found["vocab_size"] = shapes["token_embd.weight"][0]
    return found


def _need(keys: Mapping[str, Any], key: str, arch: str) -> Any:
    if key not in keys:
        raise PunaError(f"the file has no key {arch}.{key}", "fetch the file again, or convert the model anew")
    return keys[key]


def _shortest(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(value)))


def _read_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    ends = map(
        int, metadata.get("puna.eos_token_ids", [i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None])
    )
    eos = tuple(dict.fromkeys(ends))
    return {"bos_token_id": ids["bos"], "eos_token_ids": eos, "pad_token_id": ids["padding"]}


def _refuse_parts(keys: Mapping[str, Any], spec: Spec) -> None:
    if keys.get("expert_count", 0):
        raise PunaError(f"the model has {keys['expert_count']} experts per layer", "puna reads dense models only")
    if keys.get("rope.dimension_count", spec.head_dim) != spec.head_dim:
        turned = keys["rope.dimension_count"]
        raise PunaError(f"rotary turns {turned} of {spec.head_dim} channels", "puna reads models that turn all")
    if keys.get("attention.value_length", spec.head_dim) != spec.head_dim:
        raise PunaError(f"keys have {spec.head_dim} channels, values {keys['attention.value_length']}", "no such model")


def _refuse(spec: Spec) -> None:
    """What llama.cpp's graph of the architecture does not have."""
    arch = ARCHITECTURES[spec.model_type]
    has = {name for name in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm") if getattr(spec, name)}
    allowed: dict[str, Collection[set[str]]] = {"qwen2": [{"qkv_bias"}], "qwen3": [{"qk_norm"}]}
    if (arch in allowed and has not in allowed[arch]) or (arch == "llama" and "qk_norm" in has):
        raise PunaError(
            f"llama.cpp's {arch} has no place for this model's {', '.join(sorted(has)) or 'missing biases'}",
            "export to a Hugging Face folder (--to hf) instead",
        )
    rope = spec.rope
    if rope.rope_type == "dynamic" or not rope.truncate or (rope.rope_type == "llama3" and arch != "llama"):
        raise PunaError(
            f"llama.cpp's {arch} has no rope_type {rope.rope_type!r}{'' if rope.truncate else ' without truncation'}",
            "set rope_scaling to null in config.json (plain rotary, within the trained length), or use --to hf",
        )


def _write_windows(spec: Spec) -> dict[str, Any]:
    windows = {w for w in spec.sliding_windows if w is not None}
    if not windows:
        return {}
    if len(windows) > 1:
        raise PunaError(f"the layers have windows of {sorted(windows)} tokens", "GGUF keeps one for all layers")
    window = windows.pop()
    if window < spec.max_len:
        say(f"llama.cpp attends to all tokens: beyond {window} tokens (the model's window) its answers will differ")
    keys: dict[str, Any] = {"attention.sliding_window": window}
    if None in spec.sliding_windows:
        keys["attention.sliding_window_pattern"] = [w is not None for w in spec.sliding_windows]
    return keys


def _read_windows(keys: Mapping[str, Any]) -> tuple[int | None, ...]:
    window, layers = keys.get("attention.sliding_window") or None, int(keys.get("block_count", 0))
    pattern = keys.get("attention.sliding_window_pattern", np.ones(layers, bool))
    if not isinstance(pattern, np.ndarray) or len(pattern) != layers:
        raise PunaError(f"a pattern of windows for {np.size(pattern)} of {layers} layers", "puna needs one entry each")
    return tuple(window if slides else None for slides in pattern)


def _family(metadata: Mapping[str, Any], arch: str, windows: tuple[int | None, ...]) -> str:
    """The model_type: as puna wrote it, else a llama with windows is a mistral."""
    written = metadata.get("puna.model_type", arch)
    if written != arch and ARCHITECTURES.get(written) == arch:
        return str(written)
    return "mistral" if arch == "llama" and any(windows) else arch


def _write_rope(rope: Rope) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope.freq_base": rope.rope_theta}
    if rope.rope_type == "llama3":
        keys["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
    if rope.rope_type == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    if rope.rope_type == "yarn":
        factor = rope.factor or rope.max_position_embeddings / rope.original_max_position_embeddings
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(factor)}
        keys["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
        keys["rope.scaling.yarn_beta_fast"] = float(rope.beta_fast)
        keys["rope.scaling.yarn_beta_slow"] = float(rope.beta_slow)
        share = attention_scale(rope) / _yarn_temperature(factor)
        keys |= {"rope.scaling.attn_factor": share} if abs(share - 1) > 1e-6 else {}
    return keys


def _yarn_temperature(factor: float) -> float:
    """What llama.cpp multiplies cos and sin with by itself."""
    return 1.0 if factor <= 1 else 1.0 + 0.1 * math.log(factor)


def _read_rope(keys: Mapping[str, Any], arch: str, divisors: Tensor | None, head_dim: int) -> Rope:
    length = int(_need(keys, "context_length", arch))
    rope = Rope(rope_theta=_shortest(keys.get("rope.freq_base", 10000.0)), max_position_embeddings=length)
    kind = keys.get("rope.scaling.type", "none")
    factor = _shortest(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)))
    original = int(keys.get("rope.scaling.original_context_length", 0))
    if kind not in ("none", "linear", "yarn") or (divisors is not None and kind != "none"):
        raise PunaError(f"the file scales its rotary embedding by {kind!r}", "puna reads linear, yarn and Llama 3's")
    if divisors is not None:
        return _llama3(rope, divisors, original, head_dim)
    if kind == "yarn":
        share = keys.get("rope.scaling.attn_factor", 1.0)
        return replace(
            rope,
            rope_type="yarn",
            factor=factor,
            original_max_position_embeddings=original or length,
            beta_fast=keys.get("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.get("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=0.0 if share == 1 else share * _yarn_temperature(factor),
        )
    return rope if factor == 1 else replace(rope, rope_type="linear", factor=factor)


def _llama3(rope: Rope, divisors: Tensor, original: int, head_dim: int) -> Rope:
    """Llama 3's parameters from the divisors they made; PunaError when none make them.

    Meta's own are tried first. Else, of the channels in between, smooth = (turns - low) / (high - low) is a line in
    the plain frequency; of low, high and the original length only two follow from it: low = 1 where none is known.
    """
    plain = inverse_frequencies(Rope(rope_theta=rope.rope_theta), head_dim)
    factor = float(f"{float(divisors.max()):.6g}")
    if divisors.shape != plain.shape:
        raise PunaError(f"rope_freqs.weight has {len(divisors)} numbers for {len(plain)} channels", "fetch it again")
    if factor == 1 and bool((divisors == 1).all()):
        return rope
    tries = [(length, 1.0, 4.0) for length in (original, 8192) if length]
    inside = (divisors > 1 + 1e-4) & (divisors < factor * (1 - 1e-4))
    if int(inside.sum()) > 1 and factor > 1:
        smooth = (1 / divisors[inside].double() - 1 / factor) / (1 - 1 / factor)
        x = torch.stack([plain[inside].double(), torch.ones_like(smooth)], 1)
        slope, level = torch.linalg.lstsq(x, smooth).solution.tolist()
        length = original or round(2 * math.pi * slope / -level)
        span = length / (2 * math.pi * slope)  # high - low
        tries.append((length, round(-level * span, 3), round((1 - level) * span, 3)))
    for length, low, high in tries:
        found = replace(rope, rope_type="llama3", factor=factor, original_max_position_embeddings=length,
                        low_freq_factor=low, high_freq_factor=high)  # fmt: skip
        if torch.allclose(plain / inverse_frequencies(found, head_dim), divisors, rtol=1e-4, atol=0):
            return found
    raise PunaError(
        f"rope_freqs.weight (divisors {float(divisors.min()):.3g} to {factor:.3g}) is no scaling that puna knows",
        "puna reads Llama 3's; convert the model's Hugging Face folder instead",
    )
