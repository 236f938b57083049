"""Optimizer and random-number state on disk: `state/` of a save, by torch.distributed.checkpoint (DCP), for any mesh.

Each rank writes its boxes of each tensor and reads the boxes it needs of another mesh's: DCP finds the overlaps. The
planners below speak in `Piece`s, not DTensors, because a snapshot's tensors lie on the host and DCP would ask DTensor
for boxes that it computes itself (FSDP2's uneven strided ones among them). DCP has no checksums: the manifest has.

`.metadata` is a pickle (DCP's choice): resume only from saves whose origin you trust. Loading weights never opens it.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from puna.base.console import PunaError, size
from puna.base.storage import disk_error, read_json
from puna.weights.agree import lost_rank
from puna.weights.snapshot import Layout, Piece, Whole

TRAINER = "trainer.json"
# DCP remarks on every read and write of one process; here that is what was asked for.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

_NEARLY_FULL = 16 << 20  # bytes free: a write that failed with less than this failed for want of room


def save_state(pieces: dict[str, Piece], folder: Path, group: ProcessGroup | None) -> list[str]:
    """Write these pieces into `folder`, all ranks of the group together, fsynced; the names of this rank's files.

    Raises PunaError on every rank if one fails.
    """
    writer = dcp.FileSystemWriter(folder)
    planner = _SavePieces(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(pieces, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise _explain(error, folder) from error
    except RuntimeError as error:
        if group is None:
            raise
        raise lost_rank(error) from error
    rank = 0 if group is None else dist.get_rank(group)
    names = [name for name in os.listdir(folder) if name.startswith(f"__{rank}_")]
    return sorted(names + ([".metadata"] if rank == 0 else []))


def load_state(
    save: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    layout: Layout | None = None,
    all_names: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Give the optimizer (new, or with state) the saved state of these parameters; returns the trainer's own.

    Reads what this rank holds and no more; no rank talks to another. The default generator gets this rank's state, that
    of rank r modulo the saved ranks if there were fewer. `all_names`: the whole model's parameters, where this rank has
    only some (a pipeline stage). Raises PunaError for state that is missing, left over, or of another shape.
    """
    folder = save / "state"
    if (folder / "optimizer.safetensors").exists():
        raise PunaError(f"{folder} is of an early format (optimizer.safetensors)", "it cannot be resumed; train anew")
    if not (folder / ".metadata").exists():
        raise PunaError(f"{save} holds no training state", "resume from a step folder of a run")
    reader = dcp.FileSystemReader(folder)
    try:
        saved = reader.read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise _unreadable(folder, error) from error
    kinds = _kinds(saved)
    _check(kinds, saved, parameters, set(all_names or parameters), save)
    tensors = {}
    for name, parameter in parameters.items():
        for kind in kinds.get(name, ()):
            group = _group_of(optimizer, parameter)
            tensors[name, kind] = _tensor_for(parameter, saved[f"{kind}/{name}"], kind, group)
    wanted = {f"{kind}/{name}": _destination(one, layout or Whole()) for (name, kind), one in tensors.items()}
    random = _random_pieces(saved)
    try:
        dcp.load(wanted | random, storage_reader=reader, planner=_LoadPieces(False, False), no_dist=True)
    except CheckpointException as error:
        raise _unreadable(folder, next(iter(error.failures.values()))[0]) from error
    for (name, kind), tensor in tensors.items():
        optimizer.state[parameters[name]][kind] = tensor
    _restore_random(random)
    return read_json(folder / TRAINER)


class _SavePieces(DefaultSavePlanner):
    """Plans to write `Piece`s. What several ranks offer is written once: that is the default planner's business."""

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(key, piece) for key, piece in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].data


class _LoadPieces(DefaultLoadPlanner):
    """Plans to read into `Piece`s."""

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for key, piece in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, stored, [_chunk(piece)] if piece.data.numel() else [])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].data


def _write_item(key: str, piece: Piece) -> WriteItem:
    data = TensorWriteData(
        chunk=_chunk(piece),
        properties=TensorProperties.create_from_tensor(piece.data),
        size=torch.Size(piece.shape),
    )
    return WriteItem(MetadataIndex(key, torch.Size(piece.offsets)), WriteItemType.SHARD, tensor_data=data)


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.data.shape)


