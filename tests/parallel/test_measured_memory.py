"""The plan's memory against what processes really hold: two ranks on this machine, a small model, one launch a case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "measure_memory.py"
CASES = ("zero 3", "tp 2 full")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux resets a process's peak")
def test_peaks_are_as_planned(tmp_path) -> None:
    """Within 10%, as the issue asks. Measured so far: 2 to 6% more than planned, by gloo's buffers and malloc's pages."""
    words = [word for case in CASES for word in ("--case", case)]
    command = [sys.executable, PROGRAM, "--small", *words, "--out", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())["bytes"]
    assert {case: found[case] for case in CASES if abs(found[case]["error"]) > 0.1} == {}
    assert found["zero 3"]["measured"] > 2**28  # enough for buffers and pages to be small beside it
