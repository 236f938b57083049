"""The step's arithmetic, the schedule, precision, and what a run refuses."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import puna
from puna.base.config import build
from puna.base.console import PunaError
from puna.ops.basic import IGNORE
from puna.train.loop import Trainer
from puna.train.optim import build_optimizer, learning_rate
from puna.train.recipe import OptimSection, Recipe


def rows(recipe: dict) -> list[dict]:
    with open(f"{recipe['out']}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def test_a_run_learns_and_leaves_a_whole_folder(recipe, capsys) -> None:
    result = puna.train(recipe)
    found = rows(recipe)
    assert [row["step"] for row in found] == list(range(1, 25))
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    assert [row["step"] for row in found if "val_loss" in row] == [10, 20, 24]
    run = recipe["out"]
    assert sorted(os.listdir(run)) == ["latest", "loss.png", "metrics.jsonl", "step-000020", "step-000024"]
    assert os.readlink(f"{run}/latest") == "step-000024"
    assert open(f"{run}/loss.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    assert result["val_bits_per_byte"] == found[-1]["val_bits_per_byte"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line[:7].strip().isdigit()]
    assert len(lines) == 24
    assert len({len(line) for line in lines}) == 1  # fixed columns
    puna.LLM(f"{run}/latest").generate("def ", puna.SamplingParams(max_tokens=3))


def test_bits_per_byte_by_hand(recipe) -> None:
    trainer = Trainer(build(Recipe, recipe))
    found = trainer.validate()
    held = trainer.sources.held["text"].reader.manifest
    expected = found["val_loss"] / math.log(2) * (held.tokens - held.documents) / held.text_bytes
    assert found["val_bits_per_byte"] == pytest.approx(expected)


def gradients(recipe: dict, batch_sizes: list[int]) -> list[torch.Tensor]:
    """Gradients of one step over 12 sequences, cut into micro-batches; the first sequences have few scored tokens."""
    trainer = Trainer(build(Recipe, recipe, {"optim.grad_clip": 0.0}))
    kept: list[torch.Tensor] = []
    trainer.optimizer.zero_grad = lambda: kept.extend(p.grad.clone() for p in trainer.model.parameters())  # type: ignore
    batches, first = [], 0
    for size in batch_sizes:
        batch = trainer.sources.stream.batch(first, size)
        sequence = torch.arange(first, first + size).repeat_interleave(32)
        targets = batch.targets_T.where(torch.arange(32).repeat(size) < 4 + 2 * sequence, IGNORE)
        batches.append(replace(batch, targets_T=targets, valid=int((targets != IGNORE).sum())))
        first += size
    trainer.step(batches)
    return kept


def test_accumulation_weights_every_token_equally(recipe) -> None:
    """Micro-batches with different numbers of scored tokens give the gradient of one big batch."""
    whole = gradients(recipe, [12])
    for cut in ([1, 11], [5, 3, 4]):
        for a, b in zip(whole, gradients(recipe, cut), strict=True):
            assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_learns(recipe, dtype) -> None:
    recipe["train"] |= {"dtype": dtype, "device": "cpu"}
    puna.train(recipe)
    found = rows(recipe)
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    config = json.loads(open(f"{recipe['out']}/latest/config.json").read())
    assert config["dtype"] == "float32"  # the weights that are trained are kept whole


def test_loss_scale_survives_a_resume(recipe) -> None:
    recipe["train"] |= {"dtype": "float16", "device": "cpu", "steps": 10}
    trainer = Trainer(build(Recipe, recipe))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # overflows: must come down, skipping steps
    trainer.run()
    scale = trainer.scaler.get_scale()
    assert scale < 2.0**60
    assert Trainer(build(Recipe, recipe)).scaler.get_scale() == scale


def test_schedule() -> None:
    optim = OptimSection(lr=1.0, min_lr_ratio=0.1, warmup_steps=10)
    rates = [learning_rate(optim, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[54] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 44 / 89)))


def test_vectors_do_not_decay() -> None:
    model = puna.load_model("preset:debug")
    decay, plain = build_optimizer(model.parameters(), OptimSection(weight_decay=0.3)).param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decay["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert len(decay["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_fine_tuning_starts_from_a_folder(recipe, model_folder) -> None:
    recipe["model"] = {"path": str(model_folder)}
    del recipe["data"]["tokenizer"]
    trainer = Trainer(build(Recipe, recipe))
    assert torch.equal(trainer.model.embed, puna.load_model(model_folder).embed)


def test_sigterm_saves_and_the_same_recipe_goes_on(recipe, tmp_path) -> None:
    plain = {**recipe, "out": str(tmp_path / "plain")}
    puna.train(plain)
    trainer = Trainer(build(Recipe, recipe))
    step = trainer._one_step

    def step_and_signal() -> None:
        step()
        if trainer.step_done == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._one_step = step_and_signal  # type: ignore[method-assign]
    result = trainer.run()
    assert result["interrupted"]
    assert os.readlink(f"{recipe['out']}/latest") == "step-000007"
    assert puna.train(recipe)["step"] == 24
    assert [row["loss"] for row in rows(recipe)] == [row["loss"] for row in rows(plain)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.seq_len": 16}, "seq_len 32 -> 16"),
        ({"train.batch_size": 5}, "batch_size 4 -> 5"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"data.val_fraction": 0.4}, "data "),
        ({"model.num_hidden_layers": 3}, "model.num_hidden_layers 0 -> 3"),
    ],
)
def test_resuming_with_other_inputs_is_refused(recipe, change, message) -> None:
    puna.train(recipe, {"train.steps": 2})
    with pytest.raises(PunaError, match="other inputs") as caught:
        puna.train(recipe, change)
    assert message in caught.value.message


def test_a_damaged_save_is_not_resumed(recipe) -> None:
    puna.train(recipe, {"train.steps": 10})
    file = f"{recipe['out']}/latest/state/__0_0.distcp"
    data = bytearray(open(file, "rb").read())
    data[-1] ^= 1
    open(file, "wb").write(data)
    with pytest.raises(PunaError, match=r"1 files differ .*__0_0\.distcp") as caught:
        puna.train(recipe)
    assert "step-000005" in caught.value.hint
    with pytest.raises(PunaError, match=r"step-000010 is damaged: state/__0_0\.distcp"):
        puna.train(recipe, {"checkpoint.resume": f"{recipe['out']}/step-000010"})
    assert puna.train(recipe, {"checkpoint.resume": f"{recipe['out']}/step-000005"})["step"] == 24


def test_never_resume_protects_a_run(recipe) -> None:
    puna.train(recipe, {"train.steps": 2})
    with pytest.raises(PunaError, match="already holds saves"):
        puna.train(recipe, {"checkpoint.resume": "never"})


def test_a_diverging_run_says_so_and_saves_no_nan(recipe) -> None:
    with pytest.raises(PunaError, match=r"diverged at step \d+: loss") as caught:
        puna.train(recipe, {"optim.lr": 1e9, "optim.grad_clip": 0.0, "checkpoint.every": 1})
    assert "optim.lr" in caught.value.hint
    saved = puna.load_model(f"{recipe['out']}/latest")
    assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())


def test_degrees_without_torchrun_say_how_to_start(recipe) -> None:
    with pytest.raises(PunaError, match="make 4 ranks, and this is one process") as caught:
        puna.train(recipe, {"parallel.tp": 2, "parallel.pp": 2})
    assert "--nproc_per_node=4" in caught.value.hint
