"""The proof that files say what the walk computed: read back block by block, run on held-out text, compared."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model.transformer import Block
from puna.ops.attention import RoundedKV
from puna.ops.basic import rms_norm
from puna.ops.formats.layer import QuantizedWeight
from puna.quant.blocks import RoundedLinear, Runner, block_parameters, build_block, round_block
from puna.quant.report import Reload
from puna.quant.streams import Stream
from puna.weights.reader import WeightReader


def check_reload(folder: str | Path, ids_T: Tensor, expected_RV: Tensor) -> Reload:
    """Compare the logits of a reloaded folder after the last R tokens of a sequence with those of the walk.

    Memory holds one block. The tolerance is what 16 bits do to norms and embeddings, nothing more: 1e-3 of the
    largest logit for fp32 files, 2e-2 else.
    """
    reader = WeightReader(folder)
    device = torch.device("cpu")
    runner, kv = Runner(reader.spec, device), reader.kv_scales()
    around = (lambda attend: attend) if kv is None else (lambda attend: RoundedKV(attend, kv))
    with (
        tempfile.TemporaryDirectory() as place,
        Stream(Path(place), "reload", 1, len(ids_T), reader.spec.hidden_size) as stream,
        torch.inference_mode(),
    ):
        stream.write(0, slice(0, 1), F.embedding(ids_T, _plain(reader.weight("embed"))))
        for layer in range(reader.spec.num_hidden_layers):
            runner.run(_block(reader, layer, device), stream, layer, around)
        hidden_TD = stream.read(reader.spec.num_hidden_layers, slice(0, 1))[-len(expected_RV) :]
        hidden_TD = rms_norm(hidden_TD, _plain(reader.weight("norm.weight")), reader.spec.rms_norm_eps)
        head = reader.weight("embed" if reader.spec.tie_word_embeddings else "lm_head.weight")
        answer = RoundedLinear(head, None) if isinstance(head, QuantizedWeight) else None
        logits_RV = F.linear(hidden_TD, _plain(head)) if answer is None else answer(hidden_TD)
    difference = float((logits_RV - expected_RV).abs().max())
    exact = reader.spec.dtype == "float32"
    return Reload(difference, (1e-3 if exact else 2e-2) * max(1.0, float(expected_RV.abs().max())))


def _block(reader: WeightReader, layer: int, device: torch.device) -> Block:
    weights = {name: reader.weight(f"layers.{layer}.{name}") for name in block_parameters(reader.spec, layer)}
    plain = {name: _plain(weight) for name, weight in weights.items()}
    quantized = {
        name.removesuffix(".weight"): weight for name, weight in weights.items() if isinstance(weight, QuantizedWeight)
    }
    return round_block(build_block(reader.spec, layer, plain, device), quantized)


def _plain(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.float()
