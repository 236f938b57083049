"""LoRA adapters as PEFT's folders hold them: read and checked against a model's shape, and written.

    adapter_config.json         r, lora_alpha, target_modules, ...
    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ...lora_B.weight, ...

An adapter adds scaling * B A to the weights of linear layers; scaling is alpha / r, with `use_rslora` alpha / sqrt(r).
What the config promises and what the file holds must be the same: nothing missing, nothing left over.
Sources: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rslora); PEFT's LoraConfig.
Shapes: N outputs, K inputs, R rank.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from puna.base.console import PunaError, size
from puna.base.storage import atomic_folder, read_json, write_json
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.weights.names import HUGGINGFACE, names_on_disk
from puna.weights.quantized import linear_layers
from puna.weights.tensor_file import TensorFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MERGE = "merge the adapter into its model (PEFT's merge_and_unload) and load the result as a model"

# Fields of LoraConfig that change what an adapter computes, in ways that are not done here.
_REFUSED = {
    "use_dora": "DoRA", "lora_bias": "biases in lora_B", "modules_to_save": "whole modules",
    "trainable_token_indices": "trained tokens", "target_parameters": "adapted parameters outside of linear layers",
    "layer_replication": "replicated layers", "alora_invocation_tokens": "an adapter that begins at certain tokens",
    "use_qalora": "QALoRA", "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow routing", "kasa_config": "KaSA",
}  # fmt: skip
# Initialisations that change the model's own weights: without these changes the adapter is another function.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one linear layer: y += scaling * (x down^T) up^T.

    Shapes: down_RK (rank, inputs) is PEFT's lora_A, up_NR (outputs, rank) its lora_B; dtypes as in the file.
    """

    down_RK: Tensor
    up_NR: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.down_RK.shape[0]

    def weight(self) -> Tensor:
        """What the layer's weight would grow by if the adapter were merged: (N, K) fp32."""
        return self.scaling * (self.up_NR.float() @ self.down_RK.float())


@dataclass(frozen=True)
class Adapter:
    """deltas: by our names of linear layers (`layers.0.attn.q_proj`).

    digest: 16 bytes that stand for what it computes (layers, scalings, numbers), not for where it lies or its name.
    """

    deltas: dict[str, Delta]
    digest: bytes

    @staticmethod
    def of(deltas: Mapping[str, Delta]) -> Adapter:
        """An adapter from its parts, with their digest."""
        digest = hashlib.blake2b(digest_size=16)
        ordered = {layer: deltas[layer] for layer in sorted(deltas)}
        for layer, delta in ordered.items():
            shapes = [*delta.down_RK.shape, *delta.up_NR.shape]
            digest.update(f"{layer} {delta.scaling!r} {shapes} {delta.down_RK.dtype} {delta.up_NR.dtype}\n".encode())
            digest.update(_bytes(delta.down_RK))
            digest.update(_bytes(delta.up_NR))
        return Adapter(ordered, digest.digest())

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(delta.down_RK.nbytes + delta.up_NR.nbytes for delta in self.deltas.values())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_adapter(path: str | Path, spec: Spec) -> Adapter:
    """The adapter in a PEFT folder, checked against the model's shape.

    Errors: `PunaError` for anything that is not a whole LoRA adapter of linear layers of such a model, or that holds
    numbers that are not finite.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise PunaError(f"no adapter folder at {folder}", f"give a folder with {CONFIG} and {WEIGHTS}")
    config = _read_config(folder)
    pairs = _read_pairs(folder)
    modules = _linear_shapes(spec)
    _check_modules(set(pairs), modules, config, folder)
    deltas = {}
    for module, (down_RK, up_NR) in pairs.items():
        layer, shape = modules[module]
        rank, scaling = config.rank_and_scaling(module)
        _check_pair(module, down_RK, up_NR, rank, shape, folder)
        deltas[layer] = Delta(down_RK, up_NR, scaling)
    return Adapter.of(deltas)


@dataclass(frozen=True)
class _Config:
    """The fields of adapter_config.json that decide what is computed."""

    fields: dict[str, Any]
    folder: Path

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """Of one module (its name on disk): patterns are regular expressions for the end of the name, as in PEFT."""
        rank = self._number("r", module, "rank_pattern", 8)
        alpha = self._number("lora_alpha", module, "alpha_pattern", 8)
        if rank != int(rank) or rank < 1:
            raise self.wrong(f"the rank of {module} is {rank}")
        return int(rank), alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _number(self, field: str, module: str, pattern_field: str, default: float) -> float:
        value = self.fields.get(field, default)
        for pattern, special in self._patterns(pattern_field).items():
            if self.matches(re.match, rf"(.*\.)?({pattern})$", module):
                value = special
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(f"{field} of {module} is {value!r}, not a number")
        return value

    def _patterns(self, field: str) -> dict[str, Any]:
        patterns = self.fields.get(field) or {}
        if not isinstance(patterns, dict):
            raise self.wrong(f"{field} is {patterns!r}, not an object of names and numbers")
        return patterns

    def targets(self, module: str) -> bool:
        """Whether the config names this module: `target_modules` less `exclude_modules`, in some of the layers."""
        if self._named("exclude_modules", module):
            return False
        if self.fields.get("target_modules") == "all-linear":
            return module != "lm_head"
        return self._named("target_modules", module) and self._in_layers(module)

    def _named(self, field: str, module: str) -> bool:
        names = self.fields.get(field) or []
        if isinstance(names, str):
            return self.matches(re.fullmatch, names, module)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.wrong(f"{field} is {names!r}, not a list of names or a regular expression")
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _in_layers(self, module: str) -> bool:
        chosen = self.fields.get("layers_to_transform")
        if chosen is None or chosen == [] or isinstance(self.fields["target_modules"], str):
            return True
        index = module.split(".")[2] if module.startswith("model.layers.") else ""
        return index in {str(one) for one in (chosen if isinstance(chosen, list) else [chosen])}

    def matches(self, how: Any, pattern: str, module: str) -> bool:
        """A user's regular expression, which may be broken."""
        try:
            return how(pattern, module) is not None
        except re.error as error:
            raise self.wrong(f"{pattern!r} is no regular expression ({error})") from error

    def wrong(self, what: str) -> PunaError:
        """For a config that cannot be read."""
        return PunaError(f"{self.folder / CONFIG}: {what}", "write the adapter again with PEFT's save_pretrained")


