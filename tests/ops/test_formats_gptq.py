"""ops/formats/gptq.py and awq.py: the words are those of slow loops written from the layouts' description."""

from __future__ import annotations

import pytest
import torch

from puna.base.console import PunaError
from puna.ops.formats import rounding
from puna.ops.formats.awq import from_awq, to_awq
from puna.ops.formats.gptq import from_gptq, to_gptq
from puna.ops.formats.packed import pack, round_to_nearest
from puna.ops.formats.scheme import FLOAT8, INT4, Scheme


def signed(word):
    return word - 2**32 if word >= 2**31 else word


def loop_words(codes, bits):
    """Unsigned codes down a list -> int32 words, the way AutoGPTQ's loops do it: three bits by its special cases."""
    words = []
    if bits != 3:
        count = 32 // bits
        for start in range(0, len(codes), count):
            words.append(sum(codes[start + i] << (bits * i) for i in range(count)))
        return [signed(word) for word in words]
    for start in range(0, len(codes), 32):
        c = codes[start : start + 32]
        first = sum(c[j] << (3 * j) for j in range(10)) | (c[10] & 3) << 30
        second = (c[10] >> 2) & 1 | sum(c[11 + j] << (3 * j + 1) for j in range(10)) | (c[21] & 1) << 31
        third = (c[21] >> 1) & 3 | sum(c[22 + j] << (3 * j + 2) for j in range(10))
        words += [first, second, third]
    return [signed(word) for word in words]


def loop_gptq(packed, version):
    """(qweight, qzeros) as nested lists."""
    bits, middle = packed.scheme.bits, 2 ** (packed.scheme.bits - 1)
    unsigned = packed.codes().int() + middle
    columns = [loop_words(row, bits) for row in unsigned.tolist()]  # one list of words per output
    zeros = torch.zeros_like(packed.scales, dtype=torch.int32) if packed.zeros is None else packed.zeros.int()
    stored = ((zeros + middle - (1 if version == 1 else 0)) & (2 * middle - 1)).t()
    return torch.tensor(columns).t().tolist(), [loop_words(group, bits) for group in stored.tolist()]


CASES = [
    Scheme(bits, "int", symmetric, granularity, size)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for granularity, size in (("channel", 0), ("group", 32))
]


@pytest.mark.parametrize("scheme", CASES, ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_words_and_round_trip(scheme, version):
    packed = round_to_nearest(torch.randn(32, 96), scheme, torch.float16)
    tensors = to_gptq(packed, version)
    qweight, qzeros = loop_gptq(packed, version)
    assert tensors["qweight"].tolist() == qweight
    assert tensors["qzeros"].tolist() == qzeros
    assert tensors["scales"].dtype is torch.float16
    assert torch.equal(tensors["scales"], packed.scales.t())
    assert tensors["g_idx"].tolist() == [c // (scheme.group_size or 96) for c in range(96)]
    again = from_gptq(tensors, scheme.bits, scheme.group_size or -1, version)
    assert again.scheme == scheme
    assert again.group_of_D is None
    assert torch.equal(again.data, packed.data)
    assert torch.equal(again.dequantize(), packed.dequantize())


@pytest.mark.parametrize("version", [1, 2])
def test_every_zero_point_survives(version):
    zeros = torch.arange(-8, 8, dtype=torch.int8).repeat(2)[:, None].contiguous()
    packed = pack(torch.zeros(32, 8, dtype=torch.int8), Scheme(4, "int", False), torch.ones(32, 1).half(), zeros)
    assert torch.equal(from_gptq(to_gptq(packed, version), 4, -1, version).zeros, zeros)


def test_symmetric_zero_points_are_sevens_in_version_1():
    tensors = to_gptq(round_to_nearest(torch.randn(8, 128), INT4, torch.float16), 1)
    assert tensors["qzeros"].tolist() == [[0x77777777]]


def test_act_order():
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    scheme = Scheme(4, "int", True, "group", 32)
    packed = pack(codes, scheme, torch.rand(16, 2).half() + 0.1, None, order.int())
    tensors = to_gptq(packed)
    assert tensors["g_idx"].tolist() == order.tolist()
    again = from_gptq(tensors, 4, 32)
    assert torch.equal(again.group_of_D, order.int())
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_what_gptq_cannot_hold():
    for scheme, match in (
        (FLOAT8, "float of 8 bits"),
        (Scheme(5), "int of 5 bits"),
        (Scheme(granularity="tensor"), "per tensor"),
    ):
        with pytest.raises(PunaError, match=match):
            to_gptq(round_to_nearest(torch.randn(32, 32), scheme))
    with pytest.raises(PunaError, match="32 x 20 does not fill"):
        to_gptq(round_to_nearest(torch.randn(32, 20), Scheme(4)))
    with pytest.raises(PunaError, match="1 of 32 scales do not fit fp16"):
        w = torch.randn(32, 32)
        w[3] *= 1e7
        to_gptq(round_to_nearest(w, Scheme(4)))


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "g_idx"])
def test_damaged_tensors_are_refused(name):
    good = to_gptq(round_to_nearest(torch.randn(32, 128), INT4, torch.float16))
    with pytest.raises(PunaError, match="missing"):
        from_gptq({n: t for n, t in good.items() if n != name}, 4, 128)
    with pytest.raises(PunaError, match="shape"):
        from_gptq({**good, name: good[name][..., :-1]}, 4, 128)
    with pytest.raises(PunaError, match="g_idx"):
        from_gptq({**good, "g_idx": good["g_idx"] + 1}, 4, 128)


