"""Killed with SIGKILL at random moments and resumed: the loss sequence is bit-identical to an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from puna.base.config import build, to_toml
from puna.train.recipe import Recipe
from puna.weights.checkpoint import verify

KILLS = 10
STEPS = 200


def launch(recipe: dict, out: Path) -> subprocess.Popen:
    file = out.with_suffix(".toml")
    file.write_text(to_toml(build(Recipe, {**recipe, "out": str(out)})))
    command = [sys.executable, "-m", "puna", "train", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)


def losses(out: Path) -> dict[int, float]:
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        if line.endswith("}"):  # the last line may be cut by the kill
            row = json.loads(line)
            found[row["step"]] = row["loss"]
    return found


def kill_after(process: subprocess.Popen, lines: int, pause: float) -> None:
    """SIGKILL a little after the process has printed so many lines."""
    assert process.stderr is not None
    for _ in range(lines):
        if not process.stderr.readline():
            break
    try:
        process.wait(pause)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.stderr.close()
    process.wait(30)


def kill_while_saving(process: subprocess.Popen, out: Path, lines: int) -> None:
    """SIGKILL the moment a save is being written."""
    assert process.stderr is not None
    for _ in range(lines):
        process.stderr.readline()
    while process.poll() is None:
        if any(name.endswith(".tmp") and "step-" in name for name in os.listdir(out)):
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    process.wait(30)


def test_ten_kills_change_nothing(recipe, tmp_path) -> None:
    recipe |= {"train": {"steps": STEPS, "batch_size": 2}, "checkpoint": {"every": 4},
               "validation": {"every": 50, "max_tokens": 64}}  # fmt: skip
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    process = launch(recipe, plain)
    assert process.stderr is not None
    process.stderr.read()
    assert process.wait(120) == 0
    expected = losses(plain)
    assert sorted(expected) == list(range(1, STEPS + 1))

    draw = random.Random(1)
    seen_mid_save = 0
    for number in range(2 * KILLS):
        if number >= KILLS and seen_mid_save:
            break
        before = losses(broken) if (broken / "metrics.jsonl").exists() else {}
        lines = 10 + draw.randrange(20)
        if number % 2 or number >= KILLS:  # until a save was really hit
            kill_while_saving(launch(recipe, broken), broken, lines)
        else:
            kill_after(launch(recipe, broken), lines, draw.random() * 0.03)
        after = losses(broken)
        assert all(expected[step] == loss for step, loss in (before | after).items())
        seen_mid_save += bool(list(broken.glob(".step-*")))
        if (broken / "latest").exists():
            assert verify(broken / "latest") == []  # never a half-written folder
    assert seen_mid_save >= 1  # a half-written save was left behind, and did no harm
    process = launch(recipe, broken)
    assert process.stderr is not None
    process.stderr.read()
    assert process.wait(120) == 0
    assert losses(broken) == expected
    assert not list(broken.glob(".*"))
    weights = [(run / "latest" / "model.safetensors").read_bytes() for run in (plain, broken)]
    assert weights[0] == weights[1]
