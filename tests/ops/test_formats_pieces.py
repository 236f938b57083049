"""ops/formats/pieces.py: every row once, whoever works on it; gradients, inference mode and fake tensors."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from puna.ops.formats import rounding
from puna.ops.formats.pieces import PIECE, for_each_piece
from puna.ops.formats.scheme import INT8


@pytest.mark.parametrize("rows", [0, 1, 29, 30, 31, 1000])
def test_every_row_once(rows):
    seen = torch.zeros(rows, dtype=torch.int)
    names = set()

    def work(part):
        seen[part] += 1
        names.add(threading.current_thread().name)
        assert not torch.is_grad_enabled()
        assert (part.stop - part.start) * 1024 <= PIECE

    for_each_piece(torch.empty(rows, 1024), work)
    assert (seen == 1).all()
    assert (threading.main_thread().name in names) == (0 < rows <= 30)


def test_an_error_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        for_each_piece(torch.empty(1000, 1024), lambda part: 1 // (part.start - 900))


def test_inference_mode_and_gradients():
    w = torch.randn(1000, 1024, requires_grad=True)
    expected = rounding.quantize(w.detach(), INT8, *rounding.choose_scales(w.detach(), INT8))
    scales, _ = rounding.choose_scales(w, INT8)
    assert not scales.requires_grad
    assert torch.equal(rounding.quantize(w, INT8, scales), expected)
    with torch.inference_mode():
        scales, _ = rounding.choose_scales(w, INT8)
        assert torch.equal(rounding.quantize(w, INT8, scales), expected)


def test_fake_tensors_keep_to_their_thread():
    with FakeTensorMode():
        w = torch.empty(1000, 1024)
        scales, _ = rounding.choose_scales(w, INT8)
        codes = rounding.quantize(w, INT8, scales)
    assert codes.shape == (1000, 1024)
    assert scales.shape == (1000, 1)
