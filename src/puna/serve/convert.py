"""`puna convert`: a model from one format into another, without rounding anew, and proof that nothing was lost.

Packed codes are moved as they are where the target can hold them exactly; where it takes plain weights they are
dequantized. What was written is read back and compared, tensor by tensor, before it gets its name.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.base.console import PunaError, count, progress, size, table
from puna.base.hardware import dtype_name, parse_dtype
from puna.base.storage import disk_error, sync_folder, sync_tree
from puna.ops.formats.layer import QuantizedWeight
from puna.serve.compare import compare_weights, compare_words, plain
from puna.serve.stored import weight_bytes
from puna.text.tokenizer import Tokenizer
from puna.weights.export import QuantizedWriter, check_new, check_space
from puna.weights.fetch import local_folder
from puna.weights.gguf.model import save_gguf
from puna.weights.holding import check_format, linear_shapes, stored_bytes
from puna.weights.importance import read_importance
from puna.weights.meta import params_of, save_meta
from puna.weights.model_files import find_tokenizer, is_gguf
from puna.weights.quantization import AWQ, COMPRESSED, FORMATS, GPTQ, GPTQ_V2, LayerFormat
from puna.weights.quantized import format_for
from puna.weights.reader import WeightReader

TARGETS = ("hf", COMPRESSED, GPTQ, GPTQ_V2, AWQ, "gguf", "meta")


@dataclass(frozen=True)
class Conversion:
    """What `puna convert` was asked for. dtype: 'auto' is the source's, float32 for one that is packed."""

    source: str
    to: str
    out: str
    type: str = "Q4_K_M"
    imatrix: str = ""
    dtype: str = "auto"
    with_tokenizer: bool = True


@dataclass(frozen=True)
class _Source:
    """The opened source. dtype: of plain tensors that are written."""

    place: Path
    reader: WeightReader
    tokenizer: Tokenizer | None
    dtype: torch.dtype

    def plain(self, name: str) -> Tensor:
        """A parameter as a plain tensor; packed ones in fp32."""
        return plain(self.reader.weight(name))

    def compare(self, written: Path, dtype: torch.dtype | None) -> dict[str, Any]:
        """The proof, for the report. Raises PunaError if it fails."""
        found = compare_weights(self.reader, written, dtype)
        return found | {"tokenizer": compare_words(self.tokenizer, written)}


