"""Quantized folders: what we write other readers compute alike; what is not whole or not understood is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from puna.base.console import PunaError
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal, RoundedKV
from puna.ops.formats.kv import KV_FLOAT8, KV_INT8, KV_INT8_HEAD, KVScales
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import pack, round_to_nearest
from puna.ops.formats.scheme import FLOAT8, FLOAT8_TENSOR, FLOAT8_TOKEN, INT8, INT8_TOKEN, Scheme
from puna.weights.folder import load_model
from puna.weights.holding import check_format
from puna.weights.quantization import layer_format, parse_quantization, quantization_config
from puna.weights.quantized import linear_layers
from puna.weights.reader import WeightReader
from weights.quantized_models import logits, parameters_of, parts_of, quantize, random_model, write

G32, G64 = Scheme(4, "int", True, "group", 32), Scheme(4, "int", True, "group", 64)
STATIC = Scheme(kind="float", granularity="tensor")
IDS = torch.arange(40)

# name: (weights, inputs, overrides by the end of the layer's name)
CASES = {
    "int4_g64": (G64, None, {}),
    "int4_g32": (G32, None, {}),
    "int4": (Scheme(4), None, {}),
    "int8": (INT8, None, {}),
    "int8_g32": (Scheme(8, "int", True, "group", 32), None, {}),
    "w8a8": (INT8, INT8_TOKEN, {}),
    "w8a8_static": (INT8, Scheme(granularity="tensor"), {}),
    "fp8": (FLOAT8, FLOAT8_TOKEN, {}),
    "fp8_static": (FLOAT8_TENSOR, STATIC, {}),
    "fp8_weights": (FLOAT8, None, {}),
    "mixed": (G32, None, {"down_proj": INT8, "layers.0.attn.o_proj": None, "layers.1.mlp.up_proj": FLOAT8}),
    "head": (G32, None, {"lm_head": INT8}),
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(tied=False)


def theirs(folder: Path, ids: Tensor = IDS) -> Tensor:
    """transformers' logits of the folder, with everything it holds used."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return loaded(ids[None]).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_we_compute(model, tmp_path, case) -> None:
    scheme, inputs, overrides = CASES[case]
    quantized = quantize(model, scheme, inputs, overrides)
    write(tmp_path / "m", model, quantized)
    ours = load_model(tmp_path / "m")
    kinds = {name: type(module).__name__ for name, module in ours.named_modules()}
    assert {name for name, kind in kinds.items() if kind == "QuantizedLinear"} == set(quantized)
    assert (logits(ours) - logits(model)).abs().max() > 1e-2  # it was quantized
    if inputs is None:
        assert (logits(ours) - theirs(tmp_path / "m")).abs().max() < 1e-4
        assert (logits(load_model(tmp_path / "m", dequantize=True)) - logits(ours)).abs().max() < 1e-4


@pytest.mark.parametrize("case", [case for case, (_, inputs, _) in CASES.items() if inputs is not None])
def test_transformers_rounds_inputs_as_we_do(model, tmp_path, case) -> None:
    """Layer by layer on the same inputs: a last bit that differs before it turns a code over, and then logits too."""
    scheme, inputs, overrides = CASES[case]
    write(tmp_path / "m", model, quantize(model, scheme, inputs, overrides))
    ours, other = load_model(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in other.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0][0], y[0])}))
    with torch.no_grad():
        expected = other(IDS[None]).logits[0]
        for name, (x, y) in seen.items():
            layer = ours.get_submodule(name.removeprefix("model.").replace("self_attn", "attn"))
            assert (layer(x) - y).abs().max() < 1e-4, name
    assert len(seen) == 14
    assert (logits(ours) - expected)[0].abs().max() < 1e-4


def test_loading_gives_back_every_code(model, tmp_path) -> None:
    quantized = quantize(model, G32, None, {"up_proj": Scheme(3, "int", False), "q_proj": FLOAT8_TENSOR})
    write(tmp_path / "m", model, quantized)
    reader = WeightReader(tmp_path / "m")
    for name, parameter in parameters_of(model).items():
        found = reader.weight(name)
        if isinstance(found, Tensor):
            assert torch.equal(found, parameter)
            continue
        packed = quantized[name.removesuffix(".weight")].packed
        assert found.packed.scheme == packed.scheme
        assert torch.equal(found.packed.data.view(torch.uint8), packed.data.view(torch.uint8))
        assert torch.equal(found.packed.dequantize(), packed.dequantize())
    with pytest.raises(PunaError, match="is quantized") as refused:
        reader.read("embed", (slice(0, 2),))
    assert "--to hf" in refused.value.hint


