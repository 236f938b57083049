"""From a recipe to the shape of a model, and what is refused: numbers that cannot work, inputs that changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.text.tokenizer import Tokenizer
from puna.train.recipe import ModelSection, Recipe
from puna.train.sources import check_data


def choose_spec(section: ModelSection, tokenizer: Tokenizer, seq_len: int) -> Spec:
    """The preset with the recipe's changes and the tokenizer's ids."""
    spec = Spec.preset(section.preset)
    given = {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if getattr(section, f.name)}
    rope = {k: given.pop(k) for k in ("max_position_embeddings", "rope_theta") if k in given}
    shape = {k: v for k, v in given.items() if k not in ("path", "preset")}
    heads = shape.get("num_attention_heads", spec.num_attention_heads)
    width = shape.get("hidden_size", spec.hidden_size)
    if {"hidden_size", "num_attention_heads"} & shape.keys() and "head_dim" not in shape:
        if width % heads:
            raise PunaError(
                f"hidden_size {width} is not divisible by num_attention_heads {heads}",
                f"use a multiple of {heads}, or set model.head_dim",
            )
        shape["head_dim"] = width // heads
    if "num_hidden_layers" in shape:
        shape["sliding_windows"] = ()  # one entry per layer; no preset has a window
    shape.setdefault("vocab_size", tokenizer.vocab_size)
    if shape["vocab_size"] < tokenizer.vocab_size:
        raise vocab_error(tokenizer.vocab_size, shape["vocab_size"])
    rope.setdefault("max_position_embeddings", max(spec.max_len, seq_len))
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_ids": tuple(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    return spec.replace(**shape, **ids, rope=dataclasses.replace(spec.rope, **rope))


def vocab_error(tokenizer_size: int, model_size: int) -> PunaError:
    return PunaError(
        f"the tokenizer has {tokenizer_size} tokens, the model's vocabulary only {model_size}",
        f"use --model.vocab_size {tokenizer_size} or the tokenizer that belongs to the model",
    )


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
    _refuse_unbuilt(recipe)


def _refuse_unbuilt(recipe: Recipe) -> None:
    """Settings that only `puna plan` knows so far: training on would silently do something else."""
    parallel, train = recipe.parallel, recipe.train
    degrees = {f"parallel.{name}": getattr(parallel, name) for name in ("dp_replicate", "dp_shard", "tp", "pp", "cp")}
    asked = [f"{key} {value}" for key, value in degrees.items() if value > 1]
    asked += [f"train.{name}" for name in ("compile", "float8") if getattr(train, name)]
    asked += ["parallel.cpu_offload"] if parallel.cpu_offload else []
    if train.activation_checkpointing != "none":
        asked.append(f"train.activation_checkpointing {train.activation_checkpointing}")
    if asked:
        raise PunaError(f"{', '.join(asked)} is not built yet", "`puna plan` can already tell what it costs")


def check_resume(state: dict[str, Any], now: dict[str, Any], save: Path) -> None:
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
