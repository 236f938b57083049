"""ops/native/kblocks: the bytes of the twin in torch, at every instruction set, and memory that stays bounded."""

from __future__ import annotations

import pytest
import torch

from puna.ops.formats.gguf import TYPES, dequantize_gguf, quantize_gguf
from puna.ops.native import kblocks

pytestmark = pytest.mark.skipif(kblocks._KERNEL is None, reason="the native kernels are not built")
K = ["Q4_K", "Q5_K", "Q6_K"]
HEAVY = torch.distributions.StudentT(2.0)


def draws(kind: str) -> torch.Tensor:
    """Weights as they are, and such as break things: ties, zeros of both signs, sizes near the ends of fp32 and fp16."""
    sizes = 10.0 ** torch.arange(-44, 37, 2).repeat_interleave(2)[:, None]
    holes = torch.where(torch.rand(40, 512) < 0.9, torch.tensor(-0.0), torch.randn(40, 512))
    return {
        "gauss": torch.randn(65, 512) * 0.02,
        "heavy": HEAVY.sample((40, 512)),
        "coarse": torch.randint(-8, 9, (60, 512)) / 4.0,
        "constant": torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -6e4, 3e38])[:, None].expand(7, 512).contiguous(),
        "one sign": torch.rand(40, 512) * torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)[:, None],
        "holes": holes,
        "sizes": torch.randn(len(sizes), 512) * sizes,
    }[kind]


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("name", K)
@pytest.mark.parametrize("kind", ["gauss", "heavy", "coarse", "constant", "one sign", "holes", "sizes"])
def test_bytes_are_the_twins(kind, name, level, monkeypatch) -> None:
    if level > kblocks._native.level:
        pytest.skip("this processor lacks the instructions")
    monkeypatch.setattr(kblocks, "_native", kblocks._native._replace(level=level))
    w = draws(kind)
    for importance in (None, torch.rand(512).pow(3), torch.zeros(512), torch.arange(512) % 2.0):
        native = quantize_gguf(w, name, importance)
        with monkeypatch.context() as patch:
            patch.setattr(kblocks, "serves", lambda *_: False)
            assert torch.equal(native, quantize_gguf(w, name, importance))


@pytest.mark.parametrize("name", K)
def test_pieces_threads_and_dtypes(name, monkeypatch) -> None:
    """The result depends on neither; importance follows the columns through every cut."""
    w, importance = torch.randn(130, 768), torch.rand(768)
    whole = quantize_gguf(w, name, importance)
    monkeypatch.setattr("puna.ops.formats.gguf._NATIVE_PIECE", 256 * 7)
    assert torch.equal(quantize_gguf(w, name, importance), whole)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(quantize_gguf(w, name, importance), whole)
    monkeypatch.undo()
    for row in (0, 64, 129):
        assert torch.equal(quantize_gguf(w[row], name, importance), whole[row])
    assert torch.equal(quantize_gguf(w.bfloat16(), name), quantize_gguf(w.bfloat16().float(), name))
    assert torch.equal(quantize_gguf(w.t().contiguous().t(), name, importance), whole)
    assert torch.equal(quantize_gguf(torch.nn.Parameter(w), name, importance), whole)
    assert quantize_gguf(torch.empty(0, 256), name).shape == (0, TYPES[name].bytes)


def test_who_is_served() -> None:
    w = torch.randn(1, 256)
    assert kblocks.serves(w)
    assert not kblocks.serves(w.to("meta"))
    with torch.autocast("cpu"):
        assert not kblocks.serves(w)
    back = dequantize_gguf(quantize_gguf(w, "Q6_K"), "Q6_K")
    assert (back - w).square().mean().sqrt() < 0.02
