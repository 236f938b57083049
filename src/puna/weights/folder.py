"""A model is a Hugging Face folder: load one into the Transformer, save one that every other tool opens.

Loading streams one tensor at a time; a missing, surplus or mis-shaped tensor is an error that lists names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from puna.base.console import PunaError
from puna.base.hardware import dtype_name, parse_dtype, pick_device
from puna.base.storage import atomic_folder, write_json
from puna.model.linear import QuantizedLinear
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.text.tokenizer import Tokenizer
from puna.weights.fetch import local_folder
from puna.weights.gguf.model import GgufSource
from puna.weights.gguf.packed import GgufLayers
from puna.weights.model_files import ModelFiles, is_gguf, not_plain, open_model, stale_head_error
from puna.weights.names import HUGGINGFACE, META, halves_from_pairs, names_on_disk
from puna.weights.quantized import QuantizedLayers
from puna.weights.shards import WeightFile, index_of, plan_files
from puna.weights.tensor_file import write_files


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    seed: int = 0,
    dequantize: bool = False,
) -> Transformer:
    """The Transformer of a folder, a GGUF file, a save's URL, or of `preset:NAME` with random weights; in eval mode.

    Quantized layers stay packed (`QuantizedLinear`), unless `dequantize`: then they become plain, and how their inputs
    were rounded is forgotten. Those of a GGUF file stay the file's blocks, mapped where their rows are in order; its
    embedding becomes numbers, and logits of a tied one go through its blocks. `kv_scales` is what the folder says of
    the KV cache, or None. Holds at most about 1.2x the model in memory while loading. Raises PunaError for anything
    incomplete.
    """
    dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    device = pick_device(device) if isinstance(device, str) else device
    if str(path).startswith("preset:"):
        model = empty_model(Spec.load(path), dtype, device)
        model.init_weights(torch.Generator(device).manual_seed(seed))
        model.kv_scales = None  # type: ignore[assignment]
        return model.eval()
    folder = local_folder(path, state=False)
    if not folder.is_dir() and not (is_gguf(folder) and folder.exists()):
        raise PunaError(
            f"no model folder at {path}",
            "give a folder with config.json and *.safetensors, a .gguf file or preset:NAME",
        )
    files = open_model(folder)
    with torch.device("meta"):
        model = Transformer(files.spec)
    layers = _packed_layers(files, dequantize)
    if layers is None:
        _fill(model, files, dtype, device)
    else:
        _fill_quantized(model, files, layers, dtype, device, dequantize)
    scales = None if files.layers is None else files.layers.kv_scales()
    model.kv_scales = None if scales is None else scales.to(device)  # type: ignore[assignment]
    return model.eval()


def save_model(
    model: Transformer, path: str | Path, tokenizer: Tokenizer | None = None, max_shard_bytes: int = 5 * 10**9
) -> Path:
    """Write a whole Hugging Face folder at `path`, or nothing: weights, index, configs, tokenizer, chat template."""
    with atomic_folder(Path(path)) as folder:
        write_folder(model, folder, tokenizer, max_shard_bytes)
    return Path(path)


def write_folder(
    model: Transformer, folder: Path, tokenizer: Tokenizer | None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """The files of `save_model`, into a folder whose atomicity is the caller's."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sizes = {name: parameter.nbytes for name, parameter in parameters.items()}
    files = plan_files(sizes, largest=max_shard_bytes)
    write_configs(model.spec, next(iter(parameters.values())).dtype, folder, tokenizer)
    write_index(files, sizes, folder)
    entries = {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in parameters.items()}
    write_files(files, (parameter.cpu() for parameter in parameters.values()), entries, folder)


def write_configs(spec: Spec, dtype: torch.dtype, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Everything of a model folder but its weights: config.json, generation_config.json, the tokenizer."""
    spec = spec.replace(dtype=dtype_name(dtype))
    write_json(folder / "config.json", spec.to_config())
    write_json(folder / "generation_config.json", _generation_config(spec))
    if tokenizer is not None:
        tokenizer.save(folder)


def write_index(files: list[WeightFile], sizes: Mapping[str, int], folder: Path) -> None:
    """The index of several weight files; a single one has none."""
    if len(files) > 1:
        write_json(folder / "model.safetensors.index.json", index_of(files, names_on_disk(sizes, HUGGINGFACE), sizes))


def empty_model(spec: Spec, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A Transformer whose weights are allocated but not yet filled."""
    with torch.device("meta"):
        model = Transformer(spec).to(dtype)
    return model.to_empty(device=device)


def hf_state(model: Transformer) -> dict[str, Tensor]:
    """{Hugging Face name: tensor}, the model's own memory; a tied head is stored once, as transformers does."""
    parameters = dict(model.named_parameters())
    names = names_on_disk(parameters, HUGGINGFACE)
    return {names[ours]: parameter.detach() for ours, parameter in parameters.items()}


def _fill(model: Transformer, files: ModelFiles, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter its tensor; memory grows by one tensor at a time."""
    source = files.source
    ours = {disk: name for name, disk in names_on_disk(files.shapes, source.table).items()}
    tied_head = None
    for disk, tensor in source.read():
        if disk not in ours:
            tied_head = tensor.to(dtype) if disk == files.stale_head else tied_head
            continue
        if not tensor.is_floating_point():
            raise not_plain(disk, tensor, files.path)
        if source.table is META and ours[disk].endswith(("q_proj.weight", "k_proj.weight")):
            tensor = halves_from_pairs(tensor, model.spec.head_dim)
        _assign(model, ours[disk], _own(tensor, files, dtype, device))
    if tied_head is not None and not torch.equal(tied_head.to(device), model.embed):
        raise stale_head_error(files.path)


def _packed_layers(files: ModelFiles, dequantize: bool) -> QuantizedLayers | GgufLayers | None:
    """The layers that are read as something else than one plain tensor."""
    if isinstance(files.source, GgufSource) and not dequantize:
        return GgufLayers(files.source, files.shapes)
    return files.layers


def _fill_quantized(
    model: Transformer,
    files: ModelFiles,
    layers: QuantizedLayers | GgufLayers,
    dtype: torch.dtype,
    device: torch.device,
    dequantize: bool,
) -> None:
    """As `_fill`, layer by layer: a quantized layer takes the plain one's place, with its bias."""
    packed = {} if dequantize else layers.formats
    for name in files.shapes:
        layer, _, end = name.rpartition(".")
        if layer in packed:
            continue
        weight = layers.weight(layer).dequantize() if end == "weight" and layer in layers.formats else files.read(name)
        _assign(model, name, _own(weight, files, dtype, device))
    for layer in packed:
        bias = files.read(f"{layer}.bias").to(device, dtype, copy=True) if f"{layer}.bias" in files.shapes else None
        parent, _, leaf = layer.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantizedLinear(layers.weight(layer), bias, dtype).to(device))


def _own(tensor: Tensor, files: ModelFiles, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor in memory of its own; numbers out of a GGUF file have it already."""
    return tensor.to(device=device, dtype=dtype, copy=not isinstance(files.source, GgufSource))


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor.contiguous()))


def _generation_config(spec: Spec) -> dict[str, object]:
    eos = list(spec.eos_token_ids)
    ids = {"bos_token_id": spec.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    ids["pad_token_id"] = spec.pad_token_id
    return {name: value for name, value in ids.items() if value is not None}
