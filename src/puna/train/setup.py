"""From a recipe to the shape of a model, and what is refused: numbers that cannot work, inputs that changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from puna import __version__
from puna.base.config import as_dict
from puna.base.console import PunaError
from puna.base.hardware import dtype_name, parse_dtype, pick_device
from puna.model.spec import Spec
from puna.parallel.degrees import check_passes, microbatches, resolve
from puna.parallel.launch import Meeting
from puna.parallel.world import Settings, World, choose_device
from puna.train.fake_quant import check_layers, training_config
from puna.train.recipe import Recipe
from puna.train.sources import check_data


def check_recipe(recipe: Recipe) -> None:
    """Refuse numbers that cannot work before anything is read."""
    train, data = recipe.train, recipe.data
    if recipe.task != "pretrain":
        raise PunaError(f"task {recipe.task!r} is not one puna knows", 'use task = "pretrain"')
    check_data(data, data.tokenizer or recipe.model.path)
    if recipe.seed < 0:
        raise PunaError(f"seed is {recipe.seed}", "use --seed 0 or more")
    at_least_one = {"train.steps": train.steps, "train.batch_size": train.batch_size,
                    "checkpoint.every": recipe.checkpoint.every, "train.log_every": train.log_every}  # fmt: skip
    for key, value in at_least_one.items():
        if value < 1:
            raise PunaError(f"{key} is {value}", f"use --{key} 1 or more")
    if train.micro_batch_size < 0:
        raise PunaError(f"train.micro_batch_size is {train.micro_batch_size}", "use 0 (all of batch_size) or more")
    if recipe.quant.start_step < 0 or recipe.quant.start_step >= train.steps:
        raise PunaError(
            f"quant.start_step is {recipe.quant.start_step}, the run has {train.steps} steps",
            "use 0 or more, and fewer than train.steps",
        )
    training_config(recipe.quant)
    if train.float8:
        raise PunaError("train.float8 is not built yet", "`puna plan` can already tell what it brings")


def open_world(recipe: Recipe, spec: Spec, meeting: Meeting) -> World:
    """The ranks of this job, cut as the [parallel] section says. What cannot be is refused on every rank alike."""
    place, parallel, data, train = meeting.place, recipe.parallel, recipe.data, recipe.train
    meeting.agree("recipe", json.dumps(_keys(recipe)), "start every node with the same recipe and options")
    meeting.agree("software", json.dumps({"puna": __version__, "torch": torch.__version__}), "install the same on all")
    asked = math.prod(max(1, getattr(parallel, name)) for name in ("dp_replicate", "dp_shard", "tp", "pp", "cp"))
    if place.size == 1 and asked > 1:
        raise PunaError(
            f"the recipe's degrees make {asked} ranks, and this is one process",
            f"start it with torchrun --standalone --nproc_per_node={asked} -m puna train RECIPE.toml",
        )
    degrees = resolve(parallel, place.size, spec, data.seq_len, train.batch_size)
    dtype = dtype_name(parse_dtype(train.dtype))
    check_passes(parallel, degrees, dtype, train.activation_checkpointing, train.compile)
    if (quant := training_config(recipe.quant)) is not None:
        check_layers(quant, spec, degrees.tp, degrees.pp, dtype)
    if degrees.pp > 1:
        microbatches(parallel, degrees, train.batch_size, train.micro_batch_size)
    device = choose_device(pick_device(train.device).type, place)
    flight = Path(recipe.out) / "flight"
    how = Settings(parallel.backend, parallel.first_timeout, parallel.timeout, parallel.environment, flight)
    return World(meeting, degrees, device, how, needs_mesh=parallel.cpu_offload)


def _keys(recipe: Recipe) -> dict[str, Any]:
    """{'train.steps': 100, ...}"""
    found: dict[str, Any] = {}
    for name, part in as_dict(recipe).items():
        found |= {f"{name}.{key}": value for key, value in part.items()} if isinstance(part, dict) else {name: part}
    return found


def check_resume(state: dict[str, Any], now: dict[str, Any], save: str) -> None:
    """Refuse to go on with other data, order or shape than the save was made with."""
    before, now = _flat(state["identity"]), _flat(now)
    changed = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        raise PunaError(
            f"{save} was trained with other inputs: {', '.join(changed)}",
            "resumed, it would repeat, skip or ignore some of that; restore it, or start anew with another --out",
        )


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    model = {f"model.{key}": value for key, value in identity.get("model", {}).items()}
    return {key: value for key, value in identity.items() if key != "model"} | model
