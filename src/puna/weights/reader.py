"""Weights of a model folder, box by box: what one rank of a mesh needs, read without the rest."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats.kv import KVScales
from puna.ops.formats.layer import QuantizedWeight
from puna.weights.fetch import local_folder
from puna.weights.model_files import open_model


class WeightReader:
    """A folder (or a save's URL) with its names and shapes checked; `read` gives any box of any parameter.

    From safetensors only the bytes asked for are read; other formats are read whole, one tensor at a time. `spec` is
    the model's. Raises PunaError for anything incomplete, as `load_model` does.
    """

    def __init__(self, path: str | Path):
        self._files = open_model(local_folder(path, state=False))
        self.spec = self._files.spec

    @property
    def method(self) -> str | None:
        """The quantization method of the folder; None for a plain model."""
        return None if self._files.layers is None else self._files.layers.method

    def names(self) -> list[str]:
        """Our names of all parameters, in the model's order; a quantized layer's is that of its weight."""
        return list(self._files.shapes)

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """The numbers of parameter `name` (our name) in `box`, on the CPU, in the file's dtype; it may be a view.

        Raises PunaError for a folder with quantized layers.
        """
        if self._files.layers is not None:
            raise PunaError(
                f"{self._files.path} is quantized ({self.method}): boxes of packed weights are not read",
                f"puna convert {self._files.path} --to hf --out DIR gives a plain model",
            )
        return self._files.read_box(name, box)

    def weight(self, name: str) -> Tensor | QuantizedWeight:
        """A whole parameter (our name), packed if it is so in the folder; on the CPU, as `read`."""
        layers, layer = self._files.layers, name.removesuffix(".weight")
        if layers is not None and layer in layers.formats and name.endswith(".weight"):
            return layers.weight(layer)
        return self._files.read(name)

    def kv_scales(self) -> KVScales | None:
        """Scales of the KV cache, where the folder says it is quantized."""
        return None if self._files.layers is None else self._files.layers.kv_scales()
