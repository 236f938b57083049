"""model/linear.py: a quantized layer stands where a plain one stood."""

from __future__ import annotations

import copy

import pytest
import torch

from puna.model.linear import Linear, QuantizedLinear, apply_all
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import round_to_nearest
from puna.ops.formats.scheme import INT8_TOKEN, Scheme
from puna.quant.config import parse_format


def layer(text="int4_g32", outputs=24, inputs=64, bias=True, dtype=torch.float32, **more) -> QuantizedLinear:
    packed = round_to_nearest(torch.randn(outputs, inputs), parse_format(text), torch.float16)
    return QuantizedLinear(QuantizedWeight(packed, **more), torch.randn(outputs) if bias else None, dtype)


def plain(outputs=24, inputs=64) -> Linear:
    made = Linear(inputs, outputs, bias=True)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_forward_is_the_products(rows):
    for text in ("int4_g32", "int8", "fp8", "int3_g32_asym"):
        one = layer(text)
        x = torch.randn(rows, 64)
        torch.testing.assert_close(one(x), one.weight.product(x, one.bias), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(one(x), x @ one.dequantize().t() + one.bias, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_group_may_be_mixed(rows):
    quantized, others = (layer(), layer("int8", 8)), (plain(), plain(8))
    x = torch.randn(rows, 64)
    for layers in (quantized, others, (*quantized, *others), (*others, *quantized), (quantized[0], others[0])):
        for y, one in zip(apply_all(layers, x), layers, strict=True):
            assert torch.equal(y, one(x))


def test_gradient_reaches_x_and_lora_on_top():
    one, x = layer(), torch.randn(3, 64)
    down, up = (torch.randn(s, requires_grad=True) for s in ((64, 2), (2, 24)))
    hidden = (x @ torch.eye(64).requires_grad_()).requires_grad_()
    hidden.retain_grad()
    (one(hidden) + hidden @ down @ up).sum().backward()
    expected = (one.dequantize() + (down @ up).t()).sum(0).expand(3, -1)
    torch.testing.assert_close(hidden.grad, expected.detach(), rtol=1e-4, atol=1e-3)
    assert list(one.parameters()) == []


def test_what_it_says_of_itself():
    one = layer("int4_g32", bias=False)
    assert one.bits_per_weight == 4.5
    assert one.nbytes == 24 * 64 * 4.5 / 8
    assert "4.50 bits" in repr(one)
    assert one.kernel in repr(one)
    assert one.bias is None


def test_a_dtype_changes_activations_and_no_number_of_the_weight():
    for text in ("int4_g32", "fp8", "int3_g32"):
        one = layer(text)
        before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
        model = torch.nn.Sequential(one).to(torch.bfloat16)
        assert one.product.dtype is torch.bfloat16
        assert model(torch.randn(2, 64).bfloat16()).dtype is torch.bfloat16
        for name, tensor in one.state_dict().items():
            if name != "bias":
                assert tensor.dtype is before[name].dtype
                assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    product = one.product
    assert one.to("cpu").product is product  # nothing to do


def test_to_meta_and_its_shape():
    one = layer().to("meta")
    assert one.product.device.type == "meta"
    assert one(torch.empty(3, 64, device="meta")).shape == (3, 24)


@pytest.mark.parametrize("text", ["int4_g32_asym", "int3_g32", "int8", "fp8"])
def test_state_goes_round(text):
    low = {"up_NR": torch.randn(24, 2), "down_RD": torch.randn(2, 64)}
    static = {"activations": Scheme(granularity="tensor"), "input_scale": torch.tensor([0.03])}
    first, second = layer(text, **low, **static), layer(text, **low, **static)
    x = torch.randn(5, 64)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    assert torch.equal(first(x), second(x))
    assert {"data", "scales", "input_scale", "up_NR", "down_RD", "bias"} <= set(first.state_dict())


def test_state_that_does_not_fit_is_refused():
    one = layer("int8")
    state = one.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*scales"):
        one.load_state_dict({name: tensor for name, tensor in state.items() if name != "scales"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        one.load_state_dict(state | {"weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"data: .*3, 64"):
        one.load_state_dict(state | {"data": torch.zeros(3, 64, dtype=torch.int8)})


def test_a_copy_is_a_layer_of_its_own():
    one, x = layer(), torch.randn(2, 64)
    other, expected = copy.deepcopy(one), one(x)
    one.weight.packed.data.zero_()
    assert torch.equal(other(x), expected)


def quantize(model: Transformer, text: str, dtype: torch.dtype, **more) -> None:
    """Every linear layer of a model in place, the head too."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            packed = round_to_nearest(module.weight.detach().float(), parse_format(text), torch.float16)
            bias = None if module.bias is None else module.bias.detach()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(QuantizedWeight(packed, **more), bias, dtype))


@pytest.mark.parametrize("text", ["int4_g32", "int8", "fp8"])
def test_prefill_and_decode_agree_in_a_model_with_a_quantized_head(text):
    """12 tokens at once, by the kernel for many rows, and row by row, by the one for few: log-probabilities to 1e-5."""
    spec = Spec.preset("debug").replace(tie_word_embeddings=False)
    model = Transformer(spec)
    model.init_weights(torch.Generator().manual_seed(0))
    quantize(model, text, torch.float32, activations=INT8_TOKEN if text == "int8" else None)
    assert isinstance(model.lm_head, QuantizedLinear)
    tokens, positions = torch.randint(0, spec.vocab_size, (12,)), torch.arange(12)
    with torch.no_grad():
        hidden = model(tokens, positions, PackedCausal.of([12]))
        together = model.logits(hidden).log_softmax(-1)
        by_row = torch.cat([model.logits(row) for row in hidden.split(1)]).log_softmax(-1)
        short = model(tokens[:5], positions[:5], PackedCausal.of([5]))
    torch.testing.assert_close(by_row, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model.logits(short).log_softmax(-1), together[:5], rtol=0, atol=1e-4 if text == "int8" else 1e-5
    )
    torch.testing.assert_close(model.head_weight, model.lm_head.dequantize())
    torch.testing.assert_close(together, model.lm_head(hidden).log_softmax(-1))
    if text != "int8":  # there the inputs are rounded too
        torch.testing.assert_close(together, (hidden @ model.head_weight.t()).log_softmax(-1), rtol=0, atol=1e-5)