@pytest.mark.parametrize("family", ["qwen2", "tied", "qwen3"])
def test_biases_ties_and_norms(tmp_path, family) -> None:
    model = random_model(family)
    write(tmp_path / "m", model, quantize(model, G32))
    assert (logits(load_model(tmp_path / "m")) - theirs(tmp_path / "m")).abs().max() < 1e-4


@pytest.mark.parametrize("scheme", [KV_INT8, KV_FLOAT8, KV_INT8_HEAD])
def test_kv_cache_scales(model, tmp_path, scheme) -> None:
    """transformers rounds keys and values with our scales: its logits are those of our rounding attention."""
    heads = 2 if scheme.granularity == "head" else 1
    keys = tuple(torch.linspace(0.02, 0.05, heads) + layer / 100 for layer in range(2))
    scales = KVScales(scheme, keys, tuple(k / 2 for k in keys))
    write(tmp_path / "m", model, quantize(model, G32), kv=scales)
    ours = load_model(tmp_path / "m")
    found = ours.kv_scales
    assert isinstance(found, KVScales)
    assert found.scheme == scheme
    assert all(torch.equal(a, b) for a, b in zip(found.keys + found.values, scales.keys + scales.values, strict=True))
    with torch.no_grad():
        rounded = ours.logits(ours(IDS, IDS, RoundedKV(PackedCausal.of([40]), found)))
    # On average: a last bit that differs turns a code over here and there.
    off, cost = (rounded - theirs(tmp_path / "m")).abs().mean(), (rounded - logits(ours)).abs().mean()
    assert off < 1e-4
    assert cost > 0.1


def test_puna_keeps_what_others_have_no_words_for(model, tmp_path) -> None:
    """Low-rank errors, outlier thresholds and act-order groups come back; other readers refuse the folder."""
    ordered, plain = quantize(model, G32), quantize(model, INT8, INT8_TOKEN)
    quantized = {}
    for number, (name, weight) in enumerate(plain.items()):
        rows, columns = weight.shape
        if number % 3 == 0:
            order = torch.randperm(columns, dtype=torch.int32) // 32
            packed = pack(ordered[name].packed.codes(), G32, ordered[name].packed.scales, None, order)
            quantized[name] = QuantizedWeight(packed, up_NR=torch.randn(rows, 4), down_RD=torch.randn(4, columns))
        else:
            quantized[name] = QuantizedWeight(weight.packed, INT8_TOKEN, threshold=6.0)
    write(tmp_path / "m", model, quantized, format="puna")
    reader = WeightReader(tmp_path / "m")
    x = torch.randn(3, 128) * 4
    for name, weight in quantized.items():
        found = reader.weight(f"{name}.weight")
        assert isinstance(found, QuantizedWeight)
        if weight.shape[1] == 128:
            assert torch.equal(found.product(x), weight.product(x)), name
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("format", ["compressed-tensors", "puna"])
def test_old_files_with_act_order_groups(model, tmp_path, format) -> None:
    """compressed-tensors wrote `weight_g_idx` until 2026; such files are read."""
    quantized = quantize(model, G32)
    order = torch.randperm(128, dtype=torch.int32) // 32
    first = quantized["layers.0.attn.q_proj"].packed
    quantized["layers.0.attn.q_proj"] = QuantizedWeight(pack(first.codes(), G32, first.scales, None, order))
    write(tmp_path / "m", model, quantized, format="puna")
    change(tmp_path / "m", quant_method=format)
    found = WeightReader(tmp_path / "m").weight("layers.0.attn.q_proj.weight")
    assert isinstance(found, QuantizedWeight)
    assert torch.equal(found.packed.dequantize(), quantized["layers.0.attn.q_proj"].packed.dequantize())


