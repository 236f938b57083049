"""The walk's parts: streams on disk, blocks that are watched and rounded, and statistics equal to the whole model's."""

from __future__ import annotations

import pytest
import torch

from puna.model.linear import Linear
from puna.model.rope import attention_scale, inverse_frequencies
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import round_to_nearest
from puna.ops.formats.scheme import INT8, INT8_TOKEN
from puna.ops.rope import cos_sin
from puna.quant.blocks import INPUTS, LINEARS, Runner, block_parameters, build_block, round_block, watched
from puna.quant.calibration import Sequences
from puna.quant.config import QuantConfig
from puna.quant.sensitivity import candidates, measure_damage
from puna.quant.steps import output_error
from puna.quant.streams import Stream
from puna.quant.walk import Job, Walk
from puna.weights.folder import empty_model

CPU = torch.device("cpu")
SPEC = Spec.preset("debug").replace(vocab_size=96, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model() -> Transformer:
    net = empty_model(SPEC, torch.float32, CPU)
    net.init_weights(torch.Generator().manual_seed(3))
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)
    return net.eval()


def tensors_of(model: Transformer, layer: int) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.layers[layer].named_parameters()}


def hidden(model: Transformer, ids_ST: torch.Tensor) -> torch.Tensor:
    sequences, length = ids_ST.shape
    with torch.no_grad():
        return model(ids_ST.flatten(), torch.arange(length).repeat(sequences), PackedCausal.of([length] * sequences))


def test_streams_keep_both_sides(tmp_path) -> None:
    with Stream(tmp_path, "s", 3, 4, 5) as stream:
        first, second = torch.randn(12, 5), torch.randn(12, 5)
        for rows in (slice(0, 2), slice(2, 3)):
            stream.write(0, rows, first[rows.start * 4 : rows.stop * 4])
        stream.write(1, slice(0, 3), second)
        stream.sync(1)
        assert torch.equal(stream.read(0, slice(1, 3)), first[4:])
        assert torch.equal(stream.read(1, slice(0, 3)), second)
        assert list(stream.batches()) == [slice(0, 3)]
    with Stream(tmp_path, "s", 3, 4, 5) as again:  # as after a kill
        assert torch.equal(again.read(1, slice(0, 3)), second)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == Stream.bytes_on_disk(3, 4, 5)


def test_blocks_compute_what_the_model_computes(model, tmp_path) -> None:
    ids = torch.randint(0, 96, (3, 10), generator=torch.Generator().manual_seed(1))
    runner = Runner(SPEC, CPU)
    with Stream(tmp_path, "s", 3, 10, SPEC.hidden_size) as stream:
        stream.write(0, slice(0, 3), model.embed[ids.flatten()])
        for layer in range(SPEC.num_hidden_layers):
            assert set(tensors_of(model, layer)) == set(block_parameters(SPEC, layer))
            runner.run(build_block(SPEC, layer, tensors_of(model, layer), CPU), stream, layer)
        found = model.norm(stream.read(SPEC.num_hidden_layers, slice(0, 3)))
    torch.testing.assert_close(found, hidden(model, ids), rtol=1e-5, atol=1e-5)


def test_watching_sees_every_input_once(model, tmp_path) -> None:
    block = build_block(SPEC, 0, tensors_of(model, 0), CPU)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in INPUTS}
    x = torch.randn(6, SPEC.hidden_size)
    inv_freq = inverse_frequencies(SPEC.rope, SPEC.head_dim, 6)
    tables = cos_sin(torch.arange(6), inv_freq, attention_scale(SPEC.rope), torch.float32)
    with torch.no_grad():
        before = block(x, *tables, PackedCausal.of([6]))
        with pytest.raises(Exception), watched(block, lambda name, x: seen[name].append(x)):  # noqa: B017
            block(x, *tables, PackedCausal.of([6]))
        assert torch.equal(block(x, *tables, PackedCausal.of([6])), before)
        after_attention = before - block.mlp.down_proj(seen["mlp.down_proj"][0])
        torch.testing.assert_close(block.mlp_norm(after_attention), seen["mlp.gate_proj"][0], rtol=1e-4, atol=1e-4)
    assert {name: len(inputs) for name, inputs in seen.items()} == dict.fromkeys(INPUTS, 1)
    torch.testing.assert_close(seen["attn.q_proj"][0], block.attn_norm(x))
    assert all(type(block.get_submodule(name)) is Linear for name in LINEARS)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("inputs", [None, INT8_TOKEN])
def test_rounded_blocks_compute_the_product(model, low_rank, inputs) -> None:
    """A rounded layer in a block is `QuantizedWeight.product`, to the last digits of fp32."""
    weight = tensors_of(model, 0)["mlp.down_proj.weight"]
    more = {"up_NR": torch.randn(64, 2) / 9, "down_RD": torch.randn(2, weight.shape[1]) / 9} if low_rank else {}
    quantized = QuantizedWeight(round_to_nearest(weight, INT8), inputs, **more)
    block = round_block(build_block(SPEC, 0, tensors_of(model, 0), CPU), {"mlp.down_proj": quantized})
    x = torch.randn(5, weight.shape[1])
    torch.testing.assert_close(block.mlp.down_proj(x), quantized.product(x), rtol=1e-5, atol=1e-5)
    y = x @ weight.t()
    expected = float((quantized.product(x) - y).norm() / y.norm())
    assert output_error(weight, quantized, x, x) == pytest.approx(expected, rel=1e-3)


def test_scores_are_those_of_whole_models(model, tmp_path) -> None:
    """KL and perplexity that fall out of the walk equal those of the two models side by side."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 96, (4, 12), generator=draw)
    targets = torch.cat([ids[:, 1:], torch.full((4, 1), -100)], 1)
    text = Sequences(torch.randint(0, 96, (100, 12), generator=draw), ids, targets, None)
    parameters = dict(model.named_parameters())
    kept = {}
    job = Job(
        SPEC,
        QuantConfig.preset("int4_gptq", weights="int4_g32", samples=6, seq_len=12),
        lambda name: parameters[name].detach(),
        text,
        tmp_path,
        CPU,
    )
    found = Walk(job).run(lambda part, tensors: kept.update(tensors), lambda size, note: None)
    small = empty_model(SPEC, torch.float32, CPU)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            value = kept[name]
            parameter.copy_(value.dequantize() if isinstance(value, QuantizedWeight) else value)
        truth, now = (m.logits(hidden(m, ids)).double().log_softmax(-1) for m in (model, small))
    scored = targets.flatten() != -100
    kl = (truth.exp() * (truth - now)).sum(-1)[scored].mean()
    assert found.after.kl().value == pytest.approx(float(kl), rel=1e-4)
    nll = -now[scored].gather(1, targets.flatten()[scored][:, None]).mean()
    assert found.after.nll().value == pytest.approx(float(nll), rel=1e-5)
    assert found.rounded.kl().value > 1.2 * found.after.kl().value  # GPTQ helps, even on random weights
    assert len(found.rows) == 7 * SPEC.num_hidden_layers


def test_sensitivity_leaves_the_model_as_it_was(model) -> None:
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(2))
    formats = candidates(QuantConfig(weights="int4_g32"))
    assert formats == ["int3_g32", "int4_g32", "int5_g32", "int6_g32", "int8_g32"]
    damage, bits = measure_damage(model, ids, formats)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    for layer, found in damage.items():
        assert list(found.values()) == sorted(found.values(), reverse=True), layer
        assert found["int3_g32"] > 0
    assert bits["layers.0.mlp.up_proj"] == {f"int{n}_g32": n + 0.5 for n in (3, 4, 5, 6, 8)}
