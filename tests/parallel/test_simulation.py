"""The plan's memory against puna's own step on fake tensors, as one rank of 64 and more runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "simulate_memory.py"
# Among them each moment is the fullest once: the loss (zero 2), the second block's backward (full), the last block's
# (one), the first's (selective, tp).
CASES = ("8b full", "8b zero 2 twice", "8b one", "70b dp 8 tp 8")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("simulation") / "found.json"
    words = [word for case in CASES for word in ("--case", case)]
    command = [sys.executable, PROGRAM, *words, "--layers", "3", "4", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())["cases"]


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_the_simulated_one(found, case: str) -> None:
    """The issue asks for 10%; the closed form is the same arithmetic, so 2% already tell of a change that it missed."""
    assert abs(found[case]["error"]) < 0.02, found[case]


@pytest.mark.parametrize("case", CASES)
def test_weights_and_moments_are_the_simulated_ones(found, case: str) -> None:
    simulated, planned = found[case]["simulated"], found[case]["planned"]
    for name in ("weights", "optimizer", "step"):
        assert planned[name] == pytest.approx(simulated[name], rel=0.003)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("moment", ["loss", "loss backward", "backward"])
def test_moments_beside_the_peak_are_right_too(found, case: str, moment: str) -> None:
    assert found[case]["planned"][moment] == pytest.approx(found[case]["simulated"][moment], rel=0.02)
