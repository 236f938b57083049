"""quant/rescale.py: folds change nothing before rounding, and outliers cost little after it."""

from __future__ import annotations

import pytest
import torch

from planted_inputs import correlated_inputs, heavy_weight
from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.formats.activations import dequantize_activation, quantize_activation
from puna.ops.formats.fake import fake_quantize
from puna.ops.formats.scheme import FLOAT8, FLOAT8_TENSOR, FLOAT8_TOKEN, INT8, INT8_TOKEN, Scheme
from puna.quant import rescale
from puna.quant.moments import Moments
from puna.quant.rescale import FOLDS, apply_scale, awq, shared_heads, smooth

INT8_STATIC = Scheme(granularity="tensor")
INT4_G32 = Scheme(4, "int", True, "group", 32)
INT4_CHANNEL = Scheme(4, "int", True, "channel")


def seen(x, **kinds):
    moments = Moments(x.shape[1], "layers.0.attn.q_proj", **kinds)
    moments.add(x)
    return moments


def damage(x, weights, schemes, activations, scale):
    """Squared error of the outputs, with a static scale from these very inputs; written apart from the code's."""
    y = x / scale
    if activations is not None:
        static = y.abs().amax().reshape(1) / activations.half_range if activations.granularity == "tensor" else None
        y = dequantize_activation(*quantize_activation(y, activations, static))
    rounded = [w * scale if s is None else fake_quantize(w * scale, s) for w, s in zip(weights, schemes, strict=True)]
    return sum(float((y @ q.t() - x @ w.t()).square().sum()) for q, w in zip(rounded, weights, strict=True))


@pytest.mark.parametrize("activations", [INT8_TOKEN, INT8_STATIC], ids=["dynamic", "static"])
def test_smooth_repairs_planted_outliers(activations):
    x = correlated_inputs(3000, 128, outliers=4, size=60)
    weights, schemes = [heavy_weight(96, 128), heavy_weight(32, 128, 1)], [INT8, INT8]
    found = smooth(weights, seen(x[:1500]), schemes, activations)
    ones = torch.ones(128)
    before = damage(x[1500:], weights, schemes, activations, ones)
    assert 1 - damage(x[1500:], weights, schemes, activations, found.scale_D) / before > 0.85
    assert found.repaired > 0.85
    half = smooth(weights, seen(x[:1500]), schemes, activations, shares=(0.5,))
    assert half.share == 0.5
    assert half.repaired > 0.8
    assert found.loss <= half.loss
    assert len(found.curve) == 13
    assert found.loss == min(loss for _, loss in found.curve)


def test_scales_are_the_papers():
    x = correlated_inputs(500, 64, outliers=2)
    weights = [heavy_weight(48, 64), heavy_weight(16, 64, 1)]
    stacked = torch.cat(weights).abs()
    in_group = stacked / stacked.unflatten(1, (2, 32)).amax(2, keepdim=True).expand(-1, -1, 32).flatten(1)
    for share in (0.2, 0.7):
        for found, expected in (
            (smooth(weights, seen(x), [INT8, INT8], INT8_TOKEN, shares=(share,)), x.abs().amax(0) ** share / stacked.amax(0) ** (1 - share)),
            (awq(weights, seen(x), [INT4_G32, INT4_G32], shares=(share,)), x.abs().mean(0) ** share / in_group.mean(0) ** (1 - share)),
        ):  # fmt: skip
            assert found.share == share
            expected /= (expected.max() * expected.min()).sqrt()
            torch.testing.assert_close(found.scale_D, expected, rtol=1e-4, atol=0)


def test_awq_repairs_planted_outliers():
    """Columns twenty times as large need its weights more exactly than the group's range gives them."""
    x = correlated_inputs(3000, 128, outliers=4, size=20)
    weights = [heavy_weight(96, 128), heavy_weight(32, 128, 1)]
    for scheme, share in ((INT4_G32, 0.5), (INT4_CHANNEL, 0.5), (Scheme(3, "int", False, "group", 64), 0.5)):
        schemes = [scheme, None]
        found = awq(weights, seen(x[:1500]), schemes)
        before = damage(x[1500:], weights, schemes, None, torch.ones(128))
        assert 1 - damage(x[1500:], weights, schemes, None, found.scale_D) / before > share
        outliers = torch.arange(4) * 32 + 3
        assert found.scale_D[outliers].min() > 2 * found.scale_D.median()


def test_losses_are_the_measured_ones():
    x = correlated_inputs(400, 64, outliers=2)
    weights, schemes = [heavy_weight(48, 64), heavy_weight(16, 64, 1)], [INT4_G32, INT8]
    for activations in (None, INT8_TOKEN, FLOAT8_TENSOR):
        found = awq(weights, seen(x), schemes, activations)
        ones = torch.ones(64)
        assert found.plain_loss == pytest.approx(damage(x, weights, schemes, activations, ones), rel=1e-3)
        assert found.loss == pytest.approx(damage(x, weights, schemes, activations, found.scale_D), rel=1e-3)


