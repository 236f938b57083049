from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

import puna
from puna.base.config import build, to_toml
from puna.base.console import PunaError
from puna.train.recipe import Recipe
from puna.weights import checkpoint, folder


def test_every_flipped_bit_is_found(recipe) -> None:
    puna.train(recipe, {"train.steps": 1})
    save = checkpoint.list_steps(__import__("pathlib").Path(recipe["out"]))[-1]
    assert checkpoint.verify(save) == []
    for file in sorted(p for p in save.rglob("*") if p.is_file() and p.name != checkpoint.MANIFEST):
        data = bytearray(file.read_bytes())
        place = len(data) // 3
        data[place] ^= 0x10
        file.write_bytes(data)
        assert checkpoint.verify(save) == [str(file.relative_to(save))]
        data[place] ^= 0x10
        file.write_bytes(data)
    (save / "config.json").unlink()
    assert checkpoint.verify(save) == ["config.json"]


@pytest.mark.parametrize("keep", [1, 2, 0])
def test_keep_last(recipe, keep) -> None:
    puna.train(recipe, {"train.steps": 12, "checkpoint.every": 3, "checkpoint.keep_last": keep})
    names = sorted(name for name in os.listdir(recipe["out"]) if name.startswith("step-"))
    assert names == [f"step-{n:06d}" for n in (3, 6, 9, 12)][-keep or None :]


def test_a_full_disk_keeps_the_previous_save(recipe, monkeypatch) -> None:
    """The disk fills up in the middle of the second save's weights."""
    real, calls = folder.save_file, []

    def save_then_fill(tensors, path, metadata):
        calls.append(path)
        if len(calls) > 2:
            open(path, "wb").write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(folder, "save_file", save_then_fill)
    with pytest.raises(PunaError, match=r"disk is full while writing .*step-000010"):
        puna.train(recipe)
    assert os.readlink(f"{recipe['out']}/latest") == "step-000005"
    assert sorted(n for n in os.listdir(recipe["out"]) if "step" in n) == ["step-000005"]
    monkeypatch.setattr(folder, "save_file", real)
    assert puna.train(recipe)["step"] == 24


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk(recipe, tmp_path) -> None:
    """The same on a 3 MB tmpfs, through the command line: exit code 2, and the run goes on once there is space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    try:
        file = tmp_path / "r.toml"
        file.write_text(to_toml(build(Recipe, {**recipe, "out": str(disk / "run")})))
        command = [sys.executable, "-m", "puna", "train", str(file), "--checkpoint.keep_last", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert "the disk is full while writing" in done.stderr
        assert "free some space" in done.stderr
        assert "Traceback" not in done.stderr
        assert checkpoint.verify(disk / "run" / "latest") == []
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_leftovers_of_a_killed_save_are_removed(recipe) -> None:
    puna.train(recipe, {"train.steps": 5})
    run = recipe["out"]
    os.makedirs(f"{run}/.step-000010.tmp/state")
    os.makedirs(f"{run}/step-000009")  # no manifest: not a save
    assert puna.train(recipe)["step"] == 24
    assert not os.path.exists(f"{run}/.step-000010.tmp")
