"""A model cut in two, without processes: the parts of every product add up to the whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from puna.base.console import PunaError
from puna.engine.ranks.shard import Part, cut, cut_quantized, load_part, local_kv_heads
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import round_to_nearest
from puna.quant.config import parse_format
from puna.weights.folder import empty_model, load_model, save_model

FORMATS = ["int4_g32", "int4_g16_asym", "int8", "int8_g32", "int3_g32", "fp8"]


def packed(text: str, rows: int = 48, columns: int = 128) -> QuantizedWeight:
    return QuantizedWeight(round_to_nearest(torch.randn(rows, columns), parse_format(text)))


@pytest.mark.parametrize("text", FORMATS)
def test_packed_outputs_and_inputs_are_cut_number_for_number(text) -> None:
    weight = packed(text)
    whole = weight.dequantize()
    for first, end in ((0, 24), (24, 48)):
        assert torch.equal(cut_quantized("q", weight, 0, first, end).dequantize(), whole[first:end])
    for first, end in ((0, 64), (64, 128), (32, 96)):
        part = cut_quantized("o", weight, 1, first, end)
        assert torch.equal(part.dequantize(), whole[:, first:end])
        assert part.shape == (48, end - first)


def test_scattered_groups_and_low_rank_errors_go_along() -> None:
    weight = packed("int4_g32")
    order = torch.arange(128).flip(0) // 32
    scattered = dataclasses.replace(weight, packed=dataclasses.replace(weight.packed, group_of_D=order.int()))
    whole = scattered.dequantize()
    assert torch.equal(cut_quantized("o", scattered, 1, 64, 128).dequantize(), whole[:, 64:])
    low = dataclasses.replace(weight, up_NR=torch.randn(48, 4), down_RD=torch.randn(4, 128))
    x = torch.randn(3, 128)
    parts = [cut_quantized("o", low, 1, a, b).product(x[:, a:b]) for a, b in ((0, 64), (64, 128))]
    assert torch.allclose(parts[0] + parts[1], low.product(x), atol=1e-4)
    columns = [cut_quantized("q", low, 0, a, b).product(x) for a, b in ((0, 24), (24, 48))]
    assert torch.allclose(torch.cat(columns, 1), low.product(x), atol=1e-5)


def test_a_cut_through_a_group_is_refused() -> None:
    with pytest.raises(PunaError, match="groups of 32 inputs; a rank's part from 0 to 48"):
        cut_quantized("layers.0.attn.o_proj", packed("int4_g32"), 1, 0, 48)


def test_inputs_rounded_by_the_token_are_refused_where_a_rank_sees_some() -> None:
    weight = dataclasses.replace(packed("int8"), activations=parse_format("int8"))
    cut_quantized("q", weight, 0, 0, 24)
    with pytest.raises(PunaError, match="rounds its inputs token by token"):
        cut_quantized("o", weight, 1, 0, 64)


@pytest.mark.parametrize(
    ("heads", "kv", "size", "expected"), [(4, 2, 2, [1, 1]), (4, 1, 2, [1, 1]), (4, 4, 4, [1] * 4)]
)
def test_every_rank_has_the_kv_heads_its_queries_look_at(heads, kv, size, expected, tmp_path) -> None:
    spec = Spec.preset("debug").replace(
        num_attention_heads=heads, num_key_value_heads=kv, qkv_bias=True, output_bias=True
    )
    model = empty_model(spec, torch.float32, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 10
    save_model(model, tmp_path / "m")
    parts = [load_part(tmp_path / "m", torch.float32, torch.device("cpu"), Part(r, size)) for r in range(size)]
    assert [local_kv_heads(part) for part in parts] == expected
    x = torch.randn(5, spec.hidden_size)
    attn = model.layers[0].attn
    queries = torch.cat([part.layers[0].attn.q_proj(x) for part in parts], 1)
    assert torch.allclose(queries, attn.q_proj(x), atol=1e-5)
    wide = torch.randn(5, heads * spec.head_dim)
    share = wide.shape[1] // size
    added = sum(part.layers[0].attn.o_proj.inner(wide[:, r * share : (r + 1) * share]) for r, part in enumerate(parts))
    assert torch.allclose(added, attn.o_proj(wide), atol=1e-5)  # the bias once
    whole = load_model(tmp_path / "m")
    assert torch.equal(torch.cat([part.embed for part in parts]), whole.embed)


def test_shapes_that_cannot_be_cut_are_refused(tmp_path) -> None:
    with pytest.raises(PunaError, match="num_attention_heads 4 is not divisible by tp 3"):
        load_part("preset:debug", torch.float32, torch.device("cpu"), Part(0, 3))


def test_the_bias_of_a_summed_layer_is_one_ranks() -> None:
    with torch.device("meta"):
        model = Transformer(Spec.preset("debug").replace(output_bias=True))
    bias = torch.ones(64)
    assert cut("layers.0.attn.o_proj.bias", bias, model, Part(0, 2)).sum() == 64
    assert cut("layers.0.attn.o_proj.bias", bias, model, Part(1, 2)).sum() == 0