def _kinds(saved: Mapping[str, Any]) -> dict[str, list[str]]:
    """{parameter: ['exp_avg', 'exp_avg_sq', 'step']} of all that was saved."""
    found: dict[str, list[str]] = {}
    for key in saved:
        kind, _, name = key.partition("/")
        if kind != "rng":
            found.setdefault(name, []).append(kind)
    return found


def _check(
    kinds: dict[str, list[str]], saved: Mapping[str, Any], parameters: Mapping[str, Tensor], names: set[str], save: Path
) -> None:
    hint = "resume with the model and the optimizer that were saved"
    if unknown := sorted(kinds.keys() - names):
        raise PunaError(f"{save} has optimizer state for {len(unknown)} unknown parameters, e.g. {unknown[0]}", hint)
    missing = [name for name, parameter in parameters.items() if parameter.requires_grad and name not in kinds]
    if kinds and missing:
        raise PunaError(f"{save} has no optimizer state for {len(missing)} parameters, e.g. {missing[0]}", hint)
    for name, parameter in parameters.items():
        for kind in kinds.get(name, ()):
            shape = tuple(saved[f"{kind}/{name}"].size)
            if shape not in ((), tuple(parameter.shape)):
                raise PunaError(f"{save}: {kind} of {name} is {list(shape)}, not {list(parameter.shape)}", hint)


def _tensor_for(parameter: Tensor, stored: Any, kind: str, group: dict[str, Any]) -> Tensor:
    """An empty tensor for one piece of state, where the optimizer wants it: like its parameter, or a scalar.

    Fused and capturable optimizers count steps beside the parameter, others on the CPU: as torch's own load does.
    """
    if tuple(stored.size) == tuple(parameter.shape):
        return torch.zeros_like(parameter.detach(), dtype=stored.properties.dtype)
    beside = kind != "step" or group.get("fused") or group.get("capturable")
    held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return torch.zeros((), dtype=stored.properties.dtype, device=held.device if beside else "cpu")


def _group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    groups = (group for group in optimizer.param_groups if any(one is parameter for one in group["params"]))
    return next(groups, {})


def _destination(tensor: Tensor, layout: Layout) -> Piece:
    offsets = tuple(part.start for part in layout.pieces_of(tensor))
    return Piece(tuple(tensor.shape), offsets, tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def _random_pieces(saved: Mapping[str, Any]) -> dict[str, Piece]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    pieces = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        ranks = sum(key.startswith(f"rng/{device}/") for key in saved)
        if ranks:
            key = f"rng/{device}/{rank % ranks}"
            shape = tuple(saved[key].size)
            pieces[key] = Piece(shape, (0,), torch.empty(shape, dtype=torch.uint8))
    return pieces


def _restore_random(pieces: Mapping[str, Piece]) -> None:
    for key, piece in pieces.items():
        if key.startswith("rng/cpu/"):
            torch.set_rng_state(piece.data)
        else:
            torch.cuda.set_rng_state(piece.data)


def _unreadable(folder: Path, cause: BaseException) -> PunaError:
    text = f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
    return PunaError(f"{folder} cannot be read: {text}", "`verify` tells which file is damaged; use an earlier save")


def _explain(error: CheckpointException, folder: Path) -> PunaError:
    """The first failure of a rank in a person's words; torch's writer hides the operating system's error number."""
    rank, (cause, _) = next(iter(error.failures.items()))
    if isinstance(cause, OSError):
        found = disk_error(cause, folder)
        return PunaError(f"rank {rank}: {found.message}", found.hint)
    free = shutil.disk_usage(folder).free
    if free < _NEARLY_FULL:
        hint = "free some space or choose another --out; files that were already complete are untouched"
        return PunaError(f"rank {rank}: the disk is full while writing {folder} ({size(free)} free)", hint)
    text = f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
    return PunaError(f"rank {rank} cannot write {folder}: {text}", "check the disk and the path")