def run_convert(asked: Conversion) -> dict[str, Any]:
    """Convert, verify, and only then give the result its name; the figures. Raises PunaError for what cannot be."""
    started = time.perf_counter()
    out = Path(asked.out)
    check_new(out)
    source = _open(asked)
    if asked.to in FORMATS:
        found = _to_packed(asked, source, out)
    elif asked.to == "hf":
        found = _to_plain(source, out)
    elif asked.to == "meta":
        found = _to_meta(source, out)
    elif asked.to == "gguf":
        found = _to_gguf(asked, source, out)
    else:
        raise PunaError(f"puna converts to no {asked.to!r}", f"formats: {', '.join(TARGETS)}")
    paths = [str(file) for file in sorted(out.iterdir())] if out.is_dir() else [str(out)]
    return {
        "source": asked.source, "from": _kind(source), "to": asked.to, "out": str(out), "paths": paths,
        "parameters": source.reader.spec.num_params(), "bytes_before": weight_bytes(source.place),
        "bytes_after": weight_bytes(out), **found, "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip


def print_conversion(found: dict[str, Any]) -> None:
    """The figures on stdout."""
    exact = "every number as it was" if found["max_difference"] == 0 else (
        f"largest difference {found['max_difference']:.3g} ({found['worst']}), "
        f"{found['relative_error']:.2%} of the numbers' size"
    )  # fmt: skip
    rows = [
        ("from", f"{found['source']} ({found['from']}, {size(found['bytes_before'])})"),
        ("to", f"{found['out']} ({found['to']}, {size(found['bytes_after'])})"),
        ("parameters", count(found["parameters"])),
        ("read back", f"{found['tensors']} tensors: {exact}"),
        ("tokenizer", found["tokenizer"]),
        *(("note", note) for note in found["notes"]),
    ]
    print(table([(name.ljust(12), value) for name, value in rows], title="converted"))


def _open(asked: Conversion) -> _Source:
    place = local_folder(asked.source, state=False)
    if not place.exists():
        raise PunaError(f"no model at {asked.source}", "give a model folder, Meta's folder or a .gguf file")
    reader = WeightReader(place)
    tokenizer = find_tokenizer(place) if asked.with_tokenizer else None
    return _Source(place, reader, tokenizer, _dtype(asked, reader, packed=reader.method is not None))


def _dtype(asked: Conversion, reader: WeightReader, packed: bool) -> torch.dtype:
    """Of plain numbers: asked for, or the stored ones' own. (A config may say another: params.json has no word.)"""
    if asked.dtype != "auto":
        return parse_dtype(asked.dtype)
    embed = reader.weight("embed")
    return embed.dtype if isinstance(embed, Tensor) and not packed else torch.float32


# --- the targets ----------------------------------------------------------------------------------------------------


def _to_packed(asked: Conversion, source: _Source, out: Path) -> dict[str, Any]:
    """Codes moved as they are."""
    reader = source.reader
    if reader.method is None:
        kind = "a GGUF file: its blocks are no groups of these formats" if is_gguf(source.place) else "not quantized"
        raise PunaError(
            f"{source.place} is {kind}; converting never rounds anew",
            f"puna quantize {source.place} --preset int4_wo --format {asked.to} --out {out}",
        )
    kv, forms = reader.kv_scales(), _forms(reader, asked.to)
    notes = check_format(asked.to, forms, reader.spec, None if kv is None else kv.scheme)
    dtype = _dtype(asked, reader, packed=False)  # what is plain stays as it is
    check_space(out, stored_bytes(forms, reader.spec, dtype.itemsize))
    with QuantizedWriter(out, reader.spec, source.tokenizer, asked.to, dtype=dtype, resume=False) as writer:
        for part, names in _parts(reader).items():
            tensors = {name: reader.weight(name) for name in names}
            if asked.to != COMPRESSED:
                for name, weight in tensors.items():
                    _check_scales(asked.to, name, weight)
            writer.add(part, tensors)
        found = source.compare(writer.stage(kv), dtype)
        writer.finish(kv)
    return found | {"notes": notes}


def _to_plain(source: _Source, out: Path) -> dict[str, Any]:
    reader = source.reader
    check_space(out, reader.spec.num_params() * source.dtype.itemsize)
    with QuantizedWriter(out, reader.spec, source.tokenizer, dtype=source.dtype, resume=False) as writer:
        for part, names in _parts(reader).items():
            writer.add(part, {name: source.plain(name) for name in names})
        found = source.compare(writer.stage(), source.dtype)
        writer.finish()
    return found | {"notes": _forgotten(reader)}


def _to_meta(source: _Source, out: Path) -> dict[str, Any]:
    spec = source.reader.spec
    params_of(spec)  # refused before the work, if at all
    check_space(out, spec.num_params() * source.dtype.itemsize)
    with _beside(out) as stage:
        folder, work = stage / out.name, stage / "tensors"
        folder.mkdir()
        work.mkdir()
        names = source.reader.names()
        save_meta(folder, spec, names, source.plain, source.tokenizer, source.dtype, work)
        if (source.place / "tokenizer.model").is_file() and source.tokenizer is not None:
            shutil.copyfile(source.place / "tokenizer.model", folder / "tokenizer.model")
        found = source.compare(folder, source.dtype)
    notes = [f"params.json does not say the context ({spec.max_len:,} tokens) nor which ids end an answer"]
    return found | {"notes": _forgotten(source.reader) + notes}


def _to_gguf(asked: Conversion, source: _Source, out: Path) -> dict[str, Any]:
    spec = source.reader.spec
    if not str(out).endswith(".gguf"):
        raise PunaError(f"{out} does not end in .gguf", f"--out {out}.gguf")
    importance = read_importance(asked.imatrix, spec) if asked.imatrix else None
    check_space(out, spec.num_params() * 4, largest=0)
    with _beside(out) as stage, _told(source, source.plain) as read:
        save_gguf(stage / out.name, spec, read, source.tokenizer, asked.type, importance)
        found = source.compare(stage / out.name, None)
    return found | {"notes": _forgotten(source.reader), "type": asked.type}


def _forms(reader: WeightReader, format: str) -> dict[str, LayerFormat | None]:
    """How the source's layers would be stored in `format`."""
    found: dict[str, LayerFormat | None] = {}
    for layer in linear_shapes(reader.spec):
        weight = reader.weight(f"{layer}.weight")
        found[layer] = format_for(weight, format) if isinstance(weight, QuantizedWeight) else None
    return found


def _check_scales(format: str, name: str, weight: Tensor | QuantizedWeight) -> None:
    """GPTQ and AWQ keep scales in fp16."""
    if isinstance(weight, Tensor):
        return
    scales = weight.packed.scales
    changed = int((scales.half().to(scales.dtype) != scales).sum())
    if changed:
        raise PunaError(
            f"{format} keeps scales in float16: {changed} of {scales.numel()} of {name} "
            f"({dtype_name(scales.dtype)}) would change",
            f"use --to {COMPRESSED}, which keeps them, or `puna quantize` the original with --format {format}",
        )


def _forgotten(reader: WeightReader) -> list[str]:
    """What plain weights cannot say."""
    notes = []
    layers = [reader.weight(f"{layer}.weight") for layer in _first_layers(reader)]
    if any(isinstance(weight, QuantizedWeight) and weight.activations is not None for weight in layers):
        notes.append("inputs of layers were rounded to eight bits when this model ran; here they are not")
    if reader.kv_scales() is not None:
        notes.append("scales of the KV cache are left out: this format has no place for them")
    return notes


def _first_layers(reader: WeightReader) -> list[str]:
    return [layer for layer in linear_shapes(reader.spec) if layer.startswith("layers.0.")]


def _parts(reader: WeightReader) -> dict[str, list[str]]:
    """Parameters by the file they are written in first: block by block."""
    parts: dict[str, list[str]] = {}
    for name in reader.names():
        part = f"layer-{int(name.split('.')[1]):04d}" if name.startswith("layers.") else name.split(".")[0]
        parts.setdefault(part, []).append(name)
    return parts


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`; what has its name in there becomes `out` at the end. On an error it is removed."""
    stage = out.with_name(f".{out.name}.converting")
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        yield stage
        sync_tree(stage)
        os.rename(stage / out.name, out)
        sync_folder(out.parent)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _told(source: _Source, read: Callable[[str], Tensor]) -> Iterator[Callable[[str], Tensor]]:
    """`read`, with progress."""
    with progress(source.reader.spec.num_params() * 4, "converting") as advance:

        def telling(name: str) -> Tensor:
            tensor = read(name)
            advance(tensor.numel() * 4, name)
            return tensor

        yield telling


def _kind(source: _Source) -> str:
    if is_gguf(source.place):
        return "gguf"
    if source.reader.method is not None:
        return source.reader.method
    return "meta" if (source.place / "params.json").exists() else "hf"
