"""Boxes of cut tensors: on four and two ranks, in one launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel import ranks
from parallel.pieces_checks import SHAPES, WORLDS

CHECKS = [f"{check.__name__}@{world}" for world, checks in WORLDS.items() for check in checks]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return ranks.run(Path(__file__).with_name("pieces_checks.py"))


@pytest.mark.parametrize("name", CHECKS)
def test_on_ranks(report: dict[str, Any], name: str) -> None:
    assert report[name]["ok"], report[name]["error"]


def test_every_kind_of_cut_was_compared(report: dict[str, Any]) -> None:
    matrices = sum(len(shape) > 1 for shape in SHAPES)
    cuts = 3 + 4 + 1 + 2 * 4  # a line, a square, two meshes of their own; FSDP2's, twice for offloading
    assert report["boxes_are_what_ranks_hold@4"]["result"] == len(SHAPES) * cuts + 2 * matrices
    assert report["boxes_are_what_ranks_hold@2"]["result"] == len(SHAPES) * (3 + 2)
