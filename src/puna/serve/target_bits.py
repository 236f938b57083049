"""`--target-bits`: which layer gets how many bits, decided by what rounding it costs the whole model."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor

from puna.base.console import PunaError, progress, size
from puna.base.hardware import available_memory
from puna.model.spec import Spec
from puna.quant.allocate import allocate
from puna.quant.config import QuantConfig, hf_name, parse_format
from puna.quant.sensitivity import PROBE_TOKENS, candidates, measure_damage
from puna.weights.folder import load_model
from puna.weights.holding import linear_shapes, why_not
from puna.weights.quantization import layer_format

_SCALE_BITS = 16


def choose_bits(model: str, config: QuantConfig, spec: Spec, format: str, tokens_ST: Tensor) -> QuantConfig:
    """The config with an override per layer, so that the average (scales included) is at most `target_bits`.

    Layers that the user's own overrides name keep what these say, and count. `format`: of the files, whose bits are
    the ones on offer. Errors: `PunaError` for too little memory, a format with one choice, a target that is too low.
    """
    _check_memory(spec)
    shapes = linear_shapes(spec)
    texts = [text for text in candidates(config) if _fits(text, format, shapes)]
    if len(texts) < 2:
        raise PunaError(
            f"{format} offers {', '.join(texts) or 'nothing'} for {config.weights}: there is nothing to choose among",
            "use --format compressed-tensors, or leave --target-bits out",
        )
    net = load_model(model)
    rows = max(1, PROBE_TOKENS // config.seq_len)
    with progress(sum(p.nbytes for p in net.parameters()), "measuring sensitivity") as advance:
        damage, bits = measure_damage(net, tokens_ST[:rows], texts, advance)
    for layer in list(damage):
        if is_named(layer, config):
            _fix(layer, config.format_of(layer), damage, bits)
    weights = {layer: shapes[layer][0] * shapes[layer][1] for layer in damage}
    chosen = allocate(damage, bits, weights, config.target_bits)
    overrides = tuple(f"{layer}={text}" for layer, text in chosen.items() if text != config.weights)
    return replace(config, overrides=(*overrides, *config.overrides))


def is_named(layer: str, config: QuantConfig) -> bool:
    """Whether an override names this layer."""
    return any(fnmatchcase(name, pattern) for pattern, _ in config.pairs() for name in (layer, hf_name(layer)))


def _fix(layer: str, text: str, damage: dict[str, dict[str, float]], bits: dict[str, dict[str, float]]) -> None:
    """One choice for a layer; a layer that stays plain is no part of the average."""
    scheme = parse_format(text)
    del damage[layer], bits[layer]
    if scheme is not None:
        scales = _SCALE_BITS / scheme.group_size if scheme.group_size else 0.0
        damage[layer], bits[layer] = {text: 0.0}, {text: scheme.bits + scales}


def _fits(text: str, format: str, shapes: dict[str, tuple[int, int]]) -> bool:
    scheme = parse_format(text)
    assert scheme is not None
    form = layer_format(format, scheme)
    return all(why_not(format, form, shape) is None for layer, shape in shapes.items() if layer != "lm_head")


def _check_memory(spec: Spec) -> None:
    needed, free = int(1.5 * 4 * spec.num_params()), available_memory()
    if needed > free:
        raise PunaError(
            f"--target-bits measures every layer on the whole model, which needs {size(needed)} of memory; "
            f"{size(free)} are free",
            "choose formats with --override, or run it on a larger machine",
        )
