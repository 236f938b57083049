"""benchmarks/chaos.py with a few kills: a job of four ranks that is killed at random ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


def suffer(tmp_path: Path, *options: str, seconds: int) -> dict:
    """The program's report; it fails where a run did not come back whole."""
    result = tmp_path / "chaos.json"
    command = [sys.executable, str(PROGRAM), "--result", str(result), *options]
    env = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    return json.loads(result.read_text())["meshes"]


@pytest.mark.slow  # three minutes; test_launch.py kills once per way of starting
@pytest.mark.timeout(400)
def test_six_kills_change_nothing(tmp_path) -> None:
    found = suffer(tmp_path, "--kills", "6", "--only", "dp_shard 2 x tp 2", seconds=360)["dp_shard 2 x tp 2"]
    assert found["kills"] == {"one rank": 2, "in a save": 2, "all ranks": 1, "torchrun": 1}
    assert found["rounds"] >= 1
    assert found["restarts"] >= 5


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifty_kills_a_full_disk_and_a_lost_store(tmp_path) -> None:
    found = suffer(tmp_path, "--kills", "50", seconds=1400).values()
    assert sum(sum(mesh["kills"].values()) for mesh in found) >= 51
    assert all(mesh["rounds"] for mesh in found)
