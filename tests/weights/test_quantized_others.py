"""GPTQ and AWQ folders, against a slow reader that follows the formats' description bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import pack
from puna.ops.formats.scheme import Scheme
from puna.weights.export import QuantizedWriter
from puna.weights.folder import load_model
from puna.weights.reader import WeightReader
from weights.quantized_models import logits, parameters_of, parts_of, quantize, random_model, write

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LAYER, NAME = "layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(tied=False)


def slow_gptq(tensors: dict[str, Tensor], bits: int, version: int) -> Tensor:
    """w[n, d] = (q - z) s; a code's bits are read one after the other from the words of its column."""
    words, zero_words = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales, order = tensors["scales"].float(), tensors["g_idx"].tolist()

    def code(column: list[int], place: int) -> int:
        found = (column[(place * bits + b) // 32] >> ((place * bits + b) % 32) & 1 for b in range(bits))
        return sum(bit << b for b, bit in enumerate(found))

    rows, columns = scales.shape[1], len(order)
    zeros = [[(code(row, n) + (2 - version)) % 2**bits for n in range(rows)] for row in zero_words]
    weight = torch.empty(rows, columns)
    for n in range(rows):
        column = [row[n] for row in words]
        for d in range(columns):
            weight[n, d] = (code(column, d) - zeros[order[d]][n]) * scales[order[d], n]
    return weight


def slow_awq(tensors: dict[str, Tensor], group: int) -> Tensor:
    def nibbles(words: Tensor) -> Tensor:
        rows, count = words.shape
        found = torch.empty(rows, count * 8)
        for row in range(rows):
            for word in range(count):
                for k, output in enumerate(AWQ_ORDER):
                    found[row, word * 8 + output] = (int(words[row, word]) >> (4 * k)) & 15
        return found

    codes, zeros, scales = nibbles(tensors["qweight"]), nibbles(tensors["qzeros"]), tensors["scales"].float()
    group_of = torch.arange(codes.shape[0]) // group
    return ((codes - zeros[group_of]) * scales[group_of]).t()


def stored(folder: Path) -> dict[str, Tensor]:
    state = load_file(folder / "model.safetensors")
    return {name.removeprefix(f"{NAME}."): tensor for name, tensor in state.items() if name.startswith(NAME)}


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (4, 64, False), (3, 32, True), (2, 32, False),
                                                           (8, 128, True), (4, 0, True)])  # fmt: skip
def test_gptq(model, tmp_path, format, bits, group, symmetric) -> None:
    scheme = Scheme(bits, "int", symmetric, "group" if group else "channel", group)
    quantized = quantize(model, scheme, scale_dtype=torch.float16)
    write(tmp_path / "m", model, quantized, format)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, group or -1, symmetric)
    assert (config["desc_act"], config["checkpoint_format"]) == (False, format)
    expected = slow_gptq(stored(tmp_path / "m"), bits, 2 if format == "gptq_v2" else 1)
    assert torch.equal(expected, quantized[LAYER].packed.dequantize())
    reader = WeightReader(tmp_path / "m")
    for layer, weight in quantized.items():
        found = reader.weight(f"{layer}.weight")
        assert isinstance(found, QuantizedWeight)
        assert found.packed.scheme.bits == bits
        assert torch.equal(found.packed.dequantize(), weight.packed.dequantize())
    plain = reader.weight("lm_head.weight")
    assert isinstance(plain, Tensor)
    assert torch.equal(plain, parameters_of(model)["lm_head.weight"])


def test_gptq_act_order(model, tmp_path) -> None:
    scheme = Scheme(4, "int", True, "group", 32)
    quantized = quantize(model, scheme, scale_dtype=torch.float16)
    for layer, weight in quantized.items():
        order = torch.randperm(weight.shape[1], dtype=torch.int32) // 32
        quantized[layer] = QuantizedWeight(pack(weight.packed.codes(), scheme, weight.packed.scales, None, order))
    write(tmp_path / "m", model, quantized, "gptq_v2")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    expected = quantized[LAYER].packed.dequantize()
    assert torch.equal(slow_gptq(stored(tmp_path / "m"), 4, 2), expected)
    found = WeightReader(tmp_path / "m").weight(f"{LAYER}.weight")
    assert isinstance(found, QuantizedWeight)
    assert found.packed.group_of_D is not None
    assert torch.equal(found.packed.dequantize(), expected)
    assert (logits(load_model(tmp_path / "m")) - logits(load_model(tmp_path / "m", dequantize=True))).abs().max() < 1e-4


def test_gptq_mixed_precision_and_head(model, tmp_path) -> None:
    four, eight = Scheme(4, "int", True, "group", 32), Scheme(8, "int", True, "group", 64)
    overrides = {"down_proj": eight, "layers.1.attn.q_proj": None, "lm_head": four}
    quantized = quantize(model, four, None, overrides, torch.float16)
    write(tmp_path / "m", model, quantized, "gptq")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["lm_head"] is True
    assert len(config["dynamic"]) == 3
    reader = WeightReader(tmp_path / "m")
    found = {layer: reader.weight(f"{layer}.weight") for layer in quantized}
    assert {layer: weight.packed.scheme for layer, weight in found.items()} == {
        layer: weight.packed.scheme for layer, weight in quantized.items()
    }
    assert isinstance(reader.weight("layers.1.attn.q_proj.weight"), Tensor)


