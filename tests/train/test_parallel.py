"""`puna train` on a mesh: every step's loss, norm and validation, and the saved folder, are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel import ranks

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return ranks.run(Path(__file__).with_name("parallel_checks.py"), timeout=250)


def _names() -> list[str]:
    """Of the checks, without running the file that makes their data."""
    import ast

    tree = ast.parse(Path(__file__).with_name("parallel_checks.py").read_text())
    worlds = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "WORLDS")
    return [
        f"{call.args[0].value}@{key.value}"
        for key, calls in zip(worlds.keys, worlds.values, strict=True)
        for call in calls.elts
        if isinstance(call, ast.Call)
    ]


@pytest.mark.parametrize("name", _names())
def test_equals_one_process(report: dict[str, Any], name: str) -> None:
    assert report[name]["ok"], report[name]["error"]
    found, expected = report[name]["result"], report["reference@1"]["result"]
    for key in ("loss", "grad_norm", "val_loss"):
        assert found[key] == pytest.approx(expected[key], rel=TOLERANCE, abs=TOLERANCE), key
    assert len(found["loss"]) == 3
    assert len(found["val_loss"]) == 2
    assert found["weights"] <= TOLERANCE
