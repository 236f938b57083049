"""Tensors on disk behind one small interface: names and shapes first, then data, one tensor at a time.

Files are mapped and closed again every `_WINDOW` bytes, so a load holds the model and little more: pages of a mapped
file count as this process's memory for as long as the mapping lives.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puna.base.console import PunaError, size
from puna.base.storage import read_json
from puna.weights.names import HUGGINGFACE, META

_WINDOW = 64 * 2**20


class Source(Protocol):
    """A checkpoint: `table` names its origin's spelling, `shapes` what it holds.

    `read` streams (name, tensor); `read_box` gives a part of one tensor.
    """

    table: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def read(self) -> Iterator[tuple[str, Tensor]]: ...

    def read_box(self, name: str, box: tuple[slice, ...]) -> Tensor: ...


def open_source(folder: Path) -> Source:
    """Find the weights in a folder: safetensors, then pytorch_model*.bin, then Meta's consolidated.*.pth.

    `puna*.safetensors` hold what only puna reads (see `quantization`).
    """
    if not folder.is_dir():
        raise PunaError(f"{folder} is not a folder", "give a folder with config.json and *.safetensors")
    if files := _files(folder, "model", ".safetensors") or _files(folder, "puna", ".safetensors"):
        return FileSource(files, _read_safetensors, _safetensors_shapes)
    if files := _files(folder, "pytorch_model", ".bin"):
        return FileSource(files, _read_pickle, _pickle_shapes)
    if files := sorted(folder.glob("consolidated.*.pth")):
        return MetaSource(files)
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise PunaError(f"no weights in {folder} (it holds {names})", "expected *.safetensors, *.bin or consolidated.*.pth")


def _files(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The files an index names (each must exist), or the single file, or all that look like shards."""
    index = folder / f"{stem}{suffix}.index.json"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise PunaError(
                f"{index.name} names {len(names)} files, {len(absent)} are missing: {', '.join(absent[:5])}",
                "fetch the missing shards",
            )
        return [folder / name for name in names]
    single = folder / f"{stem}{suffix}"
    return [single] if single.exists() else sorted(folder.glob(f"{stem}-*{suffix}"))


Reader = Callable[[Path, list[str]], Iterator[tuple[str, Tensor]]]


class FileSource:
    """Files that each hold whole tensors under Hugging Face's names."""

    table = HUGGINGFACE

    def __init__(self, files: list[Path], reader: Reader, shapes_of: Callable[[Path], dict[str, _Entry]]):
        self._reader = reader
        self._entries = {file: shapes_of(file) for file in files}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file, entries in self._entries.items():
            for name, entry in entries.items():
                if name in self.shapes:
                    raise PunaError(f"tensor {name} is stored twice, again in {file.name}", "remove the stale file")
                self.shapes[name] = entry.shape

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for file, entries in self._entries.items():
            for names in _windows(entries):
                yield from self._reader(file, names)

    def read_box(self, name: str, box: tuple[slice, ...]) -> Tensor:
        file = next(file for file, entries in self._entries.items() if name in entries)
        if self._reader is not _read_safetensors:
            return next(self._reader(file, [name]))[1][box]
        with _open_safetensors(file) as handle:
            return handle.get_slice(name)[box] if box else handle.get_tensor(name)  # a number has no slice


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    bytes: int


def _windows(entries: dict[str, _Entry]) -> Iterator[list[str]]:
    """Names in file order, cut so that each group maps about `_WINDOW` bytes."""
    group: list[str] = []
    held = 0
    for name, entry in entries.items():
        group.append(name)
        held += entry.bytes
        if held >= _WINDOW:
            yield group
            group, held = [], 0
    if group:
        yield group


_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


def _safetensors_shapes(file: Path) -> dict[str, _Entry]:
    with _open_safetensors(file) as handle:
        found = {}
        for name in handle.offset_keys() if hasattr(handle, "offset_keys") else handle.keys():
            piece = handle.get_slice(name)
            shape = tuple(piece.get_shape())
            found[name] = _Entry(shape, torch.Size(shape).numel() * _ITEM_BYTES.get(piece.get_dtype(), 1))
        return found


def _read_safetensors(file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    with _open_safetensors(file) as handle:
        for name in names:
            yield name, handle.get_tensor(name)


def _open_safetensors(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise PunaError(
            f"{file} is not a whole safetensors file ({size(file.stat().st_size)}): {error}",
            "the file is truncated or damaged; copy it again from its source",
        ) from error


def _pickle_shapes(file: Path) -> dict[str, _Entry]:
    return {name: _Entry(tuple(t.shape), t.nbytes) for name, t in _load_pickle(file).items()}


def _read_pickle(file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    tensors = _load_pickle(file)
    for name in names:
        yield name, tensors[name]


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """A state dict from a .bin or .pth: tensors only, never a pickle that could run code."""
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        raise PunaError(
            f"{file} holds more than tensors and was not opened: {str(error).splitlines()[0]}",
            "a pickle can run code; ask its author for safetensors",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise PunaError(
            f"{file} is not a whole torch checkpoint ({size(file.stat().st_size)}): {str(error).splitlines()[0]}",
            "the file is truncated or damaged; copy it again from its source",
        ) from error
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


class MetaSource:
    """consolidated.00.pth ...: each file holds a slice of every tensor, cut for model parallelism."""

    table = META

    def __init__(self, files: list[Path]):
        self._files = files
        pieces = [_pickle_shapes(file) for file in files]
        if any(piece.keys() != pieces[0].keys() for piece in pieces):
            raise PunaError(f"the {len(files)} consolidated.*.pth files name different tensors", "fetch them again")
        self._bytes = {name: _Entry((), sum(piece[name].bytes for piece in pieces)) for name in pieces[0]}
        self._cut = {name: _cut_dim(name, pieces[0][name].shape) for name in pieces[0]}
        self.shapes = {name: self._whole(entry.shape, self._cut[name]) for name, entry in pieces[0].items()}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for names in _windows(self._bytes):
            states = [_load_pickle(file) for file in self._files]
            for name in names:
                dim, parts = self._cut[name], [state[name] for state in states]
                yield name, parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)

    def read_box(self, name: str, box: tuple[slice, ...]) -> Tensor:
        parts = [_load_pickle(file)[name] for file in self._files]
        dim = self._cut[name]
        return (parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim))[box]

    def _whole(self, shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
        return tuple(n * len(self._files) if i == dim else n for i, n in enumerate(shape))

    def use_embedding_cut(self, vocab: int) -> None:
        """Llama 2 cuts the embedding by width, Llama 3 by vocabulary: the vocabulary size tells which."""
        name = META["embed"]
        shape = self.shapes[name]
        if self._cut[name] == 1 and shape[0] != vocab and shape[0] * len(self._files) == vocab:
            self._cut[name] = 0
            self.shapes[name] = (vocab, shape[1] // len(self._files))


def _cut_dim(name: str, shape: tuple[int, ...]) -> int | None:
    """Column-parallel weights are cut by rows (0), row-parallel ones by columns (1), norms not at all (None)."""
    if len(shape) == 1:
        return None
    return 1 if any(part in name for part in ("wo.", "w2.", "tok_embeddings.")) else 0
