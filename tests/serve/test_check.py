"""A save in a bucket, as people meet it: the run that writes it, its card, its check, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import puna
from puna.base import files
from puna.base.console import PunaError
from puna.serve.card import model_card
from puna.serve.check import check_save


def test_a_run_in_a_bucket(recipe, s3_bucket, tmp_path, monkeypatch) -> None:
    """Saves go to checkpoint.folder, the run goes on from them, and every verb reads RUN/latest."""
    monkeypatch.setenv("PUNA_CACHE", str(tmp_path / "cache"))
    run = f"{s3_bucket}/run"
    changes = {"checkpoint.folder": run, "checkpoint.every": 2, "train.steps": 4}
    puna.train(recipe, changes)
    losses = _losses(recipe)
    assert not list(Path(recipe["out"]).glob("step-*"))
    files.remove_tree(f"{run}/step-000004")  # as if it had been killed before the last save
    report = puna.train(recipe, changes)
    assert report["model"] == f"{run}/latest"
    assert _losses(recipe) == losses
    assert check_save(report["model"])["verified"]
    assert model_card(report["model"])["layers"] == 2
    answer = puna.LLM(report["model"]).generate("def alpha", puna.SamplingParams(temperature=0, max_tokens=4))
    assert len(answer[0].token_ids) == 4
    save = f"{run}/step-000004"
    data = bytearray(files.read_file(f"{save}/config.json"))
    data[5] ^= 4
    files.write_file(f"{save}/config.json", bytes(data))
    with pytest.raises(PunaError, match=r"damaged: 1 of its files .*config\.json"):
        check_save(save)


def _losses(recipe) -> list[float]:
    lines = (Path(recipe["out"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
