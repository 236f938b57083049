from __future__ import annotations

import errno
import os

import pytest

from puna.base import storage
from puna.base.console import PunaError


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "a.txt"
    storage.write_atomic(file, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PunaError, match="disk is full") as caught:
        storage.write_atomic(file, "new")
    assert "free" in caught.value.message
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_folder_is_absent(tmp_path) -> None:
    with pytest.raises(ValueError, match="boom"), storage.atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        raise ValueError("boom")
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_whole(tmp_path) -> None:
    for text in ("one", "two"):
        with storage.atomic_folder(tmp_path / "out") as folder:
            (folder / text).write_text(text)
    assert os.listdir(tmp_path / "out") == ["two"]
    assert os.listdir(tmp_path) == ["out"]


def test_latest_moves_in_one_step(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        storage.point_latest(tmp_path / "latest", tmp_path / name)
        assert os.readlink(tmp_path / "latest") == name


def test_unreadable_json_is_named(tmp_path) -> None:
    with pytest.raises(PunaError, match=r"no\.json does not exist"):
        storage.read_json(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PunaError, match=r"bad\.json is not readable"):
        storage.read_json(tmp_path / "bad.json")


def test_a_parent_that_is_a_file_is_a_clear_error(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PunaError, match="cannot write"):
        storage.write_atomic(tmp_path / "file" / "below", "y")
