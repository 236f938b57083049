"""Compiled blocks: the eager model's numbers, one graph for all layers, and eager steps in where compiling fails."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from puna.engine.compiled import SIZES, Compiled
from puna.engine.native_step import why_not
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.paged import PagedCausal, Pages

LAYERS = 10  # more than dynamo's recompile_limit of 8


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def model_of(layers: int) -> Transformer:
    spec = Spec.load("preset:debug")
    spec = dataclasses.replace(spec, num_hidden_layers=layers, sliding_windows=(None,) * layers)
    model = Transformer(spec)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def hidden(forward, attend, rows: int) -> torch.Tensor:
    with torch.inference_mode():
        return forward(torch.arange(rows) * 7 % 512, torch.arange(rows), attend)


def test_all_layers_share_their_graphs() -> None:
    """With a graph per layer the ninth would be eager for ever, and nobody would be told."""
    few, many = CompileCounter(), CompileCounter()
    for layers, counter in ((2, few), (LAYERS, many)):
        torch._dynamo.reset()
        model = model_of(layers)
        compiled = Compiled(model, counter)
        for rows in (97, 40):
            attend = PackedCausal.of([rows])
            difference = (hidden(compiled, attend, rows) - hidden(model, attend, rows)).abs().max()
            assert difference < 1e-5
        assert not compiled.failure
    assert 0 < many.frame_count == few.frame_count
    assert not counters["unimplemented"]


@pytest.mark.slow
def test_warm_up_leaves_nothing_to_compile() -> None:
    counter = CompileCounter()
    compiled = Compiled(model_of(2), counter)
    compiled.warm_up()
    before = counter.frame_count
    pages = Pages.of(2, 2, 16, 40)
    for rows in (1, 2, 5, 8, 9, 64, 200):
        hidden(compiled, PagedCausal.of(pages, [(range(1, 21), 0, rows)], 512), rows)
    assert counter.frame_count == before > 0


def test_it_reads_and_writes_pages_like_the_model() -> None:
    model = model_of(2)
    compiled = Compiled(model, "eager")
    found = []
    for forward in (model, compiled):
        pages = Pages.of(2, 2, 16, 8)
        pages.keys.zero_()  # rows that nobody writes are compared as well
        for start, rows in ((0, 20), (20, 12)):
            attend = PagedCausal.of(pages, [([1, 2], start, rows)], 512)
            with torch.inference_mode():
                out = forward(torch.arange(rows) * 3, torch.arange(start, start + rows), attend)
        found.append((out, pages.keys[:, 1:3].clone()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    """It may be in training, and its native step asks that nobody has changed it."""
    model = model_of(2)
    pages = Pages.of(2, 2, 16, 4)
    before = why_not(model, pages)
    compiled = Compiled(model, "eager")
    hidden(compiled, PackedCausal.of([9]), 9)
    assert why_not(model, pages) == before
    assert all(block._compiled_call_impl is None for block in model.layers)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight.zero_()  # parameters are shared: training goes on under it
    attend = PackedCausal.of([9])
    torch.testing.assert_close(hidden(compiled, attend, 9), hidden(model, attend, 9), rtol=0, atol=1e-5)


def test_a_failing_compiler_is_said_once_and_answers_go_on(capsys) -> None:
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler here\nand a long trace")

    model = model_of(2)
    compiled = Compiled(model, broken)
    attend = PackedCausal.of([12])
    for _ in range(3):
        assert torch.equal(hidden(compiled, attend, 12), hidden(model, attend, 12))
    said = capsys.readouterr().err
    assert said.count("torch.compile failed") == 1
    assert "no C++ compiler here" in said
    assert "long trace" not in said


def test_errors_of_the_model_itself_are_not_hidden() -> None:
    compiled = Compiled(model_of(2), "eager")
    with pytest.raises(IndexError), torch.inference_mode():
        compiled(torch.tensor([9999]), torch.tensor([0]), PackedCausal.of([1]))
    assert not compiled.failure


@pytest.mark.slow
def test_inductor_gives_the_same_logprobs() -> None:
    model = model_of(LAYERS)
    compiled = Compiled(model)
    compiled.warm_up(SIZES)
    assert not compiled.failure
    for rows in (1, 6, 70):
        attend = PackedCausal.of([rows])
        with torch.inference_mode():
            both = [model.logits(hidden(each, attend, rows)).log_softmax(-1) for each in (model, compiled)]
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-5)
