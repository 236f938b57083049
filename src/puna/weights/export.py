"""A quantized model folder, written part by part as the parts are finished; killed at any instant, it goes on.

OUT.partial/
  journal.jsonl           what is written here, then a line per finished part: its file, sha256, what is in it
  layer-0000.safetensors  one file per part, fsynced before its line
  model/                  the whole folder, made at the end; then renamed to OUT
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from puna.base.console import PunaError, size
from puna.base.hardware import dtype_name
from puna.base.storage import disk_error, read_json, sync_folder, sync_tree, write_json
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.formats.kv import KVScales
from puna.ops.formats.layer import QuantizedWeight
from puna.text.tokenizer import Tokenizer
from puna.weights.folder import write_configs
from puna.weights.holding import disk_names, linear_shapes, why_not
from puna.weights.names import HUGGINGFACE, names_on_disk
from puna.weights.parts import Part, PartJournal
from puna.weights.quantization import COMPRESSED, OWN, LayerFormat, quantization_config
from puna.weights.quantized import format_for, to_stored
from puna.weights.shards import LARGEST
from puna.weights.tensor_file import TensorFile

QUANT_FILE, _KV = "puna_quant.json", "kv-cache"


class QuantizedWriter:
    """Writes the folder `out` of a model with (some) quantized layers in one of `quantization.FORMATS`.

    `add` parts in any order, then `finish`. What an interrupted writer of the same model left beside `out` is
    continued, or with `resume` False removed. config: the QuantConfig as plain values, for puna_quant.json. dtype: of
    what is not quantized. largest: bytes from which the parts' files stay several.
    Raises PunaError if `out` holds something, if another process writes it, or what is there is of another model.
    """

    def __init__(
        self,
        out: Path,
        spec: Spec,
        tokenizer: Tokenizer | None,
        format: str = COMPRESSED,
        config: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        resume: bool = True,
        largest: int = LARGEST,
    ):
        self._out, self._spec, self._tokenizer, self._largest = Path(out), spec, tokenizer, largest
        self._format, self._config, self._dtype = format, None if config is None else dict(config), dtype
        self.folder = self._out.with_name(f"{self._out.name}.partial")
        check_new(self._out)
        self._shapes = linear_shapes(spec)
        header = {"spec": spec.to_config(), "format": format, "config": self._config, "dtype": dtype_name(dtype)}
        self._journal = PartJournal(self.folder, header, resume)
        self._parts = self._journal.parts
        self._staged: tuple[KVScales | None, dict[str, Any]] | None = None

    def __enter__(self) -> QuantizedWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._journal.close()

    def done(self) -> list[str]:
        """Names of the finished parts, in the order they were finished."""
        return list(self._parts)

    def done_layers(self) -> set[int]:
        """Numbers of the model's blocks that are finished."""
        names = [name.split(".") for part in self._parts.values() for name in part.parameters]
        return {int(name[1]) for name in names if name[0] == "layers"}

    def add(self, part: str, tensors: Mapping[str, Tensor | QuantizedWeight]) -> None:
        """Write a part of the model, by our parameter names; when this returns it survives a crash.

        A part of that name that is there is replaced. Raises PunaError for a layer that the format cannot hold, and
        for a disk that is full.
        """
        assert re.fullmatch(r"[\w.-]+", part), f"{part!r} becomes a file name"
        layers: dict[str, LayerFormat | None] = {}
        stored: dict[str, Tensor] = {}
        for name, value in tensors.items():
            layer = name.removesuffix(".weight")
            if layer in self._shapes and name.endswith(".weight"):
                layers[layer] = self._form(layer, value) if isinstance(value, QuantizedWeight) else None
            stored |= self._stored(name, value, layers.get(layer))
        self._write(part, tuple(tensors), stored, layers)

    def stage(self, kv: KVScales | None = None, provenance: Mapping[str, Any] | None = None) -> Path:
        """Make the whole folder, still beside `out`, ready to be loaded; `finish` moves it. Needs all parameters.

        provenance: further keys of puna_quant.json.
        """
        asked = kv, dict(provenance or {})
        if self._staged is not None and self._staged[0] is kv and self._staged[1] == asked[1]:
            return self.folder / "model"
        self._check_complete()
        self._parts.pop(_KV, None)
        if kv is not None:
            self._write(_KV, (), _kv_tensors(kv), {})
        folder = self.folder / "model"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self._write_weights(folder)
        except OSError as error:
            raise disk_error(error, self._out) from error
        write_configs(self._spec, self._dtype, folder, self._tokenizer)
        self._write_quantization(folder, kv, provenance or {})
        self._staged = asked
        return folder

    def finish(
        self, kv: KVScales | None = None, provenance: Mapping[str, Any] | None = None, out: Path | None = None
    ) -> Path:
        """`stage`, then move the folder to `out` (or elsewhere) in one step and remove what is beside it."""
        target = Path(out or self._out)
        check_new(target)
        folder = self.stage(kv, provenance)
        try:
            sync_tree(folder)
            os.rename(folder, target)  # takes the place of an empty folder
            sync_folder(target.parent)
        except OSError as error:
            raise disk_error(error, target) from error
        self.abandon()
        return target

    def abandon(self) -> None:
        """Remove everything that was written beside `out`."""
        self._journal.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _form(self, layer: str, weight: QuantizedWeight) -> LayerFormat:
        form = format_for(weight, self._format)
        reason = why_not(self._format, form, weight.shape)
        if reason is not None or weight.shape != self._shapes[layer]:
            wrong = f"{list(weight.shape)} is not its shape {list(self._shapes[layer])}"
            raise PunaError(f"{self._format} cannot hold {layer}: {reason or wrong}", "choose another format")
        return form

    def _stored(self, name: str, value: Tensor | QuantizedWeight, form: LayerFormat | None) -> dict[str, Tensor]:
        disk = names_on_disk([name], HUGGINGFACE)[name]
        if isinstance(value, Tensor):
            return {disk: value.detach().to("cpu", self._dtype)}
        assert form is not None, f"{name} is no linear layer"
        prefix = disk.removesuffix("weight")
        return {f"{prefix}{end}": tensor.detach().cpu() for end, tensor in to_stored(value, form).items()}

    def _write(
        self, part: str, parameters: tuple[str, ...], stored: dict[str, Tensor], layers: dict[str, LayerFormat | None]
    ) -> None:
        self._staged = None
        path = self.folder / f"{part}.safetensors"
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
        try:
            path.unlink(missing_ok=True)
            with TensorFile(path, entries) as file:
                for tensor in stored.values():
                    file.add(tensor)
            sync_folder(self.folder)
            self._journal.append(Part(part, file.digest.sha256, file.digest.size, parameters, entries, layers))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise disk_error(error, self._out) from error

    def _check_complete(self) -> None:
        there = [name for part in self._parts.values() for name in part.parameters]
        expected = set(_parameters(self._spec))
        missing, twice = sorted(expected - set(there)), sorted({name for name in there if there.count(name) > 1})
        assert not missing, f"{len(missing)} of {len(expected)} parameters were not added: {missing[:5]}"
        assert not twice, f"added twice: {twice[:5]}"

    def _in_order(self) -> list[Part]:
        """By the place of their first parameter in the model; the cache's scales last."""
        place = {name: i for i, name in enumerate(_parameters(self._spec))}
        return sorted(
            self._parts.values(), key=lambda part: place[part.parameters[0]] if part.parameters else len(place)
        )

    def _write_weights(self, folder: Path) -> None:
        """One file, or one per part if they are large: these are there already and only get a second name."""
        stem = "puna" if self._format == OWN else "model"
        parts, total = self._in_order(), sum(part.size for part in self._parts.values())
        if total <= self._largest:
            merged = {name: entry for part in parts for name, entry in part.entries.items()}
            with TensorFile(folder / f"{stem}.safetensors", merged) as file:
                for tensor in _tensors(self.folder, parts):
                    file.add(tensor)
            return
        where: dict[str, str] = {}
        for number, part in enumerate(parts, 1):
            name = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
            _link(self.folder / part.file, folder / name)
            where |= dict.fromkeys(part.entries, name)
        payload = {"metadata": {"total_size": sum(part.tensor_bytes for part in parts)}, "weight_map": where}
        write_json(folder / f"{stem}.safetensors.index.json", payload)

    def _write_quantization(self, folder: Path, kv: KVScales | None, provenance: Mapping[str, Any]) -> None:
        layers = {layer: form for part in self._in_order() for layer, form in part.layers.items()}
        if any(layers.values()) or kv is not None:
            config = read_json(folder / "config.json")
            scheme = None if kv is None else kv.scheme
            written = quantization_config(self._format, disk_names(layers), scheme)
            write_json(folder / "config.json", config | {"quantization_config": written})
        if self._config is not None:
            write_json(folder / QUANT_FILE, {"config": self._config, **provenance})


