"""llama.cpp's importance matrices: how much errors in each input of a linear layer count (mean squared activations).

Two formats: GGUF (`NAME.in_sum2`, `NAME.counts`) and the older one, little endian: int32 entries; for each int32 length
and name, int32 calls, int32 values, float32 values summed over the calls. Source: llama.cpp, tools/imatrix.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.ops.formats.gguf import dequantize_gguf
from puna.weights.gguf.file import GgufFile
from puna.weights.holding import linear_shapes
from puna.weights.names import GGUF, names_on_disk

_SUM, _COUNTS = ".in_sum2", ".counts"


def read_importance(path: str | Path, spec: Spec) -> dict[str, Tensor]:
    """{linear layer (our name): (D,) fp32, at least 0} of an imatrix file.

    Errors: `PunaError` for a file that is damaged, of another model, or covers no layer of this one.
    """
    path = Path(path)
    if not path.is_file():
        raise PunaError(f"no importance matrix at {path}", "make one with llama.cpp's llama-imatrix, or leave it out")
    with open(path, "rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    found = _read_gguf(path) if is_gguf else _read_old(path)
    shapes = linear_shapes(spec)
    names = names_on_disk([f"{layer}.weight" for layer in shapes], GGUF)
    there = {layer: found[names[f"{layer}.weight"]] for layer in shapes if names[f"{layer}.weight"] in found}
    for layer, values in there.items():
        if values.shape != (shapes[layer][1],) or not bool((values.isfinite() & (values >= 0)).all()):
            raise PunaError(
                f"{path} has {len(values)} numbers for {layer} with {shapes[layer][1]} inputs (all must be at least 0)",
                "give the importance matrix of this very model",
            )
    if not there:
        raise PunaError(f"{path} names no layer of this model ({len(found)} entries)", "give this model's matrix")
    return there


def _read_gguf(path: Path) -> dict[str, Tensor]:
    file = GgufFile(path)
    names = [name.removesuffix(_SUM) for name in file.tensors if name.endswith(_SUM)]
    return {name: _tensor(file, name + _SUM) / _tensor(file, name + _COUNTS).clamp(min=1) for name in names}


def _tensor(file: GgufFile, name: str) -> Tensor:
    if name not in file.tensors:
        raise PunaError(f"{file.path} has no {name}", "the file is not whole")
    return dequantize_gguf(file.raw(name), file.tensors[name].type).flatten()


def _read_old(path: Path) -> dict[str, Tensor]:
    data, found, at = path.read_bytes(), {}, 4
    try:
        (entries,) = struct.unpack_from("<i", data)
        for _ in range(entries):
            (length,) = struct.unpack_from("<i", data, at)
            name = data[at + 4 : at + 4 + length].decode()
            calls, count = struct.unpack_from("<ii", data, at + 4 + length)
            at += 12 + length
            values = torch.tensor(struct.unpack_from(f"<{count}f", data, at))
            found[name] = values / max(1, calls)
            at += 4 * count
    except (struct.error, UnicodeDecodeError) as error:
        raise PunaError(f"{path} is no importance matrix, or cut short: {error}", "make it again") from error
    return found
