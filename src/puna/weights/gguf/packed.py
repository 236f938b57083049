"""A GGUF file's linear layers as they are stored: packed codes or raw blocks, in our order of rows.

Rows of q and k that are stored for rotary on neighbours are reordered as whole rows of bytes, which changes no number.
Everything else may stay a view of the mapped file: the bytes are then read by whoever multiplies with them first, and
the file must not be overwritten in place meanwhile (puna's own writers replace files whole).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from puna.ops.formats.gguf_layer import GgufWeight, from_blocks
from puna.ops.formats.layer import QuantizedWeight
from puna.weights.gguf.model import GgufSource
from puna.weights.names import names_on_disk
from puna.weights.quantized import Shape, linear_layers

_PLAIN = ("F32", "F16", "BF16")


class GgufLayers:
    """The quantized layers of a file, read one by one. `formats`: our names of them -> their type, such as 'Q4_K'.

    With a tied embedding in blocks there is a layer `lm_head` as well: the same numbers, which logits then need not
    read as fp32.
    """

    def __init__(self, source: GgufSource, shapes: Mapping[str, Shape]):
        self._source = source
        layers = {f"{layer}.weight": layer for layer in linear_layers(shapes)}
        if source.spec.tie_word_embeddings:
            layers["embed"] = "lm_head"
        disk = names_on_disk(layers, source.table)
        self._disk = {layer: disk[name] for name, layer in layers.items()}
        types = {layer: source.type_of(name) for layer, name in self._disk.items()}
        self.formats = {layer: type for layer, type in types.items() if type not in _PLAIN}

    def weight(self, layer: str) -> QuantizedWeight | GgufWeight:
        """A quantized layer by our name, on the CPU; what is no view of the file has memory of its own."""
        name = self._disk[layer]
        rows, columns = self._source.shapes[name]
        return from_blocks(self._rows(name), self.formats[layer], (rows, columns))

    def _rows(self, name: str) -> Tensor:
        return self._source.in_our_order(name, self._source.raw(name))
