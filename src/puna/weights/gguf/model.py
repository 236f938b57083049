"""GGUF models in and out: llama.cpp's files as a source of tensors, and any of our models as such a file.

q and k are stored for rotary on neighbours (0,1)(2,3).. in the `llama` architecture, and for halves (i, i + K/2), which
is ours and Hugging Face's order, in `qwen2` and `qwen3`. Readers and writers here reorder their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.formats.gguf import dequantize_gguf, quantize_gguf
from puna.text.tokenizer import Tokenizer
from puna.weights.gguf.file import GgufFile, write_gguf
from puna.weights.gguf.mix import MIXES, mix_named, types_of
from puna.weights.gguf.spec import read_spec, rope_divisors, write_spec
from puna.weights.gguf.tokenizer import tokenizer_metadata
from puna.weights.names import GGUF, halves_from_pairs, names_on_disk, pairs_from_halves

DIVISORS = "rope_freqs.weight"


class GgufSource:
    """A GGUF file as a checkpoint (weights.source.Source): fp32 tensors in Hugging Face's order of rows.

    `metadata` is the file's, `spec` its shape. Memory: one tensor. Errors: PunaError for files that puna cannot read.
    """

    table = GGUF

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.file = GgufFile(path)
        self.metadata: dict[str, Any] = self.file.metadata
        if self.metadata.get("split.count", 1) > 1:
            parts = self.metadata["split.count"]
            raise PunaError(f"{path} is one of {parts} parts", "join them: llama-gguf-split --merge FIRST-PART OUT")
        entries = dict(self.file.tensors)
        divisors = self._dequantize(DIVISORS) if entries.pop(DIVISORS, None) else None
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self.spec: Spec = read_spec(self.metadata, self.shapes, divisors)
        self._is_paired = self.metadata["general.architecture"] == "llama"

    def type_of(self, name: str) -> str:
        """The number format of a tensor, such as 'Q4_K'."""
        return self.file.tensors[name].type

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor as they are stored: (..., bytes per row) uint8, rows in the file's own order."""
        return self.file.raw(name)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 tensor) one after another, in the order of the file."""
        for name in self.shapes:
            yield name, self._tensor(name)

    def read_box(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """A part of one tensor; of an ordinary matrix only its rows are dequantized."""
        if len(self.shapes[name]) < 2 or self._is_reordered(name) or not box:
            return self._tensor(name)[box]
        rows = dequantize_gguf(self.raw(name)[box[0]], self.type_of(name))
        return rows[(slice(None), *box[1:])]

    def in_our_order(self, name: str, rows: Tensor) -> Tensor:
        """A tensor's rows (numbers or bytes) as Hugging Face orders them; itself if they are so already."""
        return halves_from_pairs(rows, self.spec.head_dim) if self._is_reordered(name) else rows

    def _tensor(self, name: str) -> Tensor:
        return self.in_our_order(name, self._dequantize(name))

    def _dequantize(self, name: str) -> Tensor:
        return dequantize_gguf(self.raw(name), self.type_of(name))

    def _is_reordered(self, name: str) -> bool:
        return self._is_paired and _is_turned(name)


def _is_turned(name: str) -> bool:
    """The tensors whose rows are channels that rotary turns."""
    return name.startswith("blk.") and name.split(".")[2] in ("attn_q", "attn_k")


def spec_of(source: GgufSource) -> Spec:
    """The shape of a file's model. (Metadata alone do not say it: biases and a tied head show in the tensors.)"""
    return source.spec


def save_gguf(
    path: str | Path,
    spec: Spec,
    read: Callable[[str], Tensor],
    tokenizer: Tokenizer | None = None,
    type: str = "Q4_K_M",
    importance: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model as one GGUF file, whole or not at all; memory beyond `read`'s own is one tensor.

    read: our parameter name ('layers.0.attn.q_proj.weight') -> its plain tensor of any float dtype. type: a mix of
    gguf.mix. importance: linear layer ('layers.0.attn.q_proj') -> (D,) >= 0, how much errors in each input
    count. Without a tokenizer the file takes token ids only. Errors: PunaError for a shape that llama.cpp does not
    know, a tokenizer it would not follow, a tensor that does not fit the spec or is not finite, a full disk.
    """
    mix = mix_named(type)
    shapes = _parameter_shapes(spec)
    names = {disk: ours for ours, disk in names_on_disk(shapes, GGUF).items()}
    types = types_of(spec, mix, {disk: shapes[ours] for disk, ours in names.items()}, bool(importance))
    is_paired = write_spec(spec)["general.architecture"] == "llama"
    entries = {disk: (types[disk], shapes[ours]) for disk, ours in names.items()}
    divisors = rope_divisors(spec)
    if divisors is not None:
        entries[DIVISORS] = ("F32", tuple(divisors.shape))

    def data(name: str) -> Tensor:
        if name == DIVISORS and divisors is not None:
            return quantize_gguf(divisors, "F32")
        tensor = _checked(read(names[name]), names[name], shapes[names[name]])
        if is_paired and _is_turned(name):
            tensor = pairs_from_halves(tensor, spec.head_dim)
        layer = names[name].removesuffix(".weight")
        counts = None if importance is None else importance.get(layer, importance.get(names[name]))
        return quantize_gguf(tensor, types[name], None if counts is None else counts.to(tensor.device))

    write_gguf(path, _metadata(path, spec, mix, tokenizer), entries, data)
    return Path(path)


def _parameter_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Transformer(spec).named_parameters()}


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise PunaError(f"{name} has shape {list(tensor.shape)}, the model needs {list(shape)}", "check the model")
    if not all(bound.isfinite() for bound in tensor.aminmax()):  # one pass, no mask; a nan comes through
        bad = int((~tensor.isfinite()).sum())
        raise PunaError(f"{bad} of {tensor.numel()} numbers of {name} are not finite", "repair the model first")
    return tensor


def _metadata(path: str | Path, spec: Spec, mix: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    keys = write_spec(spec)
    general = {"general.name": Path(path).stem, "general.type": "model", "general.file_type": MIXES[mix][0]}
    words = {"tokenizer.ggml.model": "no_vocab"} if tokenizer is None else {}
    if tokenizer is not None:
        words = tokenizer_metadata(tokenizer, spec.vocab_size)
    ids = {"bos": spec.bos_token_id, "eos": next(iter(spec.eos_token_ids), None), "padding": spec.pad_token_id}
    named = {f"tokenizer.ggml.{part}_token_id": token for part, token in ids.items() if token is not None}
    stops = {"puna.eos_token_ids": list(spec.eos_token_ids)} if spec.eos_token_ids else {}
    return keys | general | {"general.quantization_version": 2} | stops | named | words
