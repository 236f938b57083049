"""Transfers hidden behind products, on four and two ranks in one launch; one rank by itself needs no partner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel import ranks
from parallel.overlap_checks import WORLDS

CHECKS = [f"{check.__name__}@{world}" for world, checks in WORLDS.items() for check in checks]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return ranks.run(Path(__file__).with_name("overlap_checks.py"))


@pytest.mark.parametrize("name", CHECKS)
def test_on_ranks(report: dict[str, Any], name: str) -> None:
    assert report[name]["ok"], report[name]["error"]
