"""Verbs about a run: the whole road on this machine, a training by a recipe, what one would need."""

from __future__ import annotations

from typing import Annotated

import tyro

from puna.base.config import describe, parse_overrides
from puna.base.console import PunaError, table
from puna.cli.answer import answer


def quickstart(out: str = "quickstart", minutes: float = 3.0, text: tuple[str, ...] = (), json: bool = False) -> None:
    """The whole road on this machine, no download: tokenizer, training, a completion.

    Args:
        out: Folder of the run. An unfinished run in it is continued.
        minutes: Time to spend on training.
        text: Files or folders to learn from. Default: the sources of Python's standard library.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.serve.quickstart import run_quickstart

    answer(run_quickstart(out, minutes, text), json)


def train(arguments: list[str]) -> None:
    """Train by a recipe; continues what the recipe's `out` already holds."""
    from puna.train.recipe import Recipe

    if not arguments or {"-h", "--help"} & set(arguments):
        rows = [(f"--{key}", default, text) for key, default, text in describe(Recipe)]
        print(f"usage: puna train RECIPE.toml [--section.key value ...] [--json]\n\n{train.__doc__}\n")
        print(table(rows, ("key", "default", "meaning")))
        return
    json = "--json" in arguments
    words = [word for word in arguments if word != "--json"]
    if words[0].startswith("--"):
        raise PunaError(f"the recipe comes first, got {words[0]}", "puna train RECIPE.toml --section.key value")
    from puna.train.loop import train as run_training

    answer(run_training(words[0], parse_overrides(words[1:])), json)


def plan(
    recipe: Annotated[str, tyro.conf.arg(metavar="RECIPE.toml")], /, gpus: int = 0, gpu: str = "h100",
    tokens: float = 0.0, price: float = 0.0, storage: float = 2.0, search: bool = False, picture: str = "",
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY VALUE")] = (), json: bool = False,
) -> None:  # fmt: skip
    """Say what a recipe needs on GPUs, how fast it runs, what it costs and what to change; starts nothing.

    Any key of the recipe can be changed as in training: --parallel.tp 8 --train.activation_checkpointing full.

    Args:
        recipe: A training recipe.
        gpus: How many; 0: the product of the recipe's degrees.
        gpu: h100, h100-500w, h200, a100-80, b200 or mi300x.
        tokens: Tokens to train on, such as 15e12; 0: the recipe's steps.
        price: Dollars per GPU and hour.
        storage: Rate at which a node writes checkpoints, in GB/s.
        search: Propose the fastest meshes that fit, over all ways to cut this many GPUs.
        picture: File for the pipeline schedule and memory per rank: .html (a page, with the figures), .png or .svg.
        set: Keys of the recipe; --section.key value is the same.
        json: Print one JSON object as the last line of stdout.
    """
    from puna.serve.plan import Budget, make_plan, print_plan

    changed = parse_overrides([f"--{key}={value}" for key, value in zip(set[::2], set[1::2], strict=True)])
    report = make_plan(recipe, changed, gpus, gpu, Budget(tokens, price, storage), search, picture)
    if not json:
        print_plan(report)
    answer(report, json)