def _read_config(folder: Path) -> _Config:
    fields = read_json(folder / CONFIG)
    if not isinstance(fields, dict):
        raise PunaError(f"{folder / CONFIG} holds no object", "write the adapter again with PEFT's save_pretrained")
    if fields.get("peft_type") != "LORA":
        raise PunaError(f"{folder} is a {fields.get('peft_type')!r} adapter, not 'LORA'", "train a LoRA adapter")
    if fields.get("bias", "none") != "none":
        raise PunaError(f"{folder} also trained biases (bias = {fields['bias']!r})", _MERGE)
    for field, what in _REFUSED.items():
        if fields.get(field):
            raise PunaError(f"{folder} uses {what} ({field} = {fields[field]!r}), which is not done here", _MERGE)
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise PunaError(
            f"{folder} was begun with init_lora_weights = {start!r}, which changes the model's own weights",
            "save it with path_initial_model_for_weight_conversion (PEFT's save_pretrained), or merge it",
        )
    return _Config(fields, folder)


def _read_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{module on disk: (A, B)}; the two halves of every pair are there, and nothing else."""
    tensors = _read_tensors(folder / WEIGHTS)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        end = next((end for end in (_DOWN, _UP) if name.endswith(end)), None)
        if end is None or not name.startswith(_PREFIX):
            raise _strange(name, folder)
        found.setdefault(name.removeprefix(_PREFIX).removesuffix(end), {})[end] = tensor
    for module, halves in found.items():
        if len(halves) < 2:
            there, missing = next(iter(halves)), _UP if _DOWN in halves else _DOWN
            raise PunaError(f"{folder / WEIGHTS} holds {module}{there} without {missing[1:]}", _AGAIN)
    if not found:
        raise PunaError(f"{folder / WEIGHTS} holds no tensors", _AGAIN)
    return {module: (halves[_DOWN], halves[_UP]) for module, halves in found.items()}


_AGAIN = "the file is damaged or not whole; copy it again from its source"


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Read, not mapped: an adapter is small, and its trainer may write a newer one in the same place."""
    if not file.exists():
        pickled = file.with_suffix(".bin").exists()
        hint = "save it with safe_serialization=True: a pickle can run code" if pickled else "copy the whole folder"
        raise PunaError(f"{file} does not exist" + (", only adapter_model.bin" if pickled else ""), hint)
    try:
        return load(file.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise PunaError(
            f"{file} is not a whole safetensors file ({size(file.stat().st_size)}): {error}", _AGAIN
        ) from error


def _strange(name: str, folder: Path) -> PunaError:
    """For a tensor that is no half of a pair of a linear layer."""
    if "lora_magnitude_vector" in name:
        return PunaError(f"{folder} holds {name}: it is a DoRA adapter", _MERGE)
    if "embed" in name or "lm_head" in name:
        return PunaError(f"{folder} also holds {name}: the embedding or the head was trained or resized", _MERGE)
    return PunaError(f"{folder} holds {name}, which is no part of a LoRA adapter of linear layers", _MERGE)


def _linear_shapes(spec: Spec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{module's name on disk: (our name, (N, K))} of every linear layer of a model, head included if it has its own."""
    with torch.device("meta"):
        parameters = dict(Transformer(spec).named_parameters())
    names = [f"{layer}.weight" for layer in linear_layers(parameters)]
    disk = names_on_disk(names, HUGGINGFACE)
    return {
        disk[name].removesuffix(".weight"): (name.removesuffix(".weight"), tuple(parameters[name].shape))
        for name in names
    }


def _check_modules(
    found: set[str], modules: Mapping[str, tuple[str, tuple[int, ...]]], config: _Config, folder: Path
) -> None:
    """The file adapts the layers that the config names, all of them layers of the model, none the head."""
    if head := [module for module in found if module == "lm_head" or "embed" in module]:
        raise PunaError(f"{folder} adapts {head[0]}; only linear layers inside of blocks are adapted here", _MERGE)
    if unknown := sorted(found - modules.keys()):
        raise PunaError(
            f"{folder} adapts {len(unknown)} modules that the model lacks: {', '.join(unknown[:4])}",
            f"it was trained on {config.fields.get('base_model_name_or_path')!r}; load that model",
        )
    if not config.fields.get("target_modules"):
        return
    named = {module for module in modules if config.targets(module)}
    for what, names in (("lacks", named - found), ("holds unnamed", found - named)):
        if names:
            raise PunaError(
                f"{folder / WEIGHTS} {what} {len(names)} modules of the {len(named)} in target_modules: "
                f"{', '.join(sorted(names)[:4])}",
                "the config and the weights must come from the same adapter, and it from a model of this depth",
            )


def _check_pair(module: str, down: Tensor, up: Tensor, rank: int, shape: tuple[int, ...], folder: Path) -> None:
    outputs, inputs = shape
    for half, tensor, expected in (("lora_A", down, (rank, inputs)), ("lora_B", up, (outputs, rank))):
        if tuple(tensor.shape) != expected:
            raise PunaError(
                f"{module}.{half} in {folder} is {list(tensor.shape)}, not {list(expected)} "
                f"(rank {rank}, a layer of {inputs} inputs and {outputs} outputs)",
                "the adapter belongs to another model, or adapter_config.json to another adapter",
            )
        if tensor.dtype not in _DTYPES:
            raise PunaError(
                f"{module}.{half} in {folder} holds {tensor.dtype}", "save the adapter in fp32, bf16 or fp16"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise PunaError(f"{module}.{half} in {folder} holds numbers that are not finite", "the training diverged")


# --- writing ----------------------------------------------------------------------------------------------------------


def save_adapter(adapter: Adapter, path: str | Path, base_model: str = "") -> Path:
    """Write a folder that PEFT opens, whole or not at all. `base_model`: what it belongs to, for PEFT and people."""
    disk = names_on_disk([f"{layer}.weight" for layer in adapter.deltas], HUGGINGFACE)
    deltas = {disk[f"{layer}.weight"].removesuffix(".weight"): delta for layer, delta in adapter.deltas.items()}
    tensors: dict[str, Tensor] = {}
    for module, delta in deltas.items():
        tensors |= {_PREFIX + module + _DOWN: delta.down_RK, _PREFIX + module + _UP: delta.up_NR}
    with atomic_folder(Path(path)) as folder:
        write_json(folder / CONFIG, _config_of(deltas, base_model))
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with TensorFile(folder / WEIGHTS, entries) as out:
            for tensor in tensors.values():
                out.add(tensor.cpu())
    return Path(path)


def _config_of(deltas: Mapping[str, Delta], base_model: str) -> dict[str, Any]:
    """Ranks and alphas of most layers in `r` and `lora_alpha`, the others by their whole names in the patterns."""
    ranks = {module: delta.rank for module, delta in deltas.items()}
    alphas = {module: _plain(delta.scaling * delta.rank) for module, delta in deltas.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
        "target_modules": sorted(deltas),
        "rank_pattern": {module: one for module, one in ranks.items() if one != rank},
        "alpha_pattern": {module: one for module, one in alphas.items() if one != alpha},
    }  # fmt: skip


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
