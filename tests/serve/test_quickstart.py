from __future__ import annotations

import json
import os

import pytest

import puna
from puna.base.config import build, read_toml
from puna.serve import quickstart
from puna.train.recipe import Recipe


@pytest.fixture
def quick(corpus, tmp_path, monkeypatch):
    """The quickstart on the small corpus, a few seconds long."""
    monkeypatch.setattr(quickstart, "VOCAB", 320)
    return lambda: quickstart.run_quickstart(str(tmp_path / "q"), 0.02, [str(corpus)])


def test_the_whole_road(quick, tmp_path, capsys) -> None:
    result = quick()
    folder = tmp_path / "q"
    assert {"tokenizer", "recipe.toml", "latest", "loss.png", "metrics.jsonl"} <= set(os.listdir(folder))
    assert result["after"]["val_bits_per_byte"] < result["before"]["val_bits_per_byte"]
    err = capsys.readouterr().err
    assert "before training" in err
    assert "⠀" in err  # the terminal curve
    assert f"generate {folder}/latest" in err
    model = puna.load_model(folder / "latest")
    assert model.spec.bos_token_id is not None
    json.dumps(result)


def test_an_unfinished_run_goes_on_and_a_finished_one_is_kept(quick, tmp_path, monkeypatch) -> None:
    steps = []
    from puna.train.loop import Trainer

    one_step = Trainer._one_step

    def stop_half_way(self: Trainer) -> None:
        one_step(self)
        steps.append(self.step_done)
        if self.step_done == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_one_step", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        quick()
    monkeypatch.setattr(Trainer, "_one_step", one_step)
    total = build(Recipe, read_toml(tmp_path / "q" / "recipe.toml")).train.steps
    assert quick()["step"] == total
    before = (tmp_path / "q" / "metrics.jsonl").read_bytes()
    assert quick()["step"] == total
    assert (tmp_path / "q" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_one_learns_python(tmp_path) -> None:
    """As a stranger runs it, on the standard library: from above 3.5 to at most 2.3 bits per byte, visibly Python."""
    result = quickstart.run_quickstart(str(tmp_path / "q"), 3.0, [])
    assert result["before"]["val_bits_per_byte"] > 3.5
    assert result["val_bits_per_byte"] <= 2.3
    assert any(word in result["after"]["text"] for word in ("def ", "return ", "self."))
