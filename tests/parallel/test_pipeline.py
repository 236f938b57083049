"""Pipelines: stages by themselves in one process, schedules on two, four and eight ranks in one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import ranks
from parallel.apply_checks import samples, whole_model
from parallel.pipeline_checks import FIVE, WORLDS
from puna.ops.attention import PackedCausal
from puna.parallel.pipeline import _autograd_splits
from puna.parallel.schedules import SCHEDULES, default_stages
from puna.parallel.stages import Stage, make_stage, make_stages, owned_stages

CHECKS = [f"{check.__name__}@{world}" for world, checks in WORLDS.items() for check in checks]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    here = Path(__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(here.parent.parent))  # the checks take samples and references from apply_checks
        return ranks.run(here.with_name("pipeline_checks.py"))


@pytest.mark.parametrize("name", CHECKS)
def test_on_ranks(report: dict[str, Any], name: str) -> None:
    assert report[name]["ok"], report[name]["error"]


def in_order(schedule: str, ranks: int) -> list[Stage]:
    each = default_stages(schedule)
    found = {}
    for rank in range(ranks):
        stages = make_stages(FIVE, schedule, rank, ranks, each)
        found.update(zip(owned_stages(schedule, rank, ranks, each), stages, strict=True))
    return [found[index] for index in range(ranks * each)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_make_the_model(schedule: str) -> None:
    """One after another they are the Transformer: its parameters, each once, by the same names, and its output."""
    model, sample = whole_model(FIVE), samples(FIVE.vocab_size)[4]
    weights, stages = model.state_dict(), in_order(schedule, 2)
    names = [name for stage in stages for name in stage.state_dict()]
    assert sorted(names) == sorted(weights)
    hidden, documents = sample.tokens_T, PackedCausal.of(sample.lengths)
    for stage in stages:
        assert all(parameter.is_meta for parameter in stage.parameters())
        stage.load_state_dict({name: weights[name] for name in stage.state_dict()}, assign=True)
        hidden = stage(hidden, sample.positions_T, documents)
    assert torch.equal(hidden, model(sample.tokens_T, sample.positions_T, documents))


def test_a_stage_has_what_it_needs() -> None:
    first, middle, last = (make_stage(FIVE, range(n, n + 2), n == 0, n == 3) for n in (0, 2, 3))
    assert [name for name, _ in middle.named_children()] == ["layers"]
    assert list(middle.layers) == ["2", "3"]
    assert [first.embed is None, middle.embed is None, last.embed is None] == [False, True, True]
    assert [stage.lm_head is None for stage in (first, middle, last)] == [True, True, False]


@pytest.mark.skipif((2, 12) <= torch.__version__ < (2, 13), reason="known of 2.11 and 2.13")
def test_when_torch_can_split() -> None:
    """Were the probe wrong in the one direction, split schedules would fail; in the other, wait as long as others."""
    assert _autograd_splits() is (torch.__version__ >= (2, 13))
    with torch.no_grad():
        assert _autograd_splits() is (torch.__version__ >= (2, 13))


def test_who_owns_which_stage() -> None:
    assert [owned_stages("1f1b", rank, 3, 1) for rank in range(3)] == [[0], [1], [2]]
    assert [owned_stages("interleaved", rank, 2, 3) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [owned_stages("zbv", rank, 3, 2) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