def change(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= keys
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, alter: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    alter(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda s: s.pop(f"{Q}.weight_scale"), rf"1 missing.*\n.*missing {Q}.weight_scale \[128, 2\]"),
        (lambda s: s.pop("model.layers.1.self_attn.k_scale"), r"missing model.layers.1.self_attn.k_scale"),
        (lambda s: s.update({f"{Q}.weight": torch.ones(2)}), rf"1 surplus.*\n.*surplus {Q}.weight"),
        (lambda s: s.update({f"{Q}.weight_packed": torch.ones(128, 8).int()}), r"file \[128, 8\], config \[128, 16\]"),
        (lambda s: s.update({f"{Q}.weight_packed": s[f"{Q}.weight_packed"].float()}), "holds torch.float32, expected"),
        (lambda s: s[f"{Q}.weight_scale"].fill_(torch.nan), f"{Q}.weight_scale holds 256 NaN"),
        (lambda s: s[f"{Q}.weight_shape"].fill_(64), r"weight_shape says \[64, 64\], the config \[128, 128\]"),
        (lambda s: s["model.layers.1.self_attn.v_scale"].zero_(), "scale of layer 1's values is"),
        (lambda s: s.update({f"{Q}.bias": torch.ones(128)}), f"{Q}.bias is not zero"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused(model, tmp_path, alter, message) -> None:
    scales = KVScales(KV_INT8, (torch.ones(1),) * 2, (torch.ones(1),) * 2)
    write(tmp_path / "m", model, quantize(model, G64), kv=scales)
    rewrite(tmp_path / "m", alter)
    with pytest.raises(PunaError, match=message):
        load_model(tmp_path / "m")


def test_empty_biases_of_old_files_are_dropped(model, tmp_path) -> None:
    write(tmp_path / "m", model, quantize(model, G64), format="gptq")
    before = logits(load_model(tmp_path / "m"))
    rewrite(tmp_path / "m", lambda s: s.update({f"{Q}.bias": torch.zeros(128)}))
    assert torch.equal(logits(load_model(tmp_path / "m")), before)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes'"),
        ({"quant_method": "fbgemm_fp8"}, "quantized by 'fbgemm_fp8'"),
        ({"quantization_status": "frozen"}, "quantization_status = 'frozen'"),
        ({"format": "marlin-24", "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}, "marlin"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "name a preset"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}}}, "float with 4"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}}}}, "not whole: KeyError"),
        ({"transform_config": {"config_groups": {"u": 1}}}, "transform_config"),
        ({"kv_cache_scheme": {"num_bits": 8, "dynamic": True}}, "kv_cache_scheme"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(model, tmp_path, keys, message) -> None:
    write(tmp_path / "m", model, quantize(model, G64))
    change(tmp_path / "m", **keys)
    with pytest.raises(PunaError, match=message):
        load_model(tmp_path / "m")


def test_targets_and_ignores_as_compressed_tensors_matches_them() -> None:
    """A name before a pattern before a class; what is ignored is ignored whatever targets it."""
    group = {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}, "format": "pack-quantized"}
    eight = {"weights": {"num_bits": 8, "strategy": "channel"}, "format": "pack-quantized"}
    float8 = {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}, "format": "float-quantized"}
    config = {
        "quant_method": "compressed-tensors",
        "ignore": ["lm_head", r"re:.*layers\.1\..*o_proj"],
        "config_groups": {
            "a": {**group, "targets": ["Linear"]},
            "b": {**eight, "targets": ["re:.*down_proj$", r"re:.*layers\.1\..*o_proj"]},
            "c": {**float8, "targets": ["model.layers.0.mlp.down_proj"]},
        },
    }
    found = parse_quantization(config)
    bits = {
        "model.layers.0.mlp.up_proj": 4,
        "model.layers.1.mlp.down_proj": 8,
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.0.self_attn.o_proj": 4,
    }
    for layer, wanted in bits.items():
        form = found.format_of(layer)
        assert form is not None
        assert form.scheme.bits == wanted
    down = found.format_of("model.layers.0.mlp.down_proj")
    assert down is not None
    assert down.scheme.kind == "float"
    assert found.format_of("lm_head") is None
    assert found.format_of("model.layers.1.self_attn.o_proj") is None


@pytest.mark.parametrize("format", ["compressed-tensors", "puna", "gptq", "gptq_v2"])
def test_a_written_config_reads_back_the_same(format) -> None:
    layers = {
        f"model.layers.{i}.mlp.{leaf}": layer_format(format, G32) for i in range(3) for leaf in ("up_proj", "gate_proj")
    }
    layers["model.layers.1.mlp.down_proj"] = layer_format(format, Scheme(8, "int", True, "group", 64))
    layers["model.layers.2.mlp.down_proj"] = layer_format(format, Scheme(3))
    layers |= {"lm_head": layer_format(format, G32), "model.layers.0.mlp.down_proj": None}  # type: ignore[dict-item]
    found = parse_quantization(json.loads(json.dumps(quantization_config(format, layers))))
    assert {layer: found.format_of(layer) for layer in layers} == layers


@pytest.mark.parametrize(
    ("format", "scheme", "inputs", "more", "message"),
    [
        ("gptq", FLOAT8, None, {}, "does not know float of 8 bits per channel"),
        ("gptq", Scheme(5), None, {}, "does not know int of 5 bits"),
        ("gptq", G32, INT8_TOKEN, {}, "inputs are never rounded"),
        ("awq", INT8, None, {}, "does not know int of 8 bits per channel"),
        ("awq", G32, None, {"act_order": True}, "no place for act-order"),
        ("compressed-tensors", G32, None, {"low_rank": 8}, "no place for low-rank"),
        ("compressed-tensors", INT8, INT8_TOKEN, {"threshold": 6.0}, "outlier thresholds"),
        ("zip", G32, None, {}, "no format is called 'zip'"),
    ],
)
def test_a_format_that_cannot_hold_it_is_refused_beforehand(model, format, scheme, inputs, more, message) -> None:
    layers = dict.fromkeys(linear_layers(parameters_of(model)), layer_format(format, scheme, inputs, **more))
    with pytest.raises(PunaError, match=message) as refused:
        check_format(format, layers, model.spec)
    assert "compressed-tensors" in refused.value.hint


def test_mixed_precision_cannot_be_awq_and_kv_cannot_be_gptq(model) -> None:
    layers = {"layers.0.mlp.up_proj": layer_format("awq", G32), "layers.0.mlp.down_proj": layer_format("awq", G64)}
    with pytest.raises(PunaError, match="one number format must do for all layers"):
        check_format("awq", layers, model.spec)
    with pytest.raises(PunaError, match="KV cache"):
        check_format("gptq", {"layers.0.mlp.up_proj": layer_format("gptq", G32)}, model.spec, KV_INT8)
    with pytest.raises(PunaError, match="tied"):
        check_format("gptq", {"lm_head": layer_format("gptq", G32)}, model.spec.replace(tie_word_embeddings=True))


def test_widths_that_fill_no_words_cannot_be_gptq_or_awq(model) -> None:
    spec = model.spec.replace(vocab_size=500)
    with pytest.raises(PunaError, match="fill whole words of 32 bits, which 500 x 128 does not: lm_head"):
        check_format("gptq", {"lm_head": layer_format("gptq", Scheme(3))}, spec)
    with pytest.raises(PunaError, match="outputs come by eights, which 500 do not"):
        check_format("awq", {"lm_head": layer_format("awq", G32)}, spec)
    assert check_format("gptq", {"lm_head": layer_format("gptq", Scheme(8))}, spec) == []


def test_plain_int8_numbers_only_where_inputs_are_rounded() -> None:
    """vLLM reads int8 weights without rounded inputs from packed words alone."""
    layouts = [
        layer_format("compressed-tensors", *pair).layout for pair in ((INT8, INT8_TOKEN), (INT8, None), (G32, None))
    ]
    assert layouts == ["int-quantized", "pack-quantized", "pack-quantized"]
    assert (
        layer_format("compressed-tensors", Scheme(8, "int", True, "group", 32), INT8_TOKEN).layout == "pack-quantized"
    )


def test_notes_say_what_other_tools_make_of_it(model) -> None:
    one = layer_format("compressed-tensors", Scheme(3, "int", False, "group", 32))
    notes = check_format("compressed-tensors", {"layers.0.attn.q_proj": one, "layers.0.attn.k_proj": None}, model.spec)
    assert [any(word in note for note in notes) for word in ("zero points", "4 and 8 bits", "fuses q, k, v")] == [
        True
    ] * 3


def test_our_loader_reads_what_compressed_tensors_compressed(model, tmp_path) -> None:
    """The package's own path: quantize a transformers model by config, compress, save; logits as it had them."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    write(tmp_path / "m", model, {})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], format="pack-quantized")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    apply_quantization_config(other, config)
    for name, module in other.named_modules():
        if name.endswith("_proj"):
            packed = round_to_nearest(module.weight.detach(), G32)
            module.weight_scale.data.copy_(packed.scales)
            module.weight.data.copy_(packed.dequantize())
    with torch.no_grad():
        before = other(IDS[None]).logits[0]
    compressor = ModelCompressor.from_pretrained_model(other)
    compressor.compress_model(other)
    other.save_pretrained(tmp_path / "c")
    compressor.update_config(tmp_path / "c")
    assert (logits(load_model(tmp_path / "c")) - before).abs().max() < 1e-4


def test_parts_of_covers_the_model(model) -> None:
    assert [n for part in parts_of(parameters_of(model)).values() for n in part] == list(parameters_of(model))
