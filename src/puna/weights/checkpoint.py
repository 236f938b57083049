"""Training state beside the model: each save is a Hugging Face folder plus `state/`, sealed by a manifest.

    run/
      step-000100/   config.json  model.safetensors  tokenizer files ...
                     state/optimizer.safetensors  state/trainer.json
                     manifest.json      sha256 of every file, written last
      latest -> step-000100

A step folder appears by one rename and `latest` moves after it, so neither is ever half-written.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from puna.base.console import PunaError
from puna.base.storage import atomic_folder, point_latest, read_json, sha256_file, write_json
from puna.model.transformer import Transformer
from puna.text.tokenizer import Tokenizer
from puna.weights.folder import save_tensors, write_folder

MANIFEST = "manifest.json"


def save_checkpoint(
    run: Path,
    step: int,
    model: Transformer,
    tokenizer: Tokenizer | None,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write run/step-NNNNNN whole, move `latest` to it, then drop all but the `keep_last` newest steps.

    `trainer` is what the loop needs beside tensors (data position, schedule, scaler), as JSON.
    """
    target = run / f"step-{step:06d}"
    with atomic_folder(target) as folder:
        write_folder(model, folder, tokenizer)
        state = folder / "state"
        state.mkdir()
        save_tensors(optimizer_tensors(model, optimizer), state / "optimizer.safetensors")
        write_json(state / "trainer.json", {"step": step, **trainer})
        write_json(folder / MANIFEST, {"files": _digests(folder)})
    point_latest(run / "latest", target)
    for old in list_steps(run)[:-keep_last] if keep_last > 0 else []:
        _discard(old)
    return target


def load_checkpoint(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the optimizer's state back and return the trainer's; the weights are `load_model`'s business."""
    tensors = load_file(folder / "state" / "optimizer.safetensors")
    restore_optimizer(model, optimizer, tensors)
    return read_json(folder / "state" / "trainer.json")


def verify(folder: Path) -> list[str]:
    """Names of files that are missing or differ from the manifest; empty when the folder is whole."""
    files: dict[str, str] = read_json(folder / MANIFEST)["files"]
    return [name for name, digest in files.items() if not _matches(folder / name, digest)]


def find_resume(run: Path) -> Path | None:
    """The newest save, verified; None when the run has not saved yet. Leftovers of a killed save are removed."""
    for leftover in [*run.glob(".step-*.tmp"), *run.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)
    steps = list_steps(run)
    if not steps:
        return None
    # A kill between the rename and the move of the link leaves a whole folder that `latest` does not name yet.
    point_latest(run / "latest", steps[-1])
    damaged = verify(steps[-1])
    if damaged:
        before = f"--checkpoint.resume {steps[-2]}" if len(steps) > 1 else "a new --out"
        raise PunaError(
            f"{steps[-1]} is damaged: {len(damaged)} files differ from its manifest ({', '.join(damaged[:3])})",
            f"resume from an earlier save with {before}",
        )
    return steps[-1]


def list_steps(run: Path) -> list[Path]:
    """The complete saves of a run, oldest first: a folder counts only with its manifest."""
    return sorted(p for p in run.glob("step-*") if (p / MANIFEST).exists())


def optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as {'exp_avg/layers.0.attn.q_proj.weight': tensor}: by parameter name, not by position."""
    named = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            named[f"{key}/{name}"] = value.detach().cpu().contiguous()
    return named


def restore_optimizer(model: Transformer, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; state for an unknown parameter is an error."""
    parameters = dict(model.named_parameters())
    unknown = [name for name in tensors if name.partition("/")[2] not in parameters]
    if unknown:
        raise PunaError(f"optimizer state for {len(unknown)} unknown parameters, e.g. {unknown[0]}", "check --model")
    for joined, value in tensors.items():
        key, _, name = joined.partition("/")
        parameter = parameters[name]
        device = (
            torch.device("cpu") if key == "step" and value.ndim == 0 and not _fused(optimizer) else parameter.device
        )
        optimizer.state[parameter][key] = value.to(device).clone()


def _discard(folder: Path) -> None:
    """Remove a save; renamed first, so that a kill half-way leaves no step folder with holes."""
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(folder)): sha256_file(p) for p in files}


def _matches(file: Path, digest: str) -> bool:
    return file.exists() and sha256_file(file) == digest