def check_new(out: Path) -> None:
    """Refuse an `out` that holds something. Errors: `PunaError`."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise PunaError(f"{out} exists and is not empty", "choose another --out, or remove it; nothing is overwritten")


def check_space(out: Path, weights: int, more: int = 0, largest: int = LARGEST) -> int:
    """Bytes that writing `weights` bytes (and `more` beside) needs at once. Errors: `PunaError` if they are not free.

    A model that becomes one file is there twice for a moment: in parts, and whole.
    """
    needed = weights * (2 if weights <= largest else 1) + more
    place = next(place for place in (out, *out.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise PunaError(
            f"writing {out} needs {size(needed)}, {size(free)} are free on its disk",
            "free some space or choose another --out",
        )
    return needed


def _kv_tensors(kv: KVScales) -> dict[str, Tensor]:
    """Per head (G, 1, 1), as compressed-tensors shapes them; per tensor (1,)."""
    found = {}
    for layer, pair in enumerate(zip(kv.keys, kv.values, strict=True)):
        name = f"layers.{layer}.attn.k_proj.weight"
        prefix = names_on_disk([name], HUGGINGFACE)[name].removesuffix("k_proj.weight")
        for end, scale in zip(("k_scale", "v_scale"), pair, strict=True):
            found[f"{prefix}{end}"] = scale.cpu() if kv.heads is None else scale.cpu()[:, None, None]
    return found


def _tensors(folder: Path, parts: list[Part]) -> Iterator[Tensor]:
    for part in parts:
        with safe_open(folder / part.file, framework="pt", device="cpu") as file:
            for name in part.entries:
                yield file.get_tensor(name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _parameters(spec: Spec) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in Transformer(spec).named_parameters()]
