"""A model's files, opened and checked: its spec, where its tensors are, which of its layers are quantized.

Nothing is loaded yet. A missing, surplus or mis-shaped tensor is an error that lists names and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.base.storage import read_json
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.text.tokenizer import Tokenizer
from puna.weights.gguf.model import GgufSource
from puna.weights.gguf.vocabulary import tokenizer_of
from puna.weights.names import DERIVED, META, halves_from_pairs, names_on_disk
from puna.weights.quantization import parse_quantization
from puna.weights.quantized import QuantizedLayers, Shape
from puna.weights.source import MetaSource, Source, open_source


@dataclass(frozen=True)
class ModelFiles:
    """shapes: the plain model's parameters by our names, in the model's order. layers: None for a plain model."""

    path: Path
    source: Source
    spec: Spec
    shapes: dict[str, Shape]
    layers: QuantizedLayers | None = None

    @property
    def stale_head(self) -> str | None:
        """The name on disk of a head that is stored although the embedding is tied to it."""
        name = head_name(self.source)
        return name if self.spec.tie_word_embeddings and name in self.source.shapes else None

    def read_box(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """A part of a plain parameter (our name) in the file's dtype; it may be a view of the file.

        Errors: `PunaError` for numbers that are not floating point, and for a tied head that differs.
        """
        disk = names_on_disk([name], self.source.table)[name]
        part = self._read(name, disk, box)
        if not part.is_floating_point():
            raise not_plain(disk, part, self.path)
        if name == "embed" and self.stale_head is not None:
            head = self.source.read_box(self.stale_head, box)
            if not torch.equal(head, part.to(head.dtype)):
                raise stale_head_error(self.path)
        return part

    def read(self, name: str) -> Tensor:
        """A whole plain parameter, as `read_box`."""
        return self.read_box(name, tuple(slice(0, length) for length in self.shapes[name]))

    def _read(self, name: str, disk: str, box: tuple[slice, ...]) -> Tensor:
        if self.source.table is META and name.endswith(("q_proj.weight", "k_proj.weight")):
            whole = self.source.read_box(disk, tuple(slice(0, length) for length in self.source.shapes[disk]))
            return halves_from_pairs(whole, self.spec.head_dim)[box]
        return self.source.read_box(disk, box)


def open_model(folder: Path) -> ModelFiles:
    """Open a model's folder or GGUF file and check that all tensors are there.

    Errors: `PunaError` for anything incomplete.
    """
    source = GgufSource(folder) if is_gguf(folder) else open_source(folder)
    spec = load_spec(folder, source)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(spec).named_parameters()}
    layers = _quantized_layers(folder, source, shapes, spec)
    if layers is None:
        disk = names_on_disk(shapes, source.table)
        expected = {disk[name]: shape for name, shape in shapes.items()}
    else:
        expected = layers.expected()
    check_names(source, expected, spec, folder)
    if layers is not None:
        layers.check()
    return ModelFiles(folder, source, spec, shapes, layers)


def is_gguf(path: str | Path) -> bool:
    """Whether this is a GGUF file and no folder."""
    return str(path).endswith(".gguf") and not Path(path).is_dir()


def find_spec(path: str | Path) -> Spec:
    """The shape of a model folder, a GGUF file or a preset. Errors: `PunaError` as `Spec.load`."""
    return GgufSource(path).spec if is_gguf(path) else Spec.load(path)


def find_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a model folder or GGUF file; None if it has none."""
    if is_gguf(path):
        metadata = GgufSource(path).metadata
        return None if metadata.get("tokenizer.ggml.model", "no_vocab") == "no_vocab" else tokenizer_of(metadata)
    there = any((Path(path) / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    return Tokenizer.load(path) if there else None


def _quantized_layers(folder: Path, source: Source, shapes: dict[str, Shape], spec: Spec) -> QuantizedLayers | None:
    if isinstance(source, (MetaSource, GgufSource)):
        return None
    config = read_json(folder / "config.json").get("quantization_config")
    return None if config is None else QuantizedLayers(source, parse_quantization(config), shapes, spec)


def load_spec(folder: Path, source: Source) -> Spec:
    """The model's shape, from config.json or Meta's params.json; what params.json leaves out the weights tell."""
    if isinstance(source, GgufSource):
        return source.spec
    if not isinstance(source, MetaSource):
        return Spec.load(folder)
    params = read_json(folder / "params.json")
    if params.get("vocab_size", -1) <= 0:  # Llama 1 and 2 leave it to the tokenizer; the head's rows say it too
        params["vocab_size"] = source.shapes[head_name(source)][0]
    source.use_embedding_cut(params["vocab_size"])
    if head_name(source) not in source.shapes:
        params["tied"] = True
    return Spec.from_params(params)


def head_name(source: Source) -> str:
    """What the output head is called in this origin's files."""
    return names_on_disk(["lm_head.weight"], source.table)["lm_head.weight"]


def check_names(source: Source, expected: dict[str, Shape], spec: Spec, folder: Path) -> None:
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


def not_plain(disk: str, tensor: Tensor, folder: Path) -> PunaError:
    """For integers where a plain weight should be."""
    return PunaError(f"{disk} in {folder} holds {tensor.dtype}, not floating point", "dequantize the model first")


def stale_head_error(folder: Path) -> PunaError:
    """For a stored head that the config says is the embedding."""
    return PunaError(
        f"{folder} says tie_word_embeddings, but its lm_head.weight differs from the embedding",
        "the file was saved stale; set tie_word_embeddings to false in config.json if the head is the right one",
    )