def test_identity_when_nothing_is_gained():
    """Weights that are codes already lose nothing by rounding: every other scale would do harm."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (32, 64), generator=generator).float()
    weight[:, ::32], weight[:, 1::32] = -8, 7  # the range of the codes: a scale of exactly 1
    x = correlated_inputs(300, 64, outliers=2)
    found = awq([weight], seen(x), [Scheme(4, "int", False, "group", 32)])
    assert found.share is None
    assert torch.equal(found.scale_D, torch.ones(64))
    assert found.repaired == 0
    assert found.loss == found.plain_loss


@pytest.mark.parametrize("method", [awq, smooth])
def test_scales_are_positive_and_bounded_whatever_comes(method):
    x = correlated_inputs(300, 64, outliers=2, size=1e6)
    x[:, [1, 40]] = 0
    weight = heavy_weight(48, 64)
    weight[:, [2, 41]] = 0
    for activations, scheme in ((INT8_TOKEN, INT8), (FLOAT8_TOKEN, FLOAT8), (INT8_TOKEN, INT4_G32)):
        for shares in ((0.0,), (1.0,), (0.5, 0.7)):
            found = method([weight], seen(x), [scheme], activations, shares=shares)
            assert found.scale_D.isfinite().all()
            assert found.scale_D.min() >= 0.999e-3
            assert found.scale_D.max() <= 1e3
            assert found.loss <= found.plain_loss
            assert all(torch.tensor(found.curve).isfinite().flatten())
    zero = method([torch.zeros(8, 64)], seen(x), [INT8], None)
    assert torch.equal(zero.scale_D, torch.ones(64))
    with pytest.raises(PunaError, match=r"calibration inputs of layers\.0\.attn\.q_proj are 0"):
        method([weight], seen(torch.zeros(9, 64)), [INT8], None)


def model(**changes):
    spec = Spec(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=48, **changes,
    )  # fmt: skip
    net = Transformer(spec)
    net.init_weights(torch.Generator().manual_seed(0))
    for parameter in net.parameters():  # no norm of 1, no bias of 0
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return net


def logits(net):
    tokens = torch.arange(40) * 7 % 64
    with torch.no_grad():
        return net.logits(net(tokens, torch.arange(40), PackedCausal.of([40])))


@pytest.mark.parametrize("fold", FOLDS, ids=lambda f: f.producer)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_folds_keep_the_function(fold, bias):
    net = model(qkv_bias=bias, output_bias=bias, mlp_bias=bias, qk_norm=bias)
    before = logits(net)
    place = net.layers[0]
    tensors = dict(place.state_dict())
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    width = tensors[f"{fold.consumers[0]}.weight"].shape[1]
    scale = torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(1)))
    shared = shared_heads(4, 2, 12) if fold.producer == "attn.v_proj" else None
    if shared is not None:
        scale = scale[shared]
    apply_scale(tensors, fold, scale, shared)
    changed = {name for name in kept if not torch.equal(kept[name], tensors[name])}
    expected = {f"{name}.weight" for name in (fold.producer, *fold.consumers)}
    assert changed == expected | ({f"{fold.producer}.bias"} & set(kept))
    place.load_state_dict(tensors)
    torch.testing.assert_close(logits(net), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert before.std() > 0.1


@pytest.mark.parametrize("method", [awq, smooth])
def test_shared_heads_make_the_scale_foldable(method):
    shared = shared_heads(4, 2, 12)
    assert shared.tolist()[::12] == [0, 0, 12, 12]
    assert shared_heads(4, 4, 12) is None
    net = model()
    tensors = dict(net.layers[0].state_dict())
    x = correlated_inputs(300, 48, outliers=3)
    alone = method([tensors["attn.o_proj.weight"]], seen(x), [INT4_CHANNEL], None)
    with pytest.raises(PunaError, match=r"48 scales cannot move into the 24 rows of attn\.v_proj"):
        apply_scale(tensors, FOLDS[1], alone.scale_D)
    with pytest.raises(PunaError, match="cannot move"):
        apply_scale(tensors, FOLDS[1], alone.scale_D, shared)
    found = method([tensors["attn.o_proj.weight"]], seen(x), [INT4_CHANNEL], None, shared_D=shared)
    assert found.share is not None
    apply_scale(tensors, FOLDS[1], found.scale_D, shared)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales_are_refused(bad):
    tensors = dict(model().layers[0].state_dict())
    scale = torch.ones(32)
    scale[3] = bad
    with pytest.raises(PunaError, match="not all positive"):
        apply_scale(tensors, FOLDS[0], scale)


def test_few_rows_find_as_good_a_scale(monkeypatch):
    """Candidates are tried on every sixth row, in four parts; the losses told are still those of all rows."""
    x = correlated_inputs(400, 64, outliers=2)
    weights, schemes = [heavy_weight(96, 64), heavy_weight(48, 64, 1)], [INT4_G32, FLOAT8_TENSOR]
    whole = awq(weights, seen(x), schemes)
    monkeypatch.setattr(rescale, "_ROWS", 16)
    part = awq(weights, seen(x), schemes)
    assert part.plain_loss == pytest.approx(whole.plain_loss, rel=1e-6)
    assert part.loss == pytest.approx(damage(x, weights, schemes, None, part.scale_D), rel=1e-3)
    assert part.loss < 1.1 * whole.loss < 0.9 * whole.plain_loss
    assert part.curve != whole.curve
