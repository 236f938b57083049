"""Saves from any mesh to any mesh, and saves that fail half-way: on four, two and one rank, in one launch."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from parallel import ranks
from weights.saver_checks import WORLDS

NAMES = [f"{check.__name__}@{world}" for world, checks in WORLDS.items() for check in checks]
KILL = "a_killed_rank_ends_the_others@4"  # its report is in files: the ranks end there


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def report(folder, s3_server) -> dict[str, Any]:
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/saves", method="PUT"), timeout=30).close()
    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "AKIDPUNATEST",
        "AWS_SECRET_ACCESS_KEY": "very-secret-access-key",
        "AWS_REGION": "us-east-1",
        "PUNA_TEST_BUCKET": "s3://saves",
        "PUNA_TEST_SAVES": str(folder),
        "PUNA_CACHE": str(folder / "cache"),
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        return ranks.run(Path(__file__).with_name("saver_checks.py"), timeout=280)


@pytest.mark.parametrize("name", [name for name in NAMES if name != KILL])
def test_on_ranks(report: dict[str, Any], name: str) -> None:
    assert report[name]["ok"], report[name]["error"]


def test_a_killed_rank_is_an_error_on_the_others(report, folder) -> None:
    assert not report[KILL]["ok"]  # one rank never came back
    for rank in (0, 1, 3):
        told = json.loads((folder / f"killed-{rank}.json").read_text())
        assert told["ok"], told
        assert "another rank died or does not answer" in told["text"]
        assert "earlier saves" in told["hint"]
    assert not (folder / "killed-2.json").exists()


def test_parallel_writers(report) -> None:
    """Each of four ranks has weights and state to write, for shards and for copies alike."""
    for layout, counts in report["files_are_written_by_many_and_small_models_by_one@4"]["result"].items():
        assert counts[0] >= 4, layout
        assert counts[1] == 4, layout


def test_nothing_is_left_in_temporary_folders(report, folder) -> None:
    assert report
    assert [name for name in os.listdir(folder) if name.startswith("puna-save")] == []
