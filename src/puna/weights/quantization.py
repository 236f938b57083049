"""`quantization_config` of a config.json, read and written: which linear layer is stored how.

Four methods: `compressed-tensors` (what vLLM and transformers load), `gptq` (versions 1 and 2), `awq` (gemm), and
`puna`: compressed-tensors' keys and tensors, and beside them what it has no words for (low-rank errors, outlier
thresholds, act-order groups). Its own name, and files called `puna*.safetensors`, make other tools refuse the folder
instead of computing something else: transformers only warns of a method it does not know.

Layers are called by Hugging Face's names here: `model.layers.0.self_attn.q_proj`. Sources: the compressed-tensors
package (`QuantizationConfig`, `match_targets`), AutoGPTQ's and GPTQModel's quantize_config (`dynamic`), AutoAWQ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from puna.base.console import PunaError
from puna.model.spec import QUANT_METHODS
from puna.ops.formats.scheme import Scheme

PACK, INT, FLOAT, MIXED = "pack-quantized", "int-quantized", "float-quantized", "mixed-precision"
GPTQ, GPTQ_V2, AWQ, COMPRESSED, OWN = "gptq", "gptq_v2", "awq", "compressed-tensors", "puna"
FORMATS = (COMPRESSED, GPTQ, GPTQ_V2, AWQ, OWN)


@dataclass(frozen=True)
class LayerFormat:
    """How one linear layer is stored. layout: PACK, INT, FLOAT, or the method's name for GPTQ and AWQ.

    activations: None, a token scheme (dynamic) or a tensor scheme (static). act_order, threshold, low_rank: see
    `QuantizedWeight` and `Packed`.
    """

    scheme: Scheme
    layout: str
    activations: Scheme | None = None
    act_order: bool = False
    threshold: float = 0.0
    low_rank: int = 0


def layer_format(
    format: str,
    scheme: Scheme,
    activations: Scheme | None = None,
    act_order: bool = False,
    threshold: float = 0.0,
    low_rank: int = 0,
) -> LayerFormat:
    """How a layer is stored in one of FORMATS.

    compressed-tensors has two layouts for int8: plain numbers only where inputs are rounded, too, since vLLM reads the
    others from packed words alone.
    """
    if format in (GPTQ, GPTQ_V2, AWQ):
        layout = format
    elif scheme.kind == "float":
        layout = FLOAT
    else:
        plain = scheme.bits == 8 and scheme.granularity in ("channel", "tensor") and activations is not None
        layout = INT if plain else PACK
    return LayerFormat(scheme, layout, activations, act_order, threshold, low_rank)


@dataclass(frozen=True)
class Quantization:
    """A folder's quantization. rules: (target, format) of which the first that matches a layer counts.

    A target is a name, `re:` and a pattern, or `Linear` (any). `by_presence`: GPTQ and AWQ do not list what they left
    alone; a layer is quantized if its tensors are there.
    """

    method: str
    rules: tuple[tuple[str, LayerFormat | None], ...]
    kv: Scheme | None = None
    by_presence: bool = False

    def format_of(self, layer: str) -> LayerFormat | None:
        """The format of a linear layer by its name on disk; None: it is plain."""
        return next((found for target, found in self.rules if _matches(target, layer)), None)


def parse_quantization(config: Mapping[str, Any]) -> Quantization:
    """Read a `quantization_config`. Errors: `PunaError` for methods and options that are not understood in full."""
    method = config.get("quant_method")
    try:
        if method in (COMPRESSED, OWN):
            return _read_compressed(config)
        if method == GPTQ:
            return _read_gptq(config)
        if method == AWQ:
            return _read_awq(config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PunaError(
            f"quantization_config of method {method!r} is not whole: {type(error).__name__} {error}",
            "restore config.json from the model's source",
        ) from error
    raise PunaError(
        f"the weights are quantized by {method!r}, which puna does not read",
        f"quantization methods: {', '.join(QUANT_METHODS)}",
    )


def quantization_config(
    format: str, layers: Mapping[str, LayerFormat | None], kv: Scheme | None = None
) -> dict[str, Any]:
    """The `quantization_config` of layers (names on disk) written in one of FORMATS; the inverse of reading it.

    The head is always named: readers meet it as a linear layer even where it is tied to the embedding.
    """
    layers = {**layers, "lm_head": layers.get("lm_head")}
    if format in (COMPRESSED, OWN):
        return _write_compressed(format, layers, kv)
    return _write_gptq(format, layers) if format in (GPTQ, GPTQ_V2) else _write_awq(layers)


def _matches(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], layer) is not None
    return target in (layer, "Linear")


# --- compressed-tensors and our own ---------------------------------------------------------------------------------


def _read_compressed(config: Mapping[str, Any]) -> Quantization:
    _check_whole_layout(config)
    formats: dict[str, LayerFormat | None] = {}
    for group in config["config_groups"].values():
        if isinstance(group, list):
            raise _not_read("config_groups that name a preset", group)
        found = _read_group(group, config)
        formats |= dict.fromkeys(group["targets"], found)
    ignored: list[tuple[str, LayerFormat | None]] = [(target, None) for target in config.get("ignore") or ()]
    ordered = sorted(formats, key=lambda target: (target == "Linear", target.startswith("re:"), target))
    kv = config.get("kv_cache_scheme")
    rules = (*ignored, *((target, formats[target]) for target in ordered))
    return Quantization(config["quant_method"], rules, None if kv is None else _read_kv(kv))


def _check_whole_layout(config: Mapping[str, Any]) -> None:
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise _not_read("quantization_status", status)
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        if any(value not in ("dense", [], {}, None) for value in (config.get(key) or {}).values()):
            raise _not_read(key, config[key])


def _read_group(group: Mapping[str, Any], config: Mapping[str, Any]) -> LayerFormat | None:
    if group.get("output_activations") is not None:
        raise _not_read("output_activations", group["output_activations"])
    if group.get("weights") is None:
        raise _not_read("a group without weights", group["targets"])
    scheme = _read_weights(group["weights"])
    inputs = group.get("input_activations")
    activations = None if inputs is None else _read_activations(inputs)
    layout = group.get("format") or config.get("format")
    if layout == "naive-quantized":
        layout = FLOAT if scheme.kind == "float" else INT
    if layout not in (PACK, INT, FLOAT):
        raise _not_read("format", layout)
    ordered = group["weights"].get("actorder") in ("group", "dynamic")
    own = group.get("puna") or {}
    return LayerFormat(scheme, layout, activations, ordered, own.get("outlier_threshold", 0.0), own.get("low_rank", 0))


def _read_weights(args: Mapping[str, Any]) -> Scheme:
    if args.get("dynamic"):
        raise _not_read("dynamic weights", args)
    size = args.get("group_size")
    strategy = args.get("strategy") or _strategy(size)
    if strategy == "block":
        height, width = args["block_structure"]
        if height != width:
            raise _not_read("block_structure", args["block_structure"])
        size = height
    if strategy not in ("tensor", "channel", "group", "block"):
        raise _not_read("strategy of weights", strategy)
    number = size if strategy in ("group", "block") else 0
    bits, kind, symmetric = args.get("num_bits", 8), args.get("type", "int"), args.get("symmetric", True)
    return Scheme(bits, kind, symmetric, strategy, number)  # type: ignore[arg-type]


def _strategy(group_size: int | None) -> str:
    return "tensor" if group_size is None else "channel" if group_size == -1 else "group"


def _read_activations(args: Mapping[str, Any]) -> Scheme:
    strategy = args.get("strategy") or _strategy(args.get("group_size"))
    if not args.get("symmetric", True) or (strategy, args.get("dynamic", False)) not in (
        ("token", True),
        ("tensor", False),
    ):
        raise _not_read("input_activations (puna: symmetric, per token dynamic or per tensor static)", dict(args))
    return Scheme(args.get("num_bits", 8), args.get("type", "int"), True, strategy)  # type: ignore[arg-type]


def _read_kv(args: Mapping[str, Any]) -> Scheme:
    strategy = {"tensor": "tensor", "attn_head": "head"}.get(args.get("strategy") or "tensor")
    if strategy is None or args.get("dynamic") or not args.get("symmetric", True) or args.get("num_bits", 8) != 8:
        raise _not_read("kv_cache_scheme (puna: 8 bits, symmetric, static, per tensor or head)", dict(args))
    return Scheme(8, args.get("type", "int"), True, strategy)  # type: ignore[arg-type]


def _write_compressed(method: str, layers: Mapping[str, LayerFormat | None], kv: Scheme | None) -> dict[str, Any]:
    """The commonest format has the target Linear, others name their layers; what is plain is ignored by name."""
    names: dict[LayerFormat, list[str]] = {}
    for layer, found in layers.items():
        if found is not None:
            names.setdefault(found, []).append(layer)
    ranked = sorted(names, key=lambda found: -len(names[found]))
    targets = [["Linear", *(n for n in names[f] if n == "lm_head")] if f is ranked[0] else names[f] for f in ranked]
    layouts = {found.layout for found in ranked}
    return {
        "quant_method": method,
        "format": layouts.pop() if len(layouts) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [layer for layer, found in layers.items() if found is None],
        "kv_cache_scheme": None if kv is None else _kv_args(kv),
        "config_groups": {
            f"group_{i}": _write_group(found, target)
            for i, (found, target) in enumerate(zip(ranked, targets, strict=True))
        },
    }


def _write_group(found: LayerFormat, targets: Sequence[str]) -> dict[str, Any]:
    weights = _args(found.scheme) | ({"actorder": "group"} if found.act_order else {})
    own = {"outlier_threshold": found.threshold, "low_rank": found.low_rank}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": None if found.activations is None else _args(found.activations),
        "output_activations": None,
        "format": found.layout,
        **({"puna": own} if found.threshold or found.low_rank else {}),
    }


def _args(scheme: Scheme) -> dict[str, Any]:
    block = scheme.granularity == "block"
    return {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "dynamic": scheme.granularity == "token",
        **({"block_structure": [scheme.group_size] * 2} if block else {}),
    }


def _kv_args(scheme: Scheme) -> dict[str, Any]:
    return _args(scheme) | {"strategy": "attn_head" if scheme.granularity == "head" else "tensor"}


# --- GPTQ and AWQ ---------------------------------------------------------------------------------------------------


def _read_gptq(config: Mapping[str, Any]) -> Quantization:
    layout = config.get("checkpoint_format", GPTQ)
    if layout not in (GPTQ, GPTQ_V2):
        raise _not_read("checkpoint_format", layout)
    base = LayerFormat(_gptq_scheme(config), layout, None, bool(config.get("desc_act", False)))
    rules: list[tuple[str, LayerFormat | None]] = []
    for pattern, changes in (config.get("dynamic") or {}).items():
        target = f"re:{pattern.removeprefix('+:').removeprefix('-:')}"
        scheme = _gptq_scheme({**config, **changes})
        rules.append((target, None if pattern.startswith("-:") else replace(base, scheme=scheme)))
    return Quantization(GPTQ, (*rules, ("Linear", base)), by_presence=True)


def _gptq_scheme(config: Mapping[str, Any]) -> Scheme:
    """Whether a layer is symmetric its zero points say: `sym` is not asked."""
    size = int(config["group_size"])
    return Scheme(int(config["bits"]), "int", True, "group" if size > 0 else "channel", max(0, size))


def _read_awq(config: Mapping[str, Any]) -> Quantization:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm" or config.get("bits", 4) != 4:
        raise _not_read("awq version and bits (puna: gemm, 4)", f"{version}, {config.get('bits')}")
    return Quantization(AWQ, (("Linear", LayerFormat(_gptq_scheme({"bits": 4, **config}), AWQ)),), by_presence=True)


def _write_gptq(format: str, layers: Mapping[str, LayerFormat | None]) -> dict[str, Any]:
    """The commonest number format for all, others by `dynamic` (GPTQModel, vLLM)."""
    count: dict[Scheme, int] = {}
    for found in layers.values():
        if found is not None:
            count[found.scheme] = count.get(found.scheme, 0) + 1
    base = max(count, key=lambda scheme: count[scheme])
    dynamic: dict[str, Any] = {}
    for layer, found in layers.items():
        if found is None:
            dynamic[f"-:{re.escape(layer)}$"] = {}
        elif _bits_and_size(found.scheme) != _bits_and_size(base):
            dynamic[f"+:{re.escape(layer)}$"] = _bits_and_size(found.scheme)
    stored = [found for found in layers.values() if found is not None]
    return {
        "quant_method": GPTQ,
        "checkpoint_format": format,
        **_bits_and_size(base),
        "sym": all(found.scheme.symmetric for found in stored),
        "desc_act": any(found.act_order for found in stored),
        "true_sequential": True,
        "damp_percent": 0.01,
        "static_groups": False,
        "lm_head": layers.get("lm_head") is not None,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic and set(dynamic) != {"-:lm_head$"} else {}),
    }


def _bits_and_size(scheme: Scheme) -> dict[str, int]:
    return {"bits": scheme.bits, "group_size": scheme.group_size or -1}


def _write_awq(layers: Mapping[str, LayerFormat | None]) -> dict[str, Any]:
    base = next(found.scheme for found in layers.values() if found is not None)
    plain = [layer for layer, found in layers.items() if found is None]
    return {
        "quant_method": AWQ,
        "version": "gemm",
        **_bits_and_size(base),
        "zero_point": True,
        "modules_to_not_convert": plain or None,
    }


def _not_read(what: str, value: Any) -> PunaError:
    return PunaError(
        f"quantization_config: {what} = {value!r} is not supported",
        "load the original model and `puna quantize` it, or convert with the tool that wrote it",
    )
