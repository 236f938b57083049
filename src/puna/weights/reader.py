"""Weights of a model folder, box by box: what one rank of a mesh needs, read without the rest."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.model.transformer import Transformer
from puna.weights.fetch import local_folder
from puna.weights.folder import check_names, head_name, load_spec
from puna.weights.names import META, halves_from_pairs, names_on_disk
from puna.weights.source import open_source


class WeightReader:
    """A folder (or a save's URL) with its names and shapes checked; `read` gives any box of any parameter.

    From safetensors only the bytes asked for are read; other formats are read whole, one tensor at a time. `spec` is
    the model's. Raises PunaError for anything incomplete, as `load_model` does.
    """

    def __init__(self, path: str | Path):
        self._folder = local_folder(path, state=False)
        self._source = open_source(self._folder)
        self.spec = load_spec(self._folder, self._source)
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in Transformer(self.spec).named_parameters()}
        self._disk = names_on_disk(shapes, self._source.table)
        check_names(self._source, {self._disk[name]: shape for name, shape in shapes.items()}, self.spec, self._folder)
        head = head_name(self._source)
        self._stale_head = head if self.spec.tie_word_embeddings and head in self._source.shapes else None

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """The numbers of parameter `name` (our name) in `box`, on the CPU, in the file's dtype; it may be a view."""
        disk = self._disk[name]
        if self._source.table is META and name.endswith(("q_proj.weight", "k_proj.weight")):
            whole = self._source.read_box(disk, tuple(slice(0, length) for length in self._source.shapes[disk]))
            part = halves_from_pairs(whole, self.spec.head_dim)[box]
        else:
            part = self._source.read_box(disk, box)
        if not part.is_floating_point():
            raise PunaError(f"{disk} in {self._folder} holds {part.dtype}, not floating point", "dequantize it first")
        if name == "embed" and self._stale_head is not None:
            self._check_head(self._source.read_box(self._stale_head, box), part)
        return part

    def _check_head(self, head: Tensor, embed: Tensor) -> None:
        if not torch.equal(head, embed.to(head.dtype)):
            raise PunaError(
                f"{self._folder} says tie_word_embeddings, but its lm_head.weight differs from the embedding",
                "the file was saved stale; set tie_word_embeddings to false in config.json if the head is right",
            )
