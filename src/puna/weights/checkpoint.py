"""Saves of a run and how to go on from one. Each is a Hugging Face folder plus `state/`, sealed by a manifest.

    run/
      step-000100/   config.json  model.safetensors (or model-0000i-of-0000n, with an index)  tokenizer files ...
                     state/__0_0.distcp ... state/.metadata     optimizer and random numbers, in boxes, for any mesh
                     state/trainer.json                         step, data position, schedule: the trainer's own
                     manifest.json                              size and sha256 of every file, written last
      latest -> step-000100

`Saver` (weights/saver.py) writes them. Here: what is there, whether it is whole, and which one to resume from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup

from puna.base import files
from puna.base.console import PunaError
from puna.model.transformer import Transformer
from puna.text.tokenizer import Tokenizer
from puna.weights.agree import Ranks
from puna.weights.manifest import MANIFEST, verify
from puna.weights.runs import open_run, step_of
from puna.weights.saver import Saver
from puna.weights.state import load_state

__all__ = ["MANIFEST", "find_resume", "list_steps", "load_checkpoint", "save_checkpoint", "verify"]

P = TypeVar("P", str, Path)  # a URL goes in and out as str: Path would fold its slashes


def list_steps(run: P) -> list[P]:
    """The complete saves of a run, oldest first: a folder counts only with its manifest."""
    return [type(run)(save) for save in open_run(run).steps()]


def find_resume(run: P, group: ProcessGroup | None = None) -> P | None:
    """The newest save, verified; None when the run has not saved yet. What killed saves left is removed.

    With a group (gloo, all ranks) each rank verifies its share of the files, and all get one answer. Raises PunaError
    for a damaged save, and for a store that does not answer.
    """
    ranks, home = Ranks(group), open_run(run)

    def look() -> list[str]:
        home.clean()
        return home.steps()

    steps = ranks.first(look)
    if not steps:
        return None
    newest = steps[-1]
    damaged = sorted(set().union(*ranks.each(lambda: verify(newest, (ranks.rank, ranks.size)))))
    if damaged:
        before = f"--checkpoint.resume {steps[-2]}" if len(steps) > 1 else "a new --out"
        raise PunaError(
            f"{newest} is damaged: {len(damaged)} files differ from its manifest ({', '.join(damaged[:3])})",
            f"resume from an earlier save with {before}",
        )
    # A kill between the seal and the move of `latest` leaves a whole save that it does not name yet.
    ranks.first(lambda: home.point(step_of(newest)))
    return type(run)(newest)


def save_checkpoint(
    run: Path,
    step: int,
    model: Transformer,
    tokenizer: Tokenizer | None,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    keep_last: int,
    keep_every: int = 0,
) -> Path:
    """One process's `Saver.save`, waited for: the save's path."""
    saver = Saver(run, model.spec, tokenizer, keep_last, keep_every, asynchronous=False)
    saver.save(step, dict(model.named_parameters()), optimizer, trainer)
    return run / files.name_of(saver.wait() or "")


def load_checkpoint(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One process's `load_state`: the optimizer's state in, the trainer's out; weights are `load_model`'s business."""
    return load_state(folder, dict(model.named_parameters()), optimizer)