# --- AutoAWQ --------------------------------------------------------------------------------------------------------


def loop_awq(codes):
    """Unsigned codes (rows, outputs) -> words: nibble i of a word is output order[i], as AutoAWQ's packer writes."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return [
        [signed(sum(row[start + order[i]] << 4 * i for i in range(8))) for start in range(0, len(row), 8)]
        for row in codes.tolist()
    ]


@pytest.mark.parametrize("scheme", [INT4, Scheme(4, "int", False, "group", 32), Scheme(4, "int", False)], ids=str)
def test_awq_words_and_round_trip(scheme):
    packed = round_to_nearest(torch.randn(24, 128), scheme, torch.float16)
    tensors = to_awq(packed)
    zeros = torch.zeros_like(packed.scales) if packed.zeros is None else packed.zeros
    assert tensors["qweight"].tolist() == loop_awq(packed.codes().t().int() + 8)
    assert tensors["qzeros"].tolist() == loop_awq(zeros.t().int() + 8)
    assert torch.equal(tensors["scales"], packed.scales.t())
    again = from_awq(tensors)
    assert torch.equal(again.data, packed.data)
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert again.scheme.symmetric == scheme.symmetric


def test_awq_formula():
    """w = (q - z) s on unsigned codes, read with nothing but the loop's order."""
    packed = round_to_nearest(torch.randn(8, 32), Scheme(4, "int", False, "group", 32), torch.float16)
    tensors = to_awq(packed)
    place = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
    for n in range(8):
        z = (tensors["qzeros"][0, 0].item() >> 4 * place[n]) & 15
        for c in range(32):
            q = (tensors["qweight"][c, 0].item() >> 4 * place[n]) & 15
            assert (q - z) * tensors["scales"][0, n].float() == packed.dequantize()[n, c]


def test_what_awq_cannot_hold():
    with pytest.raises(PunaError, match="int of 8 bits"):
        to_awq(round_to_nearest(torch.randn(8, 32), Scheme()))
    with pytest.raises(PunaError, match="this weight is 12 x 32"):
        to_awq(round_to_nearest(torch.randn(12, 32), Scheme(4)))
    packed = round_to_nearest(torch.randn(8, 128), INT4)
    mixed = pack(packed.codes(), packed.scheme, packed.scales, None, torch.zeros(128, dtype=torch.int32))
    with pytest.raises(PunaError, match="act-order"):
        to_awq(mixed)
    good = to_awq(packed)
    with pytest.raises(PunaError, match="do not go with"):
        from_awq({**good, "qzeros": good["qzeros"][:, :0]})
    with pytest.raises(PunaError, match="missing"):
        from_awq({n: t for n, t in good.items() if n != "scales"})


def test_gptq_scales_lose_nothing_when_chosen_in_half():
    w = torch.randn(32, 128)
    scales, _ = rounding.choose_scales(w, INT4, dtype=torch.float16)
    packed = pack(rounding.quantize(w, INT4, scales), INT4, scales)
    assert torch.equal(from_gptq(to_gptq(packed), 4, 128).dequantize(), packed.dequantize())