@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (64, False), (0, False)])
def test_awq(model, tmp_path, group, symmetric) -> None:
    scheme = Scheme(4, "int", symmetric, "group" if group else "channel", group)
    quantized = quantize(model, scheme, None, {"layers.1.mlp.down_proj": None}, torch.float16)
    write(tmp_path / "m", model, quantized, "awq")
    expected = quantized[LAYER].packed.dequantize()
    assert torch.equal(slow_awq(stored(tmp_path / "m"), group or 128), expected)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["zero_point"]) == ("awq", "gemm", True)
    assert set(config["modules_to_not_convert"]) == {"lm_head", "model.layers.1.mlp.down_proj"}
    reader = WeightReader(tmp_path / "m")
    for layer, weight in quantized.items():
        found = reader.weight(f"{layer}.weight")
        assert isinstance(found, QuantizedWeight)
        assert torch.equal(found.packed.dequantize(), weight.packed.dequantize())


def test_qwen2_biases(tmp_path) -> None:
    model = random_model("qwen2")
    quantized = quantize(model, Scheme(4, "int", True, "group", 32), scale_dtype=torch.float16)
    for format in ("gptq", "awq"):
        write(tmp_path / format, model, quantized, format)
        loaded = load_model(tmp_path / format, dequantize=True)
        assert torch.equal(loaded.layers[1].attn.k_proj.bias, model.layers[1].attn.k_proj.bias)
        assert bool(model.layers[1].attn.k_proj.bias.any())


@pytest.mark.parametrize(
    ("format", "keys", "message"),
    [
        ("gptq", {"bits": 8}, "mis-shaped model.layers.0.self_attn.q_proj.qweight"),
        ("gptq", {"group_size": 64}, r"mis-shaped .*qzeros: file \[4, 16\], config \[2, 16\]"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        ("awq", {"version": "gemv"}, "awq version"),
        ("awq", {"group_size": 64}, "mis-shaped"),
    ],
)
def test_configs_that_do_not_fit_are_refused(model, tmp_path, format, keys, message) -> None:
    quantized = quantize(model, Scheme(4, "int", True, "group", 32), scale_dtype=torch.float16)
    folder = write(tmp_path / "m", model, quantized, format)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= keys
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PunaError, match=message):
        load_model(folder)


@pytest.mark.parametrize("end", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_missing_tensor_is_refused(model, tmp_path, end) -> None:
    quantized = quantize(model, Scheme(4, "int", True, "group", 32), scale_dtype=torch.float16)
    folder = write(tmp_path / "m", model, quantized, "gptq")
    state = load_file(folder / "model.safetensors")
    del state[f"{NAME}.{end}"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PunaError, match=f"missing {NAME}.{end}"):
        load_model(folder)


PEAK = """
import sys, puna, torch
from pathlib import Path
from puna.model.linear import QuantizedLinear
def peak(): return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
warm = puna.load_model(sys.argv[1])  # imports, thread pools and measurements of kernels are not the model's
before = peak()
model = puna.load_model(sys.argv[2])
packed = sum(m.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
print((peak() - before) * 1024 / (packed + sum(p.nbytes for p in model.parameters())))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_while_loading(model, tmp_path) -> None:
    """At most 1.2 times what the loaded model holds, kernels' copies included."""
    scheme = Scheme(4, "int", True, "group", 128)
    spec = Spec(vocab_size=8000, hidden_size=1024, num_hidden_layers=20, num_attention_heads=8,
                              num_key_value_heads=8, head_dim=128, intermediate_size=3072)  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Transformer(spec).named_parameters()}
    with QuantizedWriter(tmp_path / "m", spec, None) as writer:
        for part, tensors in parts_of({name: torch.empty(1) for name in shapes}).items():
            full: dict[str, Tensor | QuantizedWeight] = {}
            for name in tensors:
                rows, *columns = shapes[name]
                if name.endswith("proj.weight"):
                    codes = torch.randint(-8, 8, (rows, columns[0]), dtype=torch.int8)
                    scales = torch.full((rows, columns[0] // 128), 0.01, dtype=torch.float16)
                    full[name] = QuantizedWeight(pack(codes, scheme, scales))
                else:
                    full[name] = torch.full(shapes[name], 0.5)
            writer.add(part, full)
        writer.finish()
    small = write(
        tmp_path / "s", model, quantize(model, Scheme(4, "int", True, "group", 32), scale_dtype=torch.float16)
    )
    command = [sys.executable, "-c", PEAK, str(small), str(tmp_path / "m")]
    ended = subprocess.run(
        command, check=True, capture_output=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert float(ended.stdout) <= 1.2
