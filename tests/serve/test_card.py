"""`puna info` of quantized models: formats, bits and bytes as they are stored, without loading anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from puna.base.console import PunaError
from puna.cli.front import run
from puna.model.transformer import Transformer
from puna.ops.formats.kv import KV_INT8, KVScales
from puna.ops.formats.scheme import FLOAT8_TOKEN, INT8, Scheme
from puna.serve.card import model_card
from puna.serve.convert import Conversion, run_convert
from puna.weights.folder import save_model
from weights.quantized_models import quantize, random_model, write

G32 = Scheme(4, "int", True, "group", 32)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(tied=False)


@pytest.mark.parametrize(
    ("format", "bits"),
    # int4 with a 16-bit scale per 32: 4.5; 16 bytes of weight_shape per layer; in GPTQ a zero point per group and
    # output (0.125 bits) and 4 bytes of g_idx per input (0.25 bits for 128 outputs)
    [("compressed-tensors", 4.5), ("gptq", 4.625), ("awq", 4.625)],
)
def test_formats_and_bits(model, tmp_path, format, bits) -> None:
    write(tmp_path / "m", model, quantize(model, G32, scale_dtype=torch.float16), format)
    card = model_card(str(tmp_path / "m"))
    assert card["quantization"]["method"] == format
    assert card["quantization"]["formats"] == {"int4_g32": 14, "plain": 1}
    assert bits <= card["quantization"]["bits_per_weight"] < bits + 0.25
    assert card["weight_bytes"] == (tmp_path / "m" / "model.safetensors").stat().st_size


def test_mixed_inputs_and_cache(model, tmp_path, capsys) -> None:
    kv = KVScales(KV_INT8, (torch.ones(1),) * 2, (torch.ones(1),) * 2)
    scheme = Scheme(kind="float")
    write(tmp_path / "m", model, quantize(model, scheme, FLOAT8_TOKEN, {"down_proj": INT8, "lm_head": INT8}), kv=kv)
    run(["info", str(tmp_path / "m")])
    said = capsys.readouterr().out
    assert "compressed-tensors: fp8 x 12, int8 x 3 (8." in said
    assert "fp8 per token" in said
    assert "int8 per tensor" in said
    assert f"{model.spec.kv_bytes_per_token(1)} in int8" in said


def test_plain_and_gguf(model, tmp_path, capsys) -> None:
    save_model(model, tmp_path / "m")
    assert model_card(str(tmp_path / "m"))["quantization"] is None
    run_convert(Conversion(str(tmp_path / "m"), "gguf", str(tmp_path / "m.gguf"), "Q8_0"))
    run(["info", str(tmp_path / "m.gguf"), "--json"])
    card = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert card["quantization"] == {"method": "gguf", "formats": {"Q8_0": 16}, "inputs": None, "kv": None,
                                    "bits_per_weight": 8.5}  # fmt: skip
    assert card["weight_bytes"] == (tmp_path / "m.gguf").stat().st_size == card["files"]["m.gguf"]


def test_what_puna_does_not_read_is_said(model, tmp_path: Path) -> None:
    write(tmp_path / "m", model, quantize(model, G32))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PunaError, match="bitsandbytes"):
        model_card(str(tmp_path / "m"))
