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
from puna.base.storage import atomic_folder, read_json, write_json
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.text.tokenizer import Tokenizer
from puna.weights.fetch import local_folder
from puna.weights.names import DERIVED, HUGGINGFACE, META, halves_from_pairs, names_on_disk
from puna.weights.shards import WeightFile, index_of, plan_files
from puna.weights.source import MetaSource, Source, open_source
from puna.weights.tensor_file import write_files


def load_model(
    path: str | Path, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu", seed: int = 0
) -> Transformer:
    """The Transformer of a folder, of a save's URL, or of `preset:NAME` with random weights (seeded), in eval mode.

    Holds at most about 1.2x the model in memory while loading. Raises PunaError for anything incomplete.
    """
    dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    device = pick_device(device) if isinstance(device, str) else device
    if str(path).startswith("preset:"):
        model = empty_model(Spec.load(path), dtype, device)
        model.init_weights(torch.Generator(device).manual_seed(seed))
        return model.eval()
    folder = local_folder(path, state=False)
    if not folder.is_dir():
        raise PunaError(
            f"no model folder at {path}", "give a folder with config.json and *.safetensors, or preset:NAME"
        )
    source = open_source(folder)
    spec = load_spec(folder, source)
    with torch.device("meta"):
        model = Transformer(spec)
    _fill(model, source, dtype, device, folder)
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


def load_spec(folder: Path, source: Source) -> Spec:
    """The model's shape, from config.json or Meta's params.json; what params.json leaves out the weights tell."""
    if not isinstance(source, MetaSource):
        return Spec.load(folder)
    params = read_json(folder / "params.json")
    if params.get("vocab_size", -1) <= 0:  # Llama 1 and 2 leave it to the tokenizer; the head's rows say it too
        params["vocab_size"] = source.shapes[META["lm_head.{end}"].replace("{end}", "weight")][0]
    source.use_embedding_cut(params["vocab_size"])
    if META["lm_head.{end}"].replace("{end}", "weight") not in source.shapes:
        params["tied"] = True
    return Spec.from_params(params)


def _fill(model: Transformer, source: Source, dtype: torch.dtype, device: torch.device, folder: Path) -> None:
    """Give every parameter its tensor; memory grows by one tensor at a time."""
    parameters = dict(model.named_parameters())
    ours = {disk: name for name, disk in names_on_disk(parameters, source.table).items()}
    check_names(source, {disk: tuple(parameters[name].shape) for disk, name in ours.items()}, model.spec, folder)
    tied_head = None
    for disk, tensor in source.read():
        if disk not in ours:
            tied_head = tensor.to(dtype) if disk == head_name(source) else tied_head
            continue
        if not tensor.is_floating_point():
            raise PunaError(
                f"{disk} in {folder} holds {tensor.dtype}, not floating point", "dequantize the model first"
            )
        if source.table is META and ours[disk].endswith(("q_proj.weight", "k_proj.weight")):
            tensor = halves_from_pairs(tensor, model.spec.head_dim)
        _assign(model, ours[disk], tensor.to(device=device, dtype=dtype, copy=True))
    if tied_head is not None and not torch.equal(tied_head.to(device), model.embed):
        raise PunaError(
            f"{folder} says tie_word_embeddings, but its lm_head.weight differs from the embedding",
            "the file was saved stale; set tie_word_embeddings to false in config.json if the head is the right one",
        )


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor.contiguous()))


def head_name(source: Source) -> str:
    """What the output head is called in this origin's files."""
    return names_on_disk(["lm_head.weight"], source.table)["lm_head.weight"]


def check_names(source: Source, expected: dict[str, tuple[int, ...]], spec: Spec, folder: Path) -> None:
    """Refuse anything missing, left over or of another shape, and say which."""
    surplus = [n for n in source.shapes if n not in expected and not n.endswith(DERIVED)]
    if spec.tie_word_embeddings:
        surplus = [n for n in surplus if n != head_name(source)]
    missing = [n for n in expected if n not in source.shapes]
    wrong = [n for n, shape in expected.items() if source.shapes.get(n, shape) != shape]
    lines = [f"missing {n} {list(expected[n])}" for n in missing]
    lines += [f"surplus {n} {list(source.shapes[n])}" for n in surplus]
    lines += [f"mis-shaped {n}: file {list(source.shapes[n])}, config {list(expected[n])}" for n in wrong]
    if lines:
        shown = "\n  ".join(lines[:12] + ([f"... and {len(lines) - 12} more"] if len(lines) > 12 else []))
        raise PunaError(
            f"the weights in {folder} do not fit its config: {len(missing)} missing, {len(surplus)} surplus, "
            f"{len(wrong)} mis-shaped of {len(expected)} tensors\n  {shown}",
            "config.json and the weight files must come from the same model; fetch both again",
        )


def _generation_config(spec: Spec) -> dict[str, object]:
    eos = list(spec.eos_token_ids)
    ids = {"bos_token_id": spec.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    ids["pad_token_id"] = spec.pad_token_id
    return {name: value for name, value in ids.items() if value is not None}
